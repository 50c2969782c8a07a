"""The experiments: their configs can be used, their data is what it says, and their results are there."""

import importlib.util
import itertools
import json
import os
import subprocess

import pytest

from mtp_jax.config import load_config, validate
from tests.conftest import ROOT

FOLDERS = sorted(path.parent for path in (ROOT / "experiments").glob("*/run.sh"))


@pytest.fixture(scope="module")
def graphs():
    spec = importlib.util.spec_from_file_location("graphs", ROOT / "experiments/star_graph/graphs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_configs_can_be_used_and_results_are_there(folder):
    config = load_config(str(folder / "config.py"))
    validate(config, 1, 261)
    results = json.loads((folder / "results" / "table.json").read_text())
    if "tools.sweep" in (folder / "run.sh").read_text():
        assert all(run["state"] == "done" and run["evaluation"] for run in results["runs"])
        longest = max(run["last"]["step"] for run in results["runs"])
        assert longest == config.training.num_steps  # not of an older config
    assert results
    text = (folder / "README.md").read_text()
    assert "results/curves.png" in text and "Obtained" in text and "Expected" in text


def test_run_scripts_are_shell():
    for folder in FOLDERS:
        subprocess.run(["bash", "-n", str(folder / "run.sh")], check=True)
        assert os.access(folder / "run.sh", os.X_OK)


def test_a_star_graph_has_one_answer(graphs):
    """The path's edges are all there, it begins and ends as asked, and the other arm would be another answer."""
    for question, path, _ in itertools.islice(graphs.graphs(), 300):
        edges, ends = question.removesuffix("=").split("/")
        edges = edges.split("|")
        assert len(edges) == len(set(edges)) == 4 and all(a + b in edges for a, b in itertools.pairwise(path))
        assert path[0] + path[-1] == ends and len(set("".join(edges))) == 5
        assert sum(edge[0] == path[0] for edge in edges) == 2  # two ways to go from the centre


def test_no_test_question_is_in_the_training_data(graphs, tmp_path):
    pytest.importorskip("datasets")
    graphs.write(tmp_path, 3000)
    trained = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    held_out = graphs.test_set(version=1)["test"]["question"][:]
    assert len(trained) == 3000 and len(set(held_out)) == len(held_out) == 500
    assert not {each["prompt"] for each in trained} & set(held_out)
    assert {len(each["prompt"] + each["completion"]) for each in trained} == {
        18
    }  # with bos and eos a row of the config
