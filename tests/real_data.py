"""Real texts and benchmarks for tests: in $MTP_TEST_DATA or next to the checkout."""

import os
import pathlib

import pytest

from tests.conftest import ROOT

FOLDER = pathlib.Path(os.environ.get("MTP_TEST_DATA") or ROOT.parent / "shared" / "data")


def find(name):
    """The path of a file or folder; the test is skipped where it is missing, and fails in CI."""
    path = FOLDER / name
    if path.exists():
        return path
    message = f"{path} is missing: set MTP_TEST_DATA to a folder that has it"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)
