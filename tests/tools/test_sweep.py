"""The sweep command: which runs it has, that each is done once whatever happens, and its one-line errors."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mtp_jax.config import load_config
from mtp_jax.evaluation import decode_tasks
from mtp_jax.tools import report, sweep
from mtp_jax.tools.sweeping import children, run_folder
from mtp_jax.tools.sweeping.grid import expand, parse_over
from mtp_jax.tools.sweeping.runner import Commands, Runner, RunsFailed, Stopped
from mtp_jax.training.metrics import read_metrics
from tests.commands import CPU, QUICK, SMALL, command, run_here
from tests.conftest import ROOT

TINY = "configs/tiny.py"
DENSE = [*SMALL, "--config.model.num_experts=0"]


def names(*overs, fixed=()):
    return [run.name for run in expand(TINY, list(fixed), list(overs))]


# ---------------------------------------------------------------------------------------------------------------
# Which runs


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("seed=0", [{"seed": "0"}]),
        ("mtp.kind=none, parallel", [{"mtp.kind": "none"}, {"mtp.kind": "parallel"}]),
        ("mtp.weight_values=(0.3,0.1),(0.1,)", [{"mtp.weight_values": "(0.3,0.1)"}, {"mtp.weight_values": "(0.1,)"}]),
        ("data.files='a,b/*.txt',c", [{"data.files": "a,b/*.txt"}, {"data.files": "c"}]),
        ("init_from='',run=1", [{"init_from": ""}, {"init_from": "run=1"}]),
        ("training.sample_prompt=don't", [{"training.sample_prompt": "don't"}]),
        (
            "mtp.kind,mtp.depth=(none,1),(parallel, 3)",
            [{"mtp.kind": "none", "mtp.depth": "1"}, {"mtp.kind": "parallel", "mtp.depth": "3"}],
        ),
        (
            "seed, mtp.weight_values = (0,(0.3,0.1)), ('1',())",
            [{"seed": "0", "mtp.weight_values": "(0.3,0.1)"}, {"seed": "1", "mtp.weight_values": "()"}],
        ),
    ],
)
def test_what_an_over_goes_through(text, settings):
    assert parse_over(text) == settings


def test_overs_multiply_and_the_last_varies_fastest():
    assert names("mtp.kind,mtp.depth=(parallel,1),(sequential,2)", "seed=0,1") == [
        *("kind=parallel,depth=1,seed=0", "kind=parallel,depth=1,seed=1"),
        *("kind=sequential,depth=2,seed=0", "kind=sequential,depth=2,seed=1"),
    ]


def test_a_run_is_what_train_py_makes_of_its_overrides():
    fixed = ["--config.training.num_steps=7"]
    (_, run) = expand(TINY, fixed, ["mtp.weight_values,mtp.weight_boundaries=((),()),((0.2,0.1),(0,5))"])
    assert run.overrides == (*fixed, "--config.mtp.weight_values=(0.2,0.1)", "--config.mtp.weight_boundaries=(0,5)")
    assert run.config == load_config(TINY, run.overrides)
    assert (run.config.mtp.weight_values, run.config.training.num_steps) == ((0.2, 0.1), 7)
    assert run.name == "weight_values=0.2_0.1,weight_boundaries=0_5"


def test_the_baseline_is_run_once_however_deep_the_others_are():
    assert names("mtp.depth=1,2", "mtp.kind=none,sequential", "seed=0,1") == [
        *("kind=none,seed=0", "kind=none,seed=1", "depth=1,kind=sequential,seed=0", "depth=1,kind=sequential,seed=1"),
        *("depth=2,kind=sequential,seed=0", "depth=2,kind=sequential,seed=1"),
    ]
    (first, *_) = expand(TINY, [], ["mtp.depth=1,2", "mtp.kind=none,sequential"])
    assert first.overrides == ("--config.mtp.kind=none",)  # not the depth of whichever came first


def test_names_are_short_safe_and_tell_apart():
    assert names("optimizer.learning_rate=1e-3,3e-4") == ["learning_rate=0.001", "learning_rate=0.0003"]
    assert names("mtp.detach_decoder=true", "mtp.weight=None") == ["detach_decoder=true,weight=none"]
    # Keys of one last part are written out; a text that is no file name gets a digest of what was lost.
    found = names("model.init_std=0.1", "optimizer.name=muon", "data.files=a/b,a_b,a//b,''")
    assert [n.split(",", 2)[:2] for n in found] == [["init_std=0.1", "name=muon"]] * 4
    files = [n.split("files=")[1] for n in found]
    assert files[1] == "a_b" and files[3] == "empty" and len(set(files)) == 4
    assert files[0].startswith("a_b-") and files[2].startswith("a_b-")
    (long,) = names(f"data.files={'x/' * 3000}", f"training.sample_prompt={'y' * 3000}")
    assert len(long) < 255 and "/" not in long
    same_ends = [f"{'p' * n}{'tail' * 20}" for n in (1, 2)]
    assert len(set(names(f"data.files={','.join(same_ends)}"))) == 2


@pytest.fixture
def no_processes(monkeypatch):
    """Answers of other processes before the sweep starts: one CPU device, and an eval.py without an error."""
    monkeypatch.setattr(children, "devices", lambda: ("cpu", 1))
    monkeypatch.setattr(children, "check_evaluation", lambda *_: None)
    for name in ("ID", "COUNT", "MIN", "STEP"):
        monkeypatch.delenv(f"SLURM_ARRAY_TASK_{name}", raising=False)


OVER = ["--over=mtp.kind=none,sequential", "--over=seed=0,1,2"]


def listed(monkeypatch, capfd, tmp_path, *argv):
    command_line = [f"--config={TINY}", f"--workdir={tmp_path / 'sweep'}", *OVER, "--dry_run", *argv]
    assert run_here(monkeypatch, sweep.main, *command_line) == 0
    assert not (tmp_path / "sweep").exists()
    head, *lines = capfd.readouterr().out.splitlines()
    assert head.startswith("6 runs")
    return [line.strip() for line in lines]


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize("num", [1, 2, 4, 7])
def test_shares_are_all_runs_once(num, monkeypatch, capfd, tmp_path):
    everything = listed(monkeypatch, capfd, tmp_path)
    shares = [listed(monkeypatch, capfd, tmp_path, f"--share={i}/{num}") for i in range(num)]
    assert len(everything) == 6 and sorted(sum(shares, [])) == sorted(everything)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.usefixtures("no_processes")
def test_the_tasks_of_a_slurm_array_share(monkeypatch, capfd, tmp_path):
    everything, shares = listed(monkeypatch, capfd, tmp_path), []
    for name, value in {"COUNT": 3, "MIN": 10, "STEP": 5}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    for task in (10, 15, 20):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        shares += listed(monkeypatch, capfd, tmp_path)
    assert sorted(shares) == sorted(everything)
    assert listed(monkeypatch, capfd, tmp_path, "--share=0/1") == everything


# arguments beside --config and --workdir -> what the line must name
UNUSABLE = {
    "no over": ([], ["--over"]),
    "unknown key": (["--over=mtp.depht=1,2"], ["mtp.depht", "did you mean mtp.depth?"]),
    "unknown fixed key": ([*OVER, "--config.sed=1"], ["sed:", "did you mean seed?"]),
    "ill-typed value": (["--over=mtp.depth=1,two"], ["mtp.depth='two'", "type int"]),
    "bad choice": (["--over=mtp.kind=none,serial"], ["mtp.kind='serial'"]),
    "cannot run": (["--over=mtp.depth=1,99"], ["mtp.depth=99", "between 1 and 16", "(in depth=99)"]),
    "no values": (["--over=mtp.depth"], ["--over=mtp.depth", "KEY=VALUE"]),
    "empty value": (["--over=seed=0,,1"], ["--over=seed=0,,1", "empty value"]),
    "trailing comma": (["--over=seed=0,"], ["--over=seed=0,", "empty value"]),
    "nothing": (["--over=seed="], ["--over=seed=", "empty value"]),
    "no key": (["--over==1"], ["--over==1", "KEY=VALUE"]),
    "open": (["--over=mtp.weight_values=(1,2"], ["do not match"]),
    "closed": (["--over=mtp.weight_values=1),(2"], ["do not match"]),
    "too few": (["--over=mtp.kind,mtp.depth=(none,1),(parallel)"], ["(parallel)", "mtp.kind,mtp.depth"]),
    "no parentheses": (["--over=mtp.kind,mtp.depth=none,1"], ["none is not", "KEY,KEY=(VALUE,VALUE)"]),
    "a value twice": (["--over=seed=0,1,0"], ["seed=0 twice"]),
    "a value twice, otherwise": (["--over=optimizer.learning_rate=1e-3,0.001"], ["learning_rate=0.001 twice"]),
    "a key twice": (["--over=seed=0,1", "--over=seed=2"], ["varies seed twice"]),
    "fixed and swept": ([*OVER, "--config.seed=3"], ["--config.seed=3", "in one place"]),
    "share": ([*OVER, "--share=1"], ["--share=1", "as in --share=0/4"]),
    "share beyond": ([*OVER, "--share=4/4"], ["--share=4/4", "from 0 to N - 1"]),
    "share of none": ([*OVER, "--share=0/0"], ["--share=0/0"]),
    "negative share": ([*OVER, "--share=-1/2"], ["--share=-1/2"]),
    "no jobs": ([*OVER, "--jobs=0"], ["--jobs=0", "at least 1"]),
    "jobs": ([*OVER, "--jobs=100000"], ["--jobs=100000", "cores"]),
    "no tasks": ([*OVER, "--tasks="], ["--tasks="]),
    "a flag of the sweep": ([*OVER, "--eval.output=x.json"], ["--eval.output=x.json", "the sweep sets it"]),
    "unknown flag": ([*OVER, "--limit=3"], ["--limit=3"]),
    "no such config": ([*OVER, "--config=none.py"], ["--config=none.py", "no such file"]),
    "a file for a folder": ([*OVER, "--workdir=configs/tiny.py"], ["--workdir=configs/tiny.py", "is a file"]),
}


def refused(monkeypatch, capfd, tmp_path, argv):
    """The one line on stderr of a sweep that must not start."""
    before = sorted(tmp_path.rglob("*"))
    code = run_here(monkeypatch, sweep.main, f"--config={TINY}", f"--workdir={tmp_path / 'sweep'}", *argv)
    printed = capfd.readouterr()
    assert (code, printed.out) == (2, ""), printed
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ") and sorted(tmp_path.rglob("*")) == before
    return line


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize("name", UNUSABLE)
def test_a_sweep_that_cannot_be_run(name, monkeypatch, capfd, tmp_path):
    argv, expected = UNUSABLE[name]
    line = refused(monkeypatch, capfd, tmp_path, argv)
    for part in expected:
        assert part in line


@pytest.mark.usefixtures("no_processes")
def test_a_gap_in_a_slurm_array_is_refused(monkeypatch, capfd, tmp_path):
    for name, value in {"ID": 7, "COUNT": 3, "MIN": 1}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert "has gaps" in refused(monkeypatch, capfd, tmp_path, OVER)


@pytest.mark.usefixtures("no_processes")
def test_several_jobs_are_refused_on_accelerators(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(children, "devices", lambda: ("gpu", 8))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    line = refused(monkeypatch, capfd, tmp_path, [*OVER, "--jobs=2", "--config.data.batch_size=8"])
    assert "8 x gpu" in line and "--share=I/N" in line


@pytest.mark.usefixtures("no_processes")
def test_the_folder_of_another_run_is_refused(monkeypatch, capfd, tmp_path):
    from mtp_jax.training.workdir import open_workdir

    config = load_config(TINY, ["--config.seed=1", "--config.model.vocab_size=264", "--config.training.num_steps=3"])
    open_workdir(tmp_path / "sweep" / "seed=1", config)
    line = refused(monkeypatch, capfd, tmp_path, ["--over=seed=0,1", "--config.model.ffn_dim=64"])
    assert "seed=1" in line and "model.ffn_dim was 128 and is 64" in line and "vocab_size" not in line
    argv = [f"--config={TINY}", f"--workdir={tmp_path / 'sweep'}", "--over=seed=0,1", "--dry_run"]
    assert run_here(monkeypatch, sweep.main, *argv) == 0  # the same run: it may go on


def test_eval_looks_at_its_flags_before_anything_is_trained(monkeypatch, capfd, tmp_path):
    """Refused for the value because the task reads the flag; of the default tasks none does."""
    monkeypatch.setattr(children, "devices", lambda: ("cpu", 1))
    argv = [*OVER, "--tasks=speculative", "--eval.num_speculative_tokens=0"]
    line = refused(monkeypatch, capfd, tmp_path, argv)
    assert "--num_speculative_tokens=0: must be at least 1 (from eval.py)" in line


def test_commands_import_this_package_from_any_folder(tmp_path, monkeypatch):
    """Commands of a sweep, where the current folder has another package of that name."""
    (tmp_path / "mtp_jax").mkdir()
    (tmp_path / "mtp_jax" / "__init__.py").write_text("raise SystemExit('another package')\n")
    monkeypatch.chdir(tmp_path)
    line, options = children.command("train.py", ["--help"]), {"capture_output": True, "text": True}
    assert subprocess.run(line, **options).stderr.strip() == "another package"
    done = subprocess.run(line, env=children.environment(), **options)
    assert done.returncode == 0 and "--workdir" in done.stdout, done.stderr


def test_devices_are_those_a_run_will_find(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    assert children.devices() == ("cpu", 3)


# ---------------------------------------------------------------------------------------------------------------
# Working them off, with short scripts in the place of train.py and eval.py

TRAIN = "import pathlib, sys; pathlib.Path(sys.argv[1], 'times').open('a').write('train ')"
EVALUATE = TRAIN.replace("train ", "eval ") + "; pathlib.Path(sys.argv[1], 'eval.json').write_text('{}')"


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """A Runner of `num` runs whose commands are Python one-liners; code(script, run number) -> source."""
    runs = expand(TINY, [], ["seed=0,1,2,3"])

    def make(num=4, code=lambda script, _: TRAIN if script == "train.py" else EVALUATE, cores=(None,)):
        def line(self, script, run):
            return [sys.executable, "-c", code(script, run.config.seed), str(self.folder(run))]

        monkeypatch.setattr(Commands, "line", line)
        run_folder.prepare(tmp_path, runs[:num])
        return Runner(Commands(TINY, tmp_path, ["loss"], []), runs[:num], list(cores))

    return make


def times(tmp_path):
    return [path.read_text().split() for path in sorted(tmp_path.glob("*/times"))]


def test_each_command_runs_once_and_again_only_where_something_is_missing(scripted, tmp_path, capfd):
    scripted().run()
    assert times(tmp_path) == [["train", "eval"]] * 4
    (tmp_path / "seed=1" / "eval.json").unlink()
    record = run_folder.read_record(tmp_path / "seed=2")
    run_folder.write_record(tmp_path / "seed=2", record | {"trained": 3})  # of an earlier, shorter run
    scripted().run()
    both = ["train", "eval"]
    assert times(tmp_path) == [both, [*both, "eval"], both * 2, both]
    assert "4 runs: 4 done (2 before)" in capfd.readouterr().out


def test_other_tasks_evaluate_again_without_training(scripted, tmp_path):
    scripted(1).run()
    runner = scripted(1)
    runner.commands.tasks.append("advice")
    runner.run()
    assert times(tmp_path) == [["train", "eval", "eval"]]


def test_a_model_without_depths_is_not_asked_to_draft(tmp_path):
    runs = expand(TINY, [], ["mtp.kind=none,parallel"])
    commands = Commands(TINY, tmp_path, ["loss", "speculative", "advice"], ["--limit=2"])
    assert commands.evaluation(runs[0]) == ["--tasks=loss", "--limit=2"]
    assert commands.evaluation(runs[1]) == ["--tasks=loss,speculative,advice", "--limit=2"]
    assert Commands(TINY, tmp_path, ["speculative"], []).evaluation(runs[0]) == []
    flags = ["--limit=2", *(f"--{name}=1" for name in decode_tasks.OWN_FLAGS)]  # refused where none drafts
    commands = Commands(TINY, tmp_path, ["loss", "speculative"], flags)
    assert commands.evaluation(runs[0]) == ["--tasks=loss", "--limit=2"]
    assert commands.evaluation(runs[1]) == ["--tasks=loss,speculative", *flags]
    for flags, kept in ((["--num_speculative_tokens=2"], []), (["--speculative", "--num_speculative_tokens=2"],) * 2):
        commands = Commands(TINY, tmp_path, ["gsm8k", "speculative"], flags)
        assert commands.evaluation(runs[0]) == ["--tasks=gsm8k", *kept]


def test_a_failure_is_told_with_its_line_and_the_rest_goes_on(scripted, tmp_path, capfd):
    failing = {
        ("train.py", 1): "import sys; print('first'); sys.exit('error: no memory\\nlast')",
        ("eval.py", 2): "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    }
    usual = {"train.py": TRAIN, "eval.py": EVALUATE}
    with pytest.raises(RunsFailed, match="2 of 4 runs failed: seed=1, seed=2") as error:
        scripted(code=lambda script, seed: failing.get((script, seed), usual[script])).run()
    assert "\n" not in str(error.value)
    out = capfd.readouterr().out
    assert f": no memory ({tmp_path / 'seed=1' / 'log.txt'})" in out
    assert "eval.py failed" in out and "killed by SIGKILL" in out and "2 done, 2 failed" in out
    assert run_folder.read_record(tmp_path / "seed=1")["error"] == "train.py: no memory"
    assert times(tmp_path) == [["train", "eval"], ["train"], ["train", "eval"]]
    scripted().run()  # tries again what failed, and only that
    assert times(tmp_path) == [["train", "eval"]] * 4
    assert "error" not in run_folder.read_record(tmp_path / "seed=1")


def test_a_run_that_another_sweep_is_at_is_waited_for_and_not_done_twice(scripted, tmp_path, capfd):
    runner = scripted(2)
    other = run_folder.try_lock(tmp_path / "seed=0")
    assert run_folder.try_lock(tmp_path / "seed=0") is None
    say = runner._say

    def release(number, run, text):
        say(number, run, text)
        if run.name == "seed=1" and text.startswith("done"):
            other.release()

    runner._say = release
    runner.run()
    out = capfd.readouterr().out.splitlines()
    assert out[0] == "[1/2] seed=0: another sweep is at it; waiting for its end"
    assert [line.split(": ")[0] for line in out[1:5]] == ["[2/2] seed=1"] * 2 + ["[1/2] seed=0"] * 2
    assert times(tmp_path) == [["train", "eval"]] * 2


def test_two_sweeps_in_one_folder_share_the_work(tmp_path):
    code = (
        "import sys; from mtp_jax.tools.sweeping import run_folder, runner, grid; import pathlib\n"
        f"runs, root = grid.expand({TINY!r}, [], ['seed=0,1,2,3']), pathlib.Path({str(tmp_path)!r})\n"
        f"slow = 'import time; time.sleep(0.5);' + {TRAIN!r}\n"
        f"code = lambda script: slow if script == 'train.py' else {EVALUATE!r}\n"
        "line = lambda self, script, run: [sys.executable, '-c', code(script), str(root / run.name)]\n"
        "runner.Commands.line = line; run_folder.prepare(root, runs)\n"
        f"runner.Runner(runner.Commands({TINY!r}, root, ['loss'], []), runs, [None]).run()\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=CPU) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert times(tmp_path) == [["train", "eval"]] * 4


def test_jobs_run_at_a_time_each_on_its_cores(scripted, tmp_path, monkeypatch):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    cores = children.shares_of_cores(2)
    assert not cores[0] & cores[1] and cores[0] | cores[1] == os.sched_getaffinity(0)
    meet = (
        "import os, pathlib, sys, time; here = pathlib.Path(sys.argv[1])\n"
        "(here / 'cores').write_text(','.join(map(str, sorted(os.sched_getaffinity(0)))))\n"
        "end = time.monotonic() + 30\n"
        "while len(list(here.parent.glob('*/cores'))) < 2: assert time.monotonic() < end; time.sleep(0.01)\n"
    )
    scripted(2, lambda script, _: meet if script == "train.py" else EVALUATE, cores).run()
    found = {frozenset(map(int, path.read_text().split(","))) for path in tmp_path.glob("*/cores")}
    assert found == set(cores)


def test_a_signal_ends_the_children_and_the_rest_is_left(scripted, tmp_path, capfd):
    wait = (
        "import os, pathlib, signal, sys, time\n"
        "def save(*_): pathlib.Path(sys.argv[1], 'saved').touch(); sys.exit(1)\n"
        f"signal.signal(signal.SIGTERM, save); os.kill({os.getpid()}, signal.SIGTERM); time.sleep(60)\n"
    )
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped):
        scripted(code=lambda *_: wait).run()
    assert (tmp_path / "seed=0" / "saved").exists() and not (tmp_path / "seed=1" / "log.txt").exists()
    out = capfd.readouterr().out
    assert "seed=0: train.py stopped" in out and "4 runs: 4 left" in out
    assert signal.getsignal(signal.SIGTERM) is before
    assert "error" not in run_folder.read_record(tmp_path / "seed=0")
    run_folder.try_lock(tmp_path / "seed=0").release()


def test_a_run_that_was_trained_but_not_evaluated_when_a_signal_came_is_left(scripted, tmp_path, capfd):
    train = f"{TRAIN}; import os, signal, time; os.kill({os.getpid()}, signal.SIGTERM); time.sleep(0.1)"
    train = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {train}"  # and ends well
    with pytest.raises(Stopped):
        scripted(1, lambda *_: train).run()
    assert "1 run: 1 left" in capfd.readouterr().out and times(tmp_path) == [["train"]]
    scripted(1).run()
    assert times(tmp_path) == [["train", "eval"]]


def test_a_second_signal_does_not_wait(scripted):
    stubborn = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"for _ in range(2): os.kill({os.getpid()}, signal.SIGTERM); time.sleep(1)\n"
        "time.sleep(60)\n"
    )
    started = time.monotonic()
    with pytest.raises(Stopped):
        scripted(1, lambda *_: stubborn).run()
    assert time.monotonic() - started < 30


# ---------------------------------------------------------------------------------------------------------------
# Real runs


def swept(tmp_path, *argv):
    return [f"--config={TINY}", f"--workdir={tmp_path}", *DENSE, "--config.model.num_layers=2", "--eval.limit=1", *argv]


@pytest.fixture
def quick_children(monkeypatch):
    """The commands of a sweep in this process are compiled quickly, for one device."""
    for name in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS"):
        monkeypatch.setenv(name, QUICK[name])


def check_report(monkeypatch, capfd, tmp_path, losses):
    """tools.report reads what the sweep has written."""
    values = tmp_path / "values.json"
    assert run_here(monkeypatch, report.main, f"--sweep={tmp_path}", f"--json={values}") == 0
    assert capfd.readouterr().err == ""
    baseline, sequential, failed = variants = json.loads(values.read_text())["variants"]
    labels = ["none, init_from", "sequential, depth 1, init_from", "sequential, depth 2, init_from nowhere"]
    assert [variant["label"].strip() for variant in variants] == labels and failed["measures"] == {}
    for variant, loss in zip((baseline, sequential), losses, strict=True):
        assert variant["measures"]["loss_main"]["mean"] == pytest.approx(loss)
    assert sequential["measures"]["speed_up"]["n"] == 1 and "speed_up" not in baseline["measures"]
    assert sequential["measures"]["peak_memory_gib"]["mean"] > 0.1


@pytest.mark.usefixtures("quick_children")
def test_a_sweep_trains_and_evaluates_and_a_run_that_fails_does_not_end_the_rest(monkeypatch, capfd, tmp_path):
    over = "--over=mtp.kind,mtp.depth,init_from=(none,1,''),(sequential,1,''),(sequential,2,nowhere)"
    argv = [over, "--over=seed=3", "--config.training.num_steps=3"]
    argv += ["--tasks=loss,acceptance,speculative", "--eval.max_new_tokens=4"]
    argv += ["--jobs=2"] if len(os.sched_getaffinity(0)) > 1 else []
    for num_before in (0, 2):  # again: what failed, and only that
        assert run_here(monkeypatch, sweep.main, *swept(tmp_path, *argv)) == 1
        printed = capfd.readouterr()
        (line,) = printed.err.splitlines()
        assert line.startswith("error: 1 of 3 runs failed: kind=sequential,depth=2,")
        failed = next(line for line in printed.out.splitlines() if "train.py failed" in line)
        assert "init_from=nowhere: " in failed and failed.endswith("/log.txt)")
        assert printed.out.count("was done before") == num_before and "3 runs: 2 done" in printed.out
    found = {path.parent.name.split(",")[0]: path.parent for path in sorted(tmp_path.glob("*/eval.json"))}
    assert list(found) == ["kind=none", "kind=sequential"]
    losses = []
    for name, path in found.items():
        results = json.loads((path / "eval.json").read_text())
        assert results["step"] == 3 and ("speculative" in results) == (name == "kind=sequential")
        assert [row["step"] for row in read_metrics(path / "metrics.jsonl")] == [1, 2, 3]
        config = json.loads((path / "config.json").read_text())
        assert name == f"kind={config['mtp']['kind']}" and config["seed"] == 3
        losses.append(results["loss"]["main"]["loss"])
    assert losses[0] != losses[1]
    check_report(monkeypatch, capfd, tmp_path, losses)


def wait_for_step(run, step, process):
    """Until the step is in metrics.jsonl and a checkpoint is complete, which on a busy machine comes later."""
    end, path = time.monotonic() + 120, run / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < step or not list(run.glob("checkpoints/*[0-9]")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.usefixtures("quick_children")
def test_a_sweep_that_is_killed_goes_on_with_every_step_once(monkeypatch, capfd, tmp_path):
    num_steps = 200
    argv = ["--over=seed=3", f"--config.training.num_steps={num_steps}", "--config.checkpoint.every=50"]
    argv = swept(tmp_path, *argv)
    # Without tasks, whose arguments another process would check before each start; the last sweep evaluates.
    line = command("-m", "mtp_jax.tools.sweep", *(flag for flag in argv if flag != "--eval.limit=1"))
    run, metrics = tmp_path / "seed=3", tmp_path / "seed=3" / "metrics.jsonl"
    options = {"cwd": ROOT, "env": QUICK, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    for number, step in ((signal.SIGKILL, 30), (signal.SIGINT, 80)):
        process = subprocess.Popen(line, **options, start_new_session=True)
        wait_for_step(run, step, process)
        os.killpg(process.pid, number)  # as Ctrl-C does: the whole foreground group
        error = process.communicate(timeout=60)[1]
        wanted = (-9, 0) if number == signal.SIGKILL else (1, 1)
        assert (process.returncode, error.count(b"\n")) == wanted, error
        end = time.monotonic() + 5  # its child is gone, and with it the last hold on the run
        while (lock := run_folder.try_lock(run)) is None:
            assert time.monotonic() < end
            time.sleep(0.01)
        lock.release()
        assert len(metrics.read_text().splitlines()) < num_steps
    assert run_here(monkeypatch, sweep.main, *argv, "--tasks=loss") == 0
    assert capfd.readouterr().err == ""
    assert [row["step"] for row in read_metrics(metrics)] == list(range(1, num_steps + 1))
    log = (run / "log.txt").read_text()
    assert log.count("$ ") == 3 and log.count("resumed  from step") == 2
    assert "stopped by a signal at step" in log
    assert json.loads((run / "eval.json").read_text())["step"] == num_steps
