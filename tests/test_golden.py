"""Losses, exports and checkpoints equal those recorded before the architecture changed (tests/golden_runs.py)."""

import json
import os
import tarfile

import jax
import pytest

from tests import golden_runs
from tests.golden_runs import CHECKPOINTS, EXPORTS, MESHES, RESUMED, RUNS

EXPECTED = json.loads(RUNS.read_text())
# Another jax, or another processor, compiles other programs; twenty steps of Adam multiply a rounding. Where the
# recorded runs were made, MTP_JAX_GOLDEN_TOLERANCE=1e-6 holds.
TOLERANCE = float(os.environ.get("MTP_JAX_GOLDEN_TOLERANCE", 1e-4 if jax.__version__ == EXPECTED["jax"] else 1e-3))


# The kinds on eight devices are compared with one device in test_meshes.py: one of them is enough here.
@pytest.mark.parametrize("name", ["none/one", "parallel/one", "sequential/one", "sequential/eight"])
def test_losses_and_gradient_norms_are_those_recorded(name):
    kind, mesh = name.split("/")
    assert mesh in MESHES
    for step, (got, expected) in enumerate(zip(golden_runs.run(kind, mesh), EXPECTED[name], strict=True)):
        assert got == pytest.approx(expected, rel=TOLERANCE), f"step {step + 1}: loss, gradient norm"


def test_exports_are_those_recorded():
    assert golden_runs.exports() == json.loads(EXPORTS.read_text())


@pytest.mark.parametrize("kind", RESUMED)
def test_a_checkpoint_written_before_continues(kind, tmp_path):
    with tarfile.open(CHECKPOINTS / f"{kind}.tar.xz") as archive:
        archive.extractall(tmp_path / "run", filter="data")
    expected = json.loads((tmp_path / "run" / "expected.json").read_text())
    for got, wanted in zip(golden_runs.resume(kind, tmp_path / "run", 4), expected, strict=True):
        assert got == pytest.approx(wanted, rel=max(TOLERANCE, 1e-5))
