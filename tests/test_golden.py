"""Losses, exports and checkpoints equal those recorded before the architecture changed (tests/golden_runs.py).

MTP_JAX_GOLDEN=1 compares every recorded run, within 1e-6: where they were recorded (jax 0.10.2, its processor), that
holds.
"""

import json
import os
import tarfile

import jax
import pytest

from tests import golden_runs
from tests.golden_runs import CHECKPOINTS, EXPORTS, KINDS, MESHES, RESUMED, RUNS

EXPECTED = json.loads(RUNS.read_text())
IS_COMPLETE = os.environ.get("MTP_JAX_GOLDEN", "") == "1"
# Another jax, or another processor, compiles other programs; twenty steps of Adam multiply a rounding.
TOLERANCE = 1e-6 if IS_COMPLETE else 1e-4 if jax.__version__ == EXPECTED["jax"] else 1e-3
NAMES = [f"{kind}/{mesh}" for kind in KINDS for mesh in MESHES] if IS_COMPLETE else ["sequential/one"]


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradient_norms_are_those_recorded(name):
    for step, (got, expected) in enumerate(zip(golden_runs.run(*name.split("/")), EXPECTED[name], strict=True)):
        assert got == pytest.approx(expected, rel=TOLERANCE), f"step {step + 1}: loss, gradient norm"


def test_exports_are_those_recorded():
    assert golden_runs.exports() == json.loads(EXPORTS.read_text())


@pytest.mark.parametrize("kind", RESUMED if IS_COMPLETE else RESUMED[-1:])
def test_a_checkpoint_written_before_continues(kind, tmp_path):
    with tarfile.open(CHECKPOINTS / f"{kind}.tar.xz") as archive:
        archive.extractall(tmp_path / "run", filter="data")
    expected = json.loads((tmp_path / "run" / "expected.json").read_text())
    for got, wanted in zip(golden_runs.resume(kind, tmp_path / "run", 4), expected, strict=True):
        assert got == pytest.approx(wanted, rel=max(TOLERANCE, 1e-5))
