"""Runs on a mixture of texts, chats and prompts, with validation sets of their own, from train.py to eval.py."""

import dataclasses
import json
import re

import jax
import pytest

import eval as eval_script
import train as train_script
from mtp_jax import data
from mtp_jax.config import ValidationConfig
from mtp_jax.mtp import kind_of
from mtp_jax.sharding import make_mesh
from mtp_jax.tools.planning.compile import abstract_batch
from mtp_jax.training.metrics import read_metrics
from mtp_jax.training.step import make_trainer
from mtp_jax.training.workdir import read_config
from tests.commands import SMALL, finish, run_here, start_two
from tests.conftest import use_one_device
from tests.data.chat_templates import CHATML, assistant, user
from tests.mtp.kinds import small

NUM_STEPS = 4
LOSSES = ("loss", "loss_main", "loss_mtp_1", "grad_norm")
DENSE = ["--config.model.num_experts=0", "--config.model.num_layers=2", "--config.mtp.depth=1"]
LONGER = ["--config.data.sequence_length=128"]  # than the conversations
CONFIG = """
from configs.tiny import get_config as tiny

def get_config():
    config = tiny()
    data = config.data
    data.source = "python_source"  # the default: a source beside a mixture is refused
    data.mixture = [
        dict(name="prose", source="text_files", files="{folder}/prose.txt", max_document_chars=100, weight=0.5),
        dict(name="chats", source="text_files", files="{folder}/chats.jsonl", records="chat", packing="whole",
             weight=0.25),
        dict(name="pairs", source="text_files", files="{folder}/pairs.jsonl", records="prompt", weight=0.25),
    ]
    data.validation = [
        dict(name="new_chats", source="text_files", files="{folder}/new.jsonl", records="chat", packing="whole"),
        dict(name="new_prose", source="text_files", files="{folder}/new.txt", max_document_chars=100),
    ]
    data.validation_fraction = 0.0
    data.chat_template = "{folder}/chatml.jinja"
    config.training.num_steps = {num_steps}
    config.training.eval_every = 2
    config.checkpoint.every = 2
    config.optimizer.schedule = "constant"
    return config
"""
NAMES = ("prose", "chats", "pairs")
SETS = ("new_chats", "new_prose")


def write_files(folder):
    """The sources, the sets, and the config that names them."""
    folder.mkdir(exist_ok=True)

    def lines(records):
        return "".join(json.dumps(record) + "\n" for record in records)

    def chats(word, num):
        return [{"messages": [user(f"{word} {i}?"), assistant(f"{i} {word}s")]} for i in range(num)]

    (folder / "prose.txt").write_text("\n\n".join(f"Text {i} is about {i * i} things." for i in range(60)))
    (folder / "new.txt").write_text("\n\n".join(f"Words {i} that are new." for i in range(60)))
    (folder / "chats.jsonl").write_text(lines(chats("apple", 24)))
    (folder / "new.jsonl").write_text(lines(chats("pear", 10)))
    (folder / "pairs.jsonl").write_text(lines({"prompt": f"{i} + 1 = ", "completion": str(i + 1)} for i in range(60)))
    (folder / "chatml.jinja").write_text(CHATML)
    (folder / "config.py").write_text(CONFIG.format(folder=folder, num_steps=NUM_STEPS))


def flags(folder, workdir, *overrides):
    return [f"--config={folder / 'config.py'}", f"--workdir={workdir}", *SMALL, *DENSE, *LONGER, *overrides]


def lines_of(workdir):
    return read_metrics(workdir / "metrics.jsonl")


@pytest.fixture(scope="module", autouse=True)
def one_device_for_all():
    with pytest.MonkeyPatch.context() as patch:
        use_one_device(patch)
        yield


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """(folder of the files, workdir) of a run without an interruption."""
    folder, workdir = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("straight") / "run"
    write_files(folder)
    with pytest.MonkeyPatch.context() as patch:
        assert run_here(patch, train_script.main, *flags(folder, workdir)) == 0
    return folder, workdir


def test_metrics_hold_the_shares_of_the_sources_and_every_set(straight):
    lines = lines_of(straight[1])
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    for line in lines:
        shares = [line[f"data_share_{name}"] for name in NAMES]
        assert shares == [0.5, 0.25, 0.25]  # 4, 2 and 2 rows of 8
        assert all(line[f"data_epochs_{name}"] > 0 for name in NAMES)
        assert 0 < min(line[name] for name in LOSSES)
        found = {name for name in line if name.startswith("validation_")}
        expected = {f"validation_{name}_{loss}" for name in SETS for loss in ("loss_main", "loss_mtp_1")}
        assert (expected <= found) if line["step"] % 2 == 0 else not found
    assert lines[1]["data_epochs_chats"] == 2 * lines[0]["data_epochs_chats"]


def test_an_interrupted_run_continues_in_the_same_data(straight, tmp_path, monkeypatch):
    folder, workdir = straight
    for num_steps in (2, NUM_STEPS):
        argv = flags(folder, tmp_path / "run", f"--config.training.num_steps={num_steps}")
        assert run_here(monkeypatch, train_script.main, *argv) == 0
    for found, expected in zip(lines_of(tmp_path / "run"), lines_of(workdir), strict=True):
        names = [name for name in expected if name.startswith(("loss", "data_", "validation_"))]
        assert {name: found[name] for name in names} == {name: expected[name] for name in names}


def test_eval_reports_every_set(straight, tmp_path, monkeypatch, capsys):
    folder, workdir = straight
    output = tmp_path / "loss.json"
    argv = [f"--workdir={workdir}", "--tasks=loss", "--limit=1", f"--output={output}"]
    assert run_here(monkeypatch, eval_script.main, *argv) == 0
    printed, values = capsys.readouterr().out, json.loads(output.read_text())
    last = lines_of(workdir)[-1]
    assert list(values["validation"]) == list(SETS) and "loss" not in values
    for name in SETS:
        depths = values["validation"][name]["loss"]
        assert list(depths) == ["main", "mtp_1"]
        for depth, value in depths.items():
            assert value["loss"] == pytest.approx(last[f"validation_{name}_loss_{depth}"], rel=1e-6)
        table = printed[printed.index(f"tokens of {name}") :]
        assert re.search(rf"^main +{depths['main']['loss']:.3f} ", table, re.MULTILINE)


def test_the_final_table_names_the_sets(straight, tmp_path, monkeypatch, capsys):
    """Of a run that has ended, which the same command continues for no step."""
    assert run_here(monkeypatch, train_script.main, *flags(*straight)) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^validation, [\d,]+ tokens of (\w+)$", printed, re.MULTILINE) == list(SETS)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.data.mixture[1].weight=9", "data.mixture[1].weight was 0.25 and is 9.0"),
        ("--config.data.mixture[2].packing=whole", "data.mixture[2].packing was 'packed' and is 'whole'"),
        ("--config.data.validation[0].packing=packed", "data.validation[0].packing was 'whole' and is 'packed'"),
    ],
)
def test_a_resume_with_another_mixture_is_refused_by_the_key(straight, monkeypatch, capsys, override, words):
    assert run_here(monkeypatch, train_script.main, *flags(*straight, override)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_resume_with_another_file_is_refused_by_the_source(straight, monkeypatch, capsys):
    folder, workdir = straight
    file = folder / "pairs.jsonl"
    before = file.read_text()
    file.write_text(before + '{"prompt": "1 + ", "completion": "1 = 2"}\n')
    try:
        assert run_here(monkeypatch, train_script.main, *flags(folder, workdir)) == 2
    finally:
        file.write_text(before)
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds a run on other data: the text of pairs (text_files) was 60 documents" in line


def test_two_processes_read_one_mixture(straight, tmp_path):
    folder, workdir = straight
    # One axis: with two, gloo's collectives of both can wait for each other where there are few cores.
    overrides = ["--config.training.num_steps=2", "--config.mesh.data=4"]
    results = finish(start_two("train.py", *flags(folder, tmp_path / "run", *overrides)))
    assert [code for code, _ in results] == [0, 0], results
    for found, expected in zip(lines_of(tmp_path / "run"), lines_of(workdir)[:2], strict=True):
        for name in LOSSES:
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name
        for name in (name for name in expected if name.startswith(("data_", "validation_"))):
            assert found[name] == pytest.approx(expected[name], rel=1e-3), name


def traced(config):
    """(abstract batch, the step as text without addresses)."""
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        trainer = make_trainer(config, mesh)
        batch = abstract_batch(config, trainer)
        return batch, re.sub("0x[0-9a-f]+", "", str(trainer.step.trace(trainer.abstract_state, batch).jaxpr))


def test_a_plan_has_the_batch_of_the_run(straight):
    config = read_config(straight[1])
    planned, _ = traced(config)
    batch = data.prepare(config, kind_of(config).lookahead).batches("train").batch_at(0)
    assert "loss_mask" in batch
    assert {n: (x.shape, x.dtype) for n, x in planned.items()} == {n: (x.shape, x.dtype) for n, x in batch.items()}


def test_a_packed_validation_set_leaves_contiguous_training_as_it_is():
    config = small("--config.model.num_experts=0", "--config.data.packing=contiguous")
    packed = dataclasses.replace(config.data, validation=(ValidationConfig(name="new", packing="packed"),))
    alone = traced(config)[1]
    assert traced(dataclasses.replace(config, data=packed))[1] == alone
    assert traced(dataclasses.replace(config, data=dataclasses.replace(config.data, packing="packed")))[1] != alone
