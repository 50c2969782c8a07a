"""The wheel: its files, its commands from another folder without write access to the package, and its dependencies."""

import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import typing
import zipfile

import pytest
from etils import epath

from mtp_jax import config, errors
from mtp_jax.config import key_hints, shipped
from mtp_jax.evaluation import results
from mtp_jax.mtp import KINDS
from mtp_jax.tools import report, train
from mtp_jax.training.workdir import open_workdir
from tests.commands import DENSE, QUICK, run_here
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = sorted(PROJECT["scripts"])
NOT_PACKAGED = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "runs")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
AFTER_TRAINING = {
    "mtp-eval": ["--workdir=run", "--tasks=loss", "--limit=1", "--output=eval.json"],
    "mtp-generate": ["--workdir=run", "def ", "--max_new_tokens=4"],
    "mtp-report": ["--workdir=run"],
    "mtp-convert": ["export", "--workdir=run", "--hf=hf"],
}


def checked(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def read_only(root):
    """Removes the permission to write from a folder and everything in it."""
    for path in [root, *root.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)


# The start of a command line that obeys the permissions of files, also where it is root: CAP_DAC_OVERRIDE (1) and
# CAP_DAC_READ_SEARCH (2) are dropped with PR_CAPBSET_DROP (24). Not preexec_fn, which forks a process with threads.
OBEY = """
import ctypes, os, sys
library = ctypes.CDLL(None)
for capability in (1, 2) if hasattr(library, "prctl") else ():
    library.prctl(24, capability, 0, 0, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def obeying(command):
    return [sys.executable, "-c", OBEY, *map(str, command)]


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A copy of the project without write permission."""
    folder = tmp_path_factory.mktemp("source") / "project"
    shutil.copytree(ROOT, folder, ignore=NOT_PACKAGED)
    return folder


@pytest.fixture(scope="session")
def wheel(source, tmp_path_factory):
    """A wheel that is built from the source distribution, without a network."""
    out = tmp_path_factory.mktemp("wheel")
    backend = "from setuptools import build_meta as b; import sys; print(b.build_sdist(sys.argv[1]))"
    checked([sys.executable, "-c", backend, out], cwd=source)
    (sdist,) = out.glob("*.tar.gz")
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    checked([*PIP, "wheel", "--quiet", *offline, "--wheel-dir", out, sdist])
    (found,) = out.glob("*.whl")
    return found


class Installation:
    """An installed wheel in a read-only folder, and the commands in it, in the environment of a new user."""

    def __init__(self, wheel, root):
        self.folder, self.home = root / "installed", root / "home"
        self.home.mkdir()
        checked([*PIP, "install", "--quiet", "--no-deps", "--no-index", "--target", self.folder, wheel])
        read_only(self.folder)

    def run(self, script, *argv, cwd=None):
        env = QUICK | {"HOME": str(self.home), "PYTHONPATH": str(self.folder), "COLUMNS": "80"}
        command = obeying([self.folder / "bin" / script, *argv])
        options = {"capture_output": True, "text": True, "timeout": 300}
        return subprocess.run(command, cwd=cwd or self.home, env=env, check=False, **options)


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    return Installation(wheel, tmp_path_factory.mktemp("installation"))


def test_the_wheel_has_the_package_its_configs_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {str(p.relative_to(ROOT)) for p in (ROOT / "mtp_jax").rglob("*.py")} | {"mtp_jax/py.typed"}
    files = [p for p in (ROOT / "configs").rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    shipped_files = {f"mtp_jax/{p.relative_to(ROOT)}" for p in files}
    rest = {name for name in names if ".dist-info/" not in name}
    assert rest == package | shipped_files
    assert any(name.endswith("/LICENSE") for name in names)


def test_configs_are_in_the_wheel_under_their_names(installed):
    done = installed.run("mtp-train", "--config=?")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    head, *lines = done.stdout.splitlines()
    assert str(installed.folder / "mtp_jax" / "configs") in head and max(map(len, lines)) <= 80
    assert {line.split()[0] for line in lines if line[2] != " "} == set(shipped.names())
    assert "Quickstart: a miniature DeepSeek-V3" in done.stdout


@pytest.mark.parametrize("module", ["mtp_jax", "mtp_jax.tools.train", "mtp_jax.tools.eval"])
def test_importing_the_package_imports_none_of_its_dependencies(installed, module):
    """The commands that train and evaluate handle signals before they import anything slow."""
    code = f"import sys, {module}; print(mtp_jax.__file__, *{{'jax', 'numpy', 'ml_collections'}} & set(sys.modules))"
    env = QUICK | {"PYTHONPATH": str(installed.folder)}
    done = checked([sys.executable, "-c", code], cwd=installed.home, env=env)
    assert done.stdout.split() == [str(installed.folder / "mtp_jax" / "__init__.py")]


@pytest.mark.parametrize("script", sorted(set(SCRIPTS) - set(AFTER_TRAINING)))
def test_each_command_starts_from_any_folder(installed, script):
    """Those that the next test does not run."""
    done = installed.run(script, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {script} ")


def test_an_unusable_command_is_one_line(installed):
    done = installed.run("mtp-train", "--config=quikstart", "--workdir=run")
    assert done.returncode == 2 and re.fullmatch(r"error: .*--config=quickstart\n", done.stderr), done.stderr


def test_an_installed_package_trains_evaluates_and_generates(installed, tmp_path):
    """The commands of a first run, by a user that cannot write to the package."""
    touched = subprocess.run(obeying(["touch", installed.folder / "mtp_jax" / "x"]), capture_output=True, text=True)
    assert "Permission denied" in touched.stderr  # as the fixture promises
    small = [*DENSE, "--config.training.num_steps=2", "--config.training.eval_batches=1"]
    small.append("--config.model.rope.interleaved=false")  # as in the layout of the export
    done = installed.run("mtp-train", "--config=tiny", "--workdir=run", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "  mtp-eval --tasks=loss --workdir=run\n" in done.stdout
    for script, argv in AFTER_TRAINING.items():
        done = installed.run(script, *argv, cwd=tmp_path)
        assert done.returncode == 0, (script, done.stderr)
    files = {"eval.json", "eval.md", "eval.png", "run/report.png", "hf/config.json"}
    assert all((tmp_path / file).is_file() for file in files)


def test_a_clone_without_write_permission_trains(source, tmp_path):
    """`python train.py` in a folder of another user."""
    read_only(source)
    small = [*DENSE, "--config.training.num_steps=1", "--config.training.eval_batches=1"]
    argv = ["--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}", *small]
    checked(obeying([sys.executable, "train.py", *argv]), cwd=source, env=QUICK | {"HOME": str(tmp_path)})


# ---------------------------------------------------------------------------------------------------------------
# Names of configs, and help


@pytest.mark.parametrize(
    ("given", "named"), [("quikstart", "quickstart"), ("configs/deepseek_v3.py", "deepseek_v3_671b")]
)
def test_a_config_that_does_not_exist_names_the_nearest_one(given, named):
    with pytest.raises(config.UserError, match=rf"--config={given}: no such file; .*--config={named}$"):
        config.load_config(given)


def test_a_file_comes_before_a_name(tmp_path, monkeypatch):
    assert config.load_config("tiny") == config.load_config(str(ROOT / "configs" / "tiny.py"))
    monkeypatch.chdir(tmp_path)
    pathlib.Path("tiny").write_text("")
    with pytest.raises(config.UserError, match="its name must end in .py"):
        config.load_config("tiny")


def test_help_names_settings_that_exist(monkeypatch, capfd):
    assert run_here(monkeypatch, train.main, "--help") == 0
    printed = capfd.readouterr().out
    hints, described = (
        key_hints(config.Config),
        re.findall(r"^  (\w\S+(?:, \S+)*)(?:  +(.*))?$", train.SETTINGS, re.MULTILINE),
    )
    keys = [key for names, _ in described for key in names.split(", ")]
    assert len(keys) > 25 and set(keys) <= set(hints)
    for names, text in described:
        hint = KINDS if names == "mtp.kind" else typing.get_args(hints[names.split(", ")[0]])
        values = [value for value in hint if isinstance(value, str)]
        assert all(value in re.findall(r"\w+", text) for value in values), (names, values)
        assert text in printed
    assert str(ROOT / "mtp_jax" / "config" / "schema.py") in printed


@pytest.mark.parametrize(
    ("command", "python", "kind", "first"),
    [
        ("/env/bin/mtp-train", "/env/bin/python", "none", "  mtp-eval --tasks=loss --workdir='a b'"),
        ("train.py", "/env/bin/python", "none", "  /env/bin/python -m mtp_jax.tools.eval --tasks=loss --workdir='a b'"),
        ("train.py", "HERE/.venv/bin/python", "none", "  .venv/bin/python -m mtp_jax.tools.eval --tasks=loss"),
        ("mtp-train", "python", "sequential", "  mtp-eval --tasks=loss,acceptance,speculative --workdir="),
        ("mtp-train", "python", "top", "  mtp-eval --tasks=loss --workdir="),  # never drafts
    ],
)
def test_the_next_commands_have_the_form_of_this_one(monkeypatch, tmp_path, command, python, kind, first):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [command])
    monkeypatch.setattr(sys, "executable", python.replace("HERE", str(tmp_path)))
    lines = train.next_commands(config.load_config(str(ROOT / "configs/tiny.py"), [f"--config.mtp.kind={kind}"]), "a b")
    assert lines[0].startswith(first) and len(lines) == 3


# ---------------------------------------------------------------------------------------------------------------
# Dependencies


def requirements(name):
    """The lines of a requirements file, without comments and files that it includes."""
    lines = (line.partition("  #")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return {line for line in lines if line and not line.startswith(("#", "-r"))}


EXTRAS = {"hf": "hf", "eval": "eval", "cloud": "cloud", "sentencepiece": "sentencepiece", "docs": "docs", "dev": "dev"}


@pytest.mark.parametrize("extra", EXTRAS)
def test_extras_equal_the_requirements_files(extra):
    assert set(PROJECT["optional-dependencies"][extra]) == requirements(f"requirements-{EXTRAS[extra]}.txt")


def test_a_clone_installs_the_dependencies_and_the_extra_plot():
    both = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["plot"]]
    assert set(both) == requirements("requirements.txt")


def test_every_extra_of_the_documents_exists():
    extras = PROJECT["optional-dependencies"]
    assert {"tpu", "gpu", "hf", "eval", "cloud", "track", "docs", "wandb", "datasets", "sentencepiece", "dev"} <= set(
        extras
    )
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "mtp_jax").rglob("*.py")]
    named = {name for path in texts for name in re.findall(r"mtp_jax\[(\w+)\]", path.read_text())}
    assert named and named <= set(extras)


@pytest.fixture
def no_matplotlib(monkeypatch):
    """An environment without the extra plot."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find_spec(name, *a)
    )
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


def test_without_matplotlib_tables_and_numbers_remain(no_matplotlib, monkeypatch, capfd, tmp_path):
    missing = "matplotlib is not installed; pip install matplotlib (the extra plot)"
    errors.warn_once.cache_clear()
    results.write(epath.Path(tmp_path / "eval.json"), "run", ["table"], {"loss": {"main": {"loss": 1.0}}})
    assert f"eval.png is not drawn: {missing}" in capfd.readouterr().err
    assert (tmp_path / "eval.json").is_file() and not (tmp_path / "eval.png").exists()

    open_workdir(tmp_path / "run", config.load_config("tiny", ["--config.model.vocab_size=264"]))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "loss_main": 1.0}\n')
    assert run_here(monkeypatch, report.main, f"--workdir={tmp_path / 'run'}") == 0
    assert f"no curves: {missing}" in capfd.readouterr().out
    argv = [f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'a.png'}"]
    assert run_here(monkeypatch, report.main, *argv) == 2
    assert capfd.readouterr().err.endswith(f"a.png: {missing}\n")
