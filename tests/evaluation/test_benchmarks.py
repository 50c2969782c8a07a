"""The task files of configs/tasks, finding tasks, and what eval.py does with benchmarks."""

import json
import pathlib

import numpy as np
import pytest

import eval as evaluate
from mtp_jax.config import UserError
from mtp_jax.evaluation import benchmarks
from tests import real_data
from tests.commands import run_here
from tests.decoding.trained import train_small

lm_eval = pytest.importorskip("lm_eval")
HARNESS = pathlib.Path(lm_eval.__file__).parent / "tasks"

# task: (documents, chance of a guess or None)
SIZES = {
    **{"arc_easy": 2376, "arc_challenge": 1172, "hellaswag": 10_042, "piqa": 1838, "winogrande": 1267},
    **{"openbookqa": 500, "nq_open": 3610, "lambada_openai": 5153, "gsm8k": 1319, "wikitext": 62},
    **{"humaneval": 164, "mbpp": 500},
}
GROUPS = {"mmlu": (57, 14_042), "bbh": (27, 6511)}


@pytest.fixture(scope="module")
def workdir(small_workdir):
    return small_workdir


@pytest.fixture
def local_data(monkeypatch):
    folder = real_data.find("bench").parent
    monkeypatch.setenv("MTP_DATA_DIR", str(folder))
    return folder


def manager(*folders):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[str(f) for f in folders], include_defaults=False)


@pytest.fixture(scope="module")
def own():
    return manager(benchmarks.TASKS_FOLDER)


@pytest.mark.parametrize("name", SIZES)
def test_every_task_file_finds_its_documents(own, local_data, name):
    task = own.load([name])["tasks"][name]
    assert len(list(task.eval_docs)) == SIZES[name]


@pytest.mark.parametrize("name", GROUPS)
def test_every_group_finds_its_tasks(own, local_data, name):
    num_tasks, num_docs = GROUPS[name]
    tasks = own.load([name])["tasks"]
    assert (len(tasks), sum(len(list(task.eval_docs)) for task in tasks.values())) == (num_tasks, num_docs)


# What makes a figure comparable with one of the harness's own task.
SAME = (
    "output_type",
    "doc_to_text",
    "doc_to_target",
    "doc_to_choice",
    "description",
    "generation_kwargs",
    "target_delimiter",
)
DIFFERENT = {
    "hellaswag": {"doc_to_target"},  # the local file is processed already
    "bbh": {"doc_to_text", "description"},  # its three examples come from the prompt's file
}


def _plain(value):
    """Functions by name: theirs are named by the path of their file."""
    if isinstance(value, str) and value.rpartition(".")[2].isidentifier() and "/" in value:
        return value.rpartition(".")[2]
    return value


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        *((name, folder) for folder, names in {
            "arc": ["arc_easy", "arc_challenge"], "hellaswag": ["hellaswag"], "piqa": ["piqa"],
            "winogrande": ["winogrande"], "openbookqa": ["openbookqa"], "lambada": ["lambada_openai"],
            "nq_open": ["nq_open"], "gsm8k": ["gsm8k"], "wikitext": ["wikitext"],
            "mmlu/default": ["mmlu_anatomy", "mmlu_high_school_us_history"],
            "bbh/cot_fewshot": ["bbh_cot_fewshot_word_sorting"],
        }.items() for name in names),
    ],
)  # fmt: skip
def test_prompts_and_answers_are_the_harness_own(own, name, folder):
    ours, theirs = own.task_index[name].cfg, manager(HARNESS / folder).task_index[name].cfg
    for key in set(SAME) - DIFFERENT.get(name.split("_")[0], set()):
        a, b = (_plain(task.get(key, " " if key == "target_delimiter" else None)) for task in (ours, theirs))
        if isinstance(a, str) and isinstance(b, str):
            a, b = a.split(".")[-1].strip(), b.split(".")[-1].strip()
        assert a == b, key
    metrics = [
        {(m["metric"], m.get("ignore_case"), m.get("ignore_punctuation")) for m in t["metric_list"]}
        for t in (ours, theirs)
    ]
    assert metrics[0] == metrics[1]
    assert ours.get("filter_list") == theirs.get("filter_list")


def test_a_prompt_of_bbh_is_instruction_examples_and_question(own, local_data):
    """The same text as from the harness's own file, which has the examples in its yaml."""
    name = "bbh_cot_fewshot_word_sorting"
    task = own.load([name])["tasks"][name]
    doc = next(iter(task.eval_docs))
    prompt = task.doc_to_text(doc)
    theirs = manager(HARNESS / "bbh/cot_fewshot").task_index[name].cfg
    assert prompt.startswith(theirs["description"].strip()) and prompt.endswith("A: Let's think step by step.\n")
    for example in theirs["fewshot_config"]["samples"]:
        assert f"Q: {example['input']}\nA: Let's think step by step.\n{example['target']}" in prompt
    assert f"\n\nQ: {doc['input']}\nA:" in prompt and "canary" not in prompt


def run_eval(monkeypatch, capsys, *argv):
    code = run_here(monkeypatch, evaluate.main, *argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_eval_prints_a_table_and_writes_three_files(monkeypatch, capsys, tmp_path, workdir, local_data):
    output = tmp_path / "out.json"
    argv = [f"--workdir={workdir}", "--tasks=loss,arc_easy,mmlu_stem,lambada_openai", "--limit=3"]
    monkeypatch.delenv("MTP_DATA_DIR")
    code, out, err = run_eval(monkeypatch, capsys, *argv, f"--data_dir={local_data}", f"--output={output}")
    assert code == 0, err
    values = json.loads(output.read_text())
    assert set(values) == {"step", "loss", "benchmarks"}
    found = values["benchmarks"]
    assert found["arc_easy"]["num_docs"] == 3 and found["mmlu_stem"]["num_docs"] == 19 * 3
    assert found["mmlu_anatomy"]["group"] == "mmlu_stem" and found["mmlu_stem"]["group"] is None
    assert found["lambada_openai"]["main_metric"] == "acc"
    subjects = [v["metrics"]["acc"]["value"] for v in found.values() if v["group"] == "mmlu_stem"]
    assert found["mmlu_stem"]["metrics"]["acc"]["value"] == pytest.approx(np.mean(subjects))
    assert "arc_easy" in out and "mmlu_stem" in out and "mmlu_anatomy" not in out  # too many to list
    assert f"contexts were truncated to the model's {96} tokens" in out
    markdown = output.with_suffix(".md").read_text()
    assert "arc_easy" in markdown and "(out.png)" in markdown
    assert output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG" and not output.with_suffix(".partial").exists()


def test_what_was_found_has_the_step_it_was_found_at(monkeypatch, capsys, tmp_path, workdir, local_data):
    """With no task that reads held-out documents too: a report tells by it what is of an earlier step."""
    output = tmp_path / "out.json"
    run_eval(monkeypatch, capsys, f"--workdir={workdir}", "--tasks=arc_easy", "--limit=1", f"--output={output}")
    steps = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    assert json.loads(output.read_text())["step"] == max(steps)


# 1 of 4 and 1 of 5 choices in ARC: chance is the mean of one over their number.
@pytest.mark.parametrize(("task", "limit"), [("arc_easy", 400), ("hellaswag", 200), ("mmlu", 5)])
def test_a_random_model_scores_at_chance(monkeypatch, capsys, tmp_path, random_workdir, local_data, task, limit):
    output = tmp_path / "out.json"
    argv = [f"--workdir={random_workdir}", f"--tasks={task}", f"--limit={limit}", f"--output={output}"]
    code, _, err = run_eval(monkeypatch, capsys, *argv)
    assert code == 0, err
    found = json.loads(output.read_text())["benchmarks"][task]
    metrics = [m for name, m in found["metrics"].items() if name in ("acc", "acc_norm")]
    assert metrics
    for metric in metrics:
        assert abs(metric["value"] - 0.25) < 1.96 * metric["stderr"], metric


@pytest.fixture(scope="module")
def random_workdir(tmp_path_factory):
    """A model after one step at a learning rate of nothing."""
    folder = tmp_path_factory.mktemp("random")
    few = {"training.num_steps": 1, "optimizer.learning_rate": 1e-12, "checkpoint.every": 1, "mtp.kind": "none"}
    return train_small(folder, **few, **{"data.sequence_length": 768, "data.validation_fraction": 0.3})


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--tasks=arc_esy", "--data_dir={data}"], "--tasks=arc_esy: no such task; did you mean arc_easy?"),
        (["--tasks=loss,arc_easy", "--data_dir=/nowhere"], "MTP_DATA_DIR=/nowhere: is not a folder"),
        (["--tasks=arc_easy", "--data_dir={empty}"], "has no arc_easy_test.jsonl; put that file there"),
        (["--tasks=arc_easy", "--tasks_dir=/nowhere"], "--tasks_dir=/nowhere: no such folder"),
        (["--tasks=own", "--tasks_dir={empty}"], "--tasks=own: cannot be loaded (ImportError"),
        (["--tasks=arc_easy", "--data_dir={data}", "--num_fewshot=-1"], "--num_fewshot=-1: must be at least 0"),
        (["--tasks=arc_easy", "--data_dir={data}", "--samples=/nowhere/x"], "--samples=/nowhere/x: its folder"),
        (["--tasks=arc_easy", "--data_dir={data}", "--samples={empty}"], "is a folder; give a file"),
        (["--tasks=humaneval", "--data_dir={data}"], "humaneval: runs programs the model wrote; add --allow_code_exec"),
        (["--tasks=mmlu_anatomy,mmlu_stem", "--data_dir={data}"], "--tasks: lists mmlu_anatomy twice"),
        (["--tasks=arc_easy", "--data_dir={data}", "--num_fewshot=25"], "arc_easy has num_fewshot: 0 in its file"),
        (["--tasks=mmlu_anatomy", "--data_dir={data}", "--num_fewshot=6"], "has 5 examples; use at most 5"),
        (["--tasks=own", "--tasks_dir={beams}", "--data_dir={data}"], "--tasks=own: generation_kwargs: num_beams=4 is"),
        (["--tasks=arc_easy", "--output=x.txt"], "--output=x.txt: must end in .json"),
        (["--tasks=,"], "--tasks=,: is empty"),
    ],
)  # fmt: skip
def test_unusable_requests_are_one_line(monkeypatch, capsys, tmp_path, workdir, local_data, argv, says):
    monkeypatch.delenv("MTP_DATA_DIR")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "own.yaml").write_text(
        "task: own\ncustom_dataset: !function nowhere.dataset\noutput_type: generate_until\n"
    )
    beams = tmp_path / "beams"
    beams.mkdir()
    kwargs = "num_fewshot: 0\ngeneration_kwargs: {num_beams: 4, until: []}\n"
    (beams / "own.yaml").write_text(f"include: {benchmarks.TASKS_FOLDER}/gsm8k/gsm8k.yaml\ntask: own\n{kwargs}")
    argv = [a.format(data=local_data, empty=empty, beams=beams) for a in argv]
    code, out, err = run_eval(monkeypatch, capsys, f"--workdir={workdir}", *argv)
    lines = [line for line in err.splitlines() if line.strip()]
    assert (code, out, len(lines)) == (2, "", 1), err
    assert says in lines[0]


def test_a_machine_that_cannot_contain_programs_is_refused_before_any_are_written(
    monkeypatch, capsys, workdir, local_data
):
    def refused(programs):
        raise UserError("sandbox: not on this machine")

    monkeypatch.setattr(benchmarks.sandbox, "run_programs", refused)
    argv = ["--tasks=humaneval", "--allow_code_execution", "--check_only"]
    code, out, err = run_eval(monkeypatch, capsys, f"--workdir={workdir}", *argv)
    assert (code, out) == (2, "") and "not on this machine" in err


def test_examples_that_a_prompt_has_built_in_are_counted(own, local_data):
    config = own.task_index["bbh_cot_fewshot_word_sorting"].cfg
    assert benchmarks._num_fewshot(config, 0) == 3 and benchmarks._num_fewshot(config, 5) == 5
    assert benchmarks._num_fewshot(own.task_index["arc_easy"].cfg, 0) == 0


def test_without_the_harness_a_benchmark_names_what_to_install(monkeypatch, capsys, workdir):
    find = benchmarks.importlib.util.find_spec
    monkeypatch.setattr(
        benchmarks.importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a)
    )
    code, out, err = run_eval(monkeypatch, capsys, f"--workdir={workdir}", "--tasks=arc_easy")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "pip install 'lm_eval>=0.4.13,<0.5' (the extra eval)" in err
