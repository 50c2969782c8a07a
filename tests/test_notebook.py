"""notebooks/quickstart.ipynb: its cells are plain Python, run here in order by one process, without Jupyter."""

import importlib.metadata
import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.commands import QUICK, run_process
from tests.conftest import ROOT

NOTEBOOK = json.loads((ROOT / "notebooks" / "quickstart.ipynb").read_text())
CODE = {cell["id"]: "".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"}
NO_PIP = "import subprocess\nsubprocess.run = lambda command, **_: subprocess.CompletedProcess(command, 0)"
FIGURES = (
    "print('figures', [sum(len(a.lines) + len(a.patches) for a in plt.figure(n).axes) for n in plt.get_fignums()])"
)
# name -> the oldest version that will do
REQUIRED = dict(re.findall(r"^([\w-]+)>=([\d.]+)", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE))


def with_line(source, start, line):
    """`source` with the one line that begins with `start` replaced."""
    changed, count = re.subn(rf"^{re.escape(start)}.*$", lambda _: line, source, flags=re.MULTILINE)
    assert count == 1, f"{count} lines begin with {start!r}"
    return changed


def test_notebook_is_valid_and_without_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"
    cells = NOTEBOOK["cells"]
    assert [c["cell_type"] for c in cells] == ["markdown", *["markdown", "code"] * 5]
    ids = [c["id"] for c in cells]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", i) for i in ids)
    for cell in cells:
        extra = {"outputs": [], "execution_count": None} if cell["cell_type"] == "code" else {}
        assert cell == {k: cell[k] for k in ("cell_type", "id", "metadata", "source")} | extra
        assert cell["source"] and all(isinstance(line, str) for line in cell["source"])


def test_cells_run_in_order(tmp_path):
    cells = CODE | {"train": with_line(CODE["train"], "NUM_STEPS =", "NUM_STEPS = 3")}
    cells["train"] = with_line(cells["train"], "WORKDIR =", f"WORKDIR = {str(tmp_path / 'run')!r}")
    again = cells["train"] + "\nassert run.step == 3"  # a cell that is run once more finds its run done
    script = tmp_path / "cells.py"
    script.write_text(
        "\n\n".join([NO_PIP, cells.pop("install"), cells.pop("train"), again, *cells.values(), FIGURES]) + "\n"
    )
    done = run_process(script, env=QUICK | {"MPLBACKEND": "Agg"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed  from step 3" in done.stdout
    # Losses of three depths and agreement of two; bars of plain decoding and of one to three drafts, twice.
    assert done.stdout.splitlines()[-1] == "figures [5, 8]"
    greedy = re.search(r"160 tokens: (\d+) forward passes plain, (\d+) with drafts", done.stdout)
    assert greedy and int(greedy[1]) == 160 >= int(greedy[2])


@pytest.fixture
def install(monkeypatch):
    """Runs the first cell where all that is required is there; gives the command lines it would have started."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: REQUIRED[name])
    monkeypatch.setattr(sys, "path", [p for p in sys.path if pathlib.Path(p or ".").resolve() != ROOT])
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)

    def install_from(folder):
        monkeypatch.chdir(folder)
        exec(compile(CODE["install"], "install", "exec"), {})
        assert sys.path[0] == str(ROOT)
        return commands

    return install_from


@pytest.mark.parametrize("folder", [ROOT, ROOT / "notebooks", ROOT.parent], ids=["root", "notebooks", "above"])
def test_install_finds_the_clone_and_touches_nothing_that_is_there(install, folder, monkeypatch):
    if folder == ROOT.parent:  # Colab's own folder, with the clone in it and whatever else is beside
        monkeypatch.setattr(pathlib.Path, "glob", lambda self, _: [folder / "other", ROOT])
    assert install(folder) == []


@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize(
    ("name", "found"), [("grain", None), ("jax", None), ("jax", "0.4.30"), ("array_record", "0.7.2")]
)
def test_install_brings_what_is_missing_or_too_old(install, monkeypatch, has_gpu, name, found):
    def faked(asked):
        if asked == name and found is None:
            raise importlib.metadata.PackageNotFoundError(asked)
        return found if asked == name else REQUIRED[asked]

    monkeypatch.setattr(importlib.metadata, "version", faked)
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi" if has_gpu else None)
    wanted = [sys.executable, "-m", "pip", "install", "-q", "-r", str(ROOT / "requirements.txt")]
    assert install(ROOT) == [wanted + (["jax[cuda12]"] if has_gpu and name == "jax" else [])]


def test_outside_of_a_clone_the_error_is_one_line(install, tmp_path):
    with pytest.raises(SystemExit, match="clone the project and open notebooks/quickstart.ipynb from it") as stop:
        install(tmp_path)
    assert "\n" not in str(stop.value)


def test_failing_pip_is_reported(install, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0")
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no network\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match="^pip failed: ERROR: no network$"):
        install(ROOT)
