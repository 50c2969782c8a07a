"""From sums over validation batches to the table."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from mtp_jax.evaluation import validation
from mtp_jax.training.validation import as_metrics, results_of
from tests.conftest import ROOT
from tests.decoding.trained import train_small

SUMS = {
    "nll": [80.0, 60.0, 0.0],
    "correct": [50.0, 20.0, 0.0],
    "num": [100.0, 80.0, 0.0],
    "agree": [100.0, 40.0, 0.0],
    "num_compared": [100.0, 50.0, 0.0],
    "bytes": [50.0, 40.0, 0.0],
}


@pytest.fixture
def results():
    return results_of({name: np.array(values) for name, values in SUMS.items()})


def test_rates_go_by_their_own_counts(results):
    main, first, _ = results
    assert (main.loss, main.accuracy, main.expected_tokens) == (0.8, 0.5, 1.0)
    assert main.bits_per_byte == pytest.approx(0.8 / math.log(2) * 100 / 50)
    assert (first.loss, first.accuracy, first.agreement, first.expected_tokens) == (0.75, 0.25, 0.8, 1.8)


def test_a_depth_without_targets_is_not_a_perfect_one(results):
    assert math.isnan(results[2].loss) and math.isnan(results[2].agreement)
    assert "nan" in validation.table(results).splitlines()[3]
    values = json.loads(json.dumps(validation.as_json(results, "loss"), allow_nan=False))
    assert values["mtp_2"] == {"loss": None, "bits_per_byte": None, "accuracy": None, "num_targets": 0}


def test_the_metrics_of_a_step_are_those_of_the_table(results):
    assert as_metrics(results) == {
        **{"validation_loss_main": 0.8, "validation_loss_mtp_1": 0.75, "validation_loss_mtp_2": None},
        "validation_bits_per_byte": results[0].bits_per_byte,
        **{"validation_agreement_mtp_1": 0.8, "validation_agreement_mtp_2": None},
        "validation_tokens_per_forward": None,  # a depth without targets has no rate
    }
    assert as_metrics(results[:2])["validation_tokens_per_forward"] == results[1].expected_tokens == 1.8
    assert as_metrics(results[:1])["validation_tokens_per_forward"] == 1.0


MEASURE = """
import sys
import eval, mtp_jax
workdir = sys.argv[1]
eval.main([f"--workdir={workdir}", "--tasks=loss,acceptance"])
assert mtp_jax.load(workdir).generate(["the"], max_new_tokens=2).texts
print("measured", "mtp_jax.training.loop" in sys.modules)
"""


def test_a_run_is_measured_without_the_training_loop(tmp_path):
    workdir = train_small(tmp_path, **{"training.num_steps": 1})
    command = [sys.executable, "-c", MEASURE, str(workdir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("measured False\n"), done.stdout + done.stderr
