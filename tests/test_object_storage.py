"""A run on gs:// from the first command to the last: trained, killed, resumed, evaluated, exported, imported."""

import itertools
import json
import subprocess
import time
import types

import numpy as np
import pytest

from mtp_jax import cli, storage
from mtp_jax.config import UserError, load_config
from mtp_jax.data.tokenizer import ByteTokenizer
from mtp_jax.evaluation import benchmarks, conventions, speculative
from mtp_jax.tools import convert, plan, report
from mtp_jax.training.metrics import read_metrics
from tests.commands import QUICK, ROOT, SMALL, command, finish, run_here, run_process, start_two

CONFIG = [
    *("--config=configs/tiny.py", *SMALL, "--config.data.source=synthetic", "--config.training.num_steps=12"),
    *("--config.checkpoint.every=4", "--config.model.num_experts=0", "--config.model.num_layers=2"),
]
STEPS = list(range(1, 13))


def rows(workdir):
    return read_metrics(storage.path(workdir) / "metrics.jsonl")


def losses(workdir):
    return [(row["step"], row["loss"]) for row in rows(workdir)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Losses of the same run on a local disk."""
    workdir = tmp_path_factory.mktemp("local") / "run"
    done = run_process("train.py", *CONFIG, f"--workdir={workdir}", env=QUICK)
    assert done.returncode == 0, done.stderr
    return losses(workdir)


def run(bucket, script, *argv):
    return run_process(script, *argv, env={**QUICK, **bucket.env})


def start(bucket, *argv):
    return subprocess.Popen(
        command("train.py", *argv),
        **{"cwd": ROOT, "env": {**QUICK, **bucket.env, "PYTHONUNBUFFERED": "1"}, "text": True},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_run_from_the_first_command_to_the_last(bucket, undisturbed, monkeypatch):
    workdir, hf = bucket.url + "/runs/a", bucket.url + "/hf"
    first = start(bucket, *CONFIG, f"--workdir={workdir}")
    for line in first.stdout:
        if line.startswith("step 6/"):
            first.kill()
            break
    first.communicate()
    for _ in range(2):  # the second has nothing left to do
        done = run(bucket, "train.py", *CONFIG, f"--workdir={workdir}")
        assert done.returncode == 0, done.stderr
        assert losses(workdir) == undisturbed  # exactly, no step missing or repeated
    assert "resumed  from step 12" in done.stdout
    names = set(storage.names(storage.path(workdir)))
    assert {"config.json", "data.json", "metrics.jsonl", "checkpoints"} <= names and "lease.json" not in names

    done = run(bucket, "eval.py", f"--workdir={workdir}", f"--output={workdir}/eval.json")
    assert done.returncode == 0, done.stderr
    assert storage.read_json(f"{workdir}/eval.json", "")["step"] == 12

    # The other tools in this process, which reads the bucket too.
    assert run_here(monkeypatch, report.main, f"--workdir={workdir}", f"--json={bucket.url}/report.json") == 0
    assert storage.read_bytes(f"{workdir}/report.png").startswith(b"\x89PNG")
    assert json.loads(storage.read_text(f"{bucket.url}/report.json"))

    imported = bucket.url + "/runs/imported"
    for argv in (
        ["export", f"--workdir={workdir}", f"--hf={hf}"],
        ["import", f"--hf={hf}", f"--workdir={imported}"],
        ["export", f"--workdir={imported}", f"--hf={hf}2"],
    ):
        assert run_here(monkeypatch, convert.main, *argv) == 0
    weights = [storage.read_bytes(f"{each}/model.safetensors") for each in (hf, hf + "2")]
    assert weights[0] == weights[1]
    assert not (ROOT / "gs:").exists()


def test_a_second_run_in_the_workdir_is_refused_at_its_start(bucket):
    workdir = bucket.url + "/run"
    endless = [*CONFIG, "--config.training.num_steps=100000", "--config.checkpoint.every=100000"]
    first = start(bucket, *endless, f"--workdir={workdir}")
    for line in first.stdout:
        if line.startswith("step 1/"):
            break
    second = run(bucket, "train.py", *endless, f"--workdir={workdir}")
    first.kill()
    first.communicate()
    lines = [line for line in second.stderr.splitlines() if line.startswith("error: ")]
    assert second.returncode == 2 and len(lines) == 1, second.stderr
    assert f"--workdir={workdir}: is in use by a run on host " in lines[0] and f"pid {first.pid}, since" in lines[0]


# Statuses are repeated by one rule (tests/test_storage.py), so one run has all of them; another run has
# connections closed before and after a request is carried out.
CLOSED = ("closed_before", "closed_after")


@pytest.mark.parametrize(
    "kinds",
    [("429", "500", "503"), ("timeout",), CLOSED, ("slow",)],
    ids=lambda kinds: kinds[0] if len(kinds) == 1 else "closed" if kinds == CLOSED else "status",
)
def test_faults_during_training_lose_nothing(bucket, undisturbed, kinds):
    workdir = bucket.url + "/run"
    matches = ("POST", "metrics", "checkpoints", "lease", "GET")
    # Both faults of a closed connection for each kind of request, one after the other.
    faults = (
        itertools.product(kinds, matches) if kinds == CLOSED else zip(itertools.cycle(kinds), matches, strict=False)
    )
    for kind, match in faults:
        bucket.inject(kind, match=match, times=2, skip=8 if kind == CLOSED[1] else 3, seconds=2)
    done = run(bucket, "train.py", *CONFIG, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert losses(workdir) == undisturbed
    assert "Traceback" not in done.stderr, done.stderr
    found = [fault for *_, fault in bucket.requests() if fault]
    assert len(found) >= 8 and (kinds != CLOSED or set(found) == set(CLOSED))


def test_two_processes_train_on_one_url(bucket, undisturbed):
    workdir = bucket.url + "/run"
    mesh = ["--config.mesh.fsdp=2", "--config.mesh.context=2"]
    results = finish(start_two("train.py", *CONFIG, *mesh, f"--workdir={workdir}", **bucket.env))
    assert [code for code, _ in results] == [0, 0], results
    for (step, loss), (wanted_step, wanted) in zip(losses(workdir), undisturbed, strict=True):
        assert step == wanted_step and loss == pytest.approx(wanted, rel=1e-4)
    assert "lease.json" not in storage.names(storage.path(workdir))
    started = time.monotonic()
    again = finish(start_two("train.py", *CONFIG, *mesh, f"--workdir={workdir}", **bucket.env))
    assert [code for code, _ in again] == [0, 0], (again, time.monotonic() - started)
    assert [row["step"] for row in rows(workdir)] == STEPS


def test_prompts_and_the_text_of_a_check_are_read(bucket, tmp_path):
    text = "def f(x):\n    return x\n" * 200
    storage.write_text(f"{bucket.url}/text.py", text)
    (tmp_path / "text.py").write_text(text)
    assert speculative.read_prompts(f"{bucket.url}/text.py") == text.splitlines()
    with pytest.raises(UserError, match="none.txt: no such file"):
        speculative.read_prompts(f"{bucket.url}/none.txt")
    config = load_config("configs/tiny.py", ["--config.model.vocab_size=264"])
    lm = types.SimpleNamespace(config=config, tokenizer=ByteTokenizer())
    local, found = (conventions._tokens(lm, f"{folder}/text.py") for folder in (tmp_path, bucket.url))
    np.testing.assert_array_equal(found, local)


def test_samples_and_the_json_of_a_plan_are_written(bucket, monkeypatch, capsys):
    cli.check_output("samples", f"{bucket.url}/out/samples.jsonl")
    assert bucket.objects() == {}
    benchmarks.write_samples(f"{bucket.url}/out/samples.jsonl", {"arc": [{"doc": 1}, {"doc": 2}]})
    lines = storage.read_text(f"{bucket.url}/out/samples.jsonl").splitlines()
    assert [json.loads(line) for line in lines] == [{"task": "arc", "doc": 1}, {"task": "arc", "doc": 2}]
    with pytest.raises(UserError, match="--json=.*: is a folder"):
        cli.check_output("json", f"{bucket.url}/out")
    output = f"{bucket.url}/plan.json"
    argv = ["--config=configs/tiny.py", "--topology=v9:2x2", f"--json={output}"]
    assert run_here(monkeypatch, plan.main, *argv) == 2 and "--topology=v9:2x2" in capsys.readouterr().err
    plan._write(output, {"fits": True})
    assert storage.read_json(output, "") == {"fits": True}
