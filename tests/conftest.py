"""Eight devices on one CPU for every test, and one compilation cache for all processes of a test run."""

import fcntl
import gc
import importlib.metadata
import os
import pathlib
import shutil
import signal
import sys
import tempfile

# Before jax is imported: it reads these once.
JAXLIB = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
# XLA's older code generator for CPUs compiles a training step in half the time. Later versions have only the newer one,
# and refuse the flag; processes that a test starts use the newer one in any case, but where they are to be QUICK.
QUICK_FLAGS = "--xla_cpu_use_fusion_emitters=false" if JAXLIB < (0, 11) else ""
# One LLVM module per program instead of up to 32 takes three quarters of the CPU time to compile.
QUICK_FLAGS += " --xla_cpu_parallel_codegen_split_count=1"
# Tracing makes many objects that live: a collection after each 700 of them, Python's default, takes a tenth of a test.
gc.set_threshold(100_000, 20, 50)
# Eight devices wait for each other in a collective: XLA aborts the process where one is late by 40 s, as on a busy
# machine of 2 cores.
PATIENT_FLAGS = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
FLAGS = f"{QUICK_FLAGS} {PATIENT_FLAGS} --xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Tests compile much and run each program for a few steps; without the costly optimizations they take half the time.
    # JAX_DISABLE_MOST_OPTIMIZATIONS=0 compiles as for users, as .ci/run does for some of the oracles.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
CACHE = pathlib.Path(tempfile.gettempdir()) / f"mtp_jax_tests_{os.getuid()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("MTP_JAX_CACHE", str(CACHE / "data"))

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # train.py and eval.py are imported by name

import pytest  # noqa: E402

from tests.object_store import ALWAYS, bucket, object_store  # noqa: E402, F401

os.environ.update(ALWAYS)

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a script: so would what tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # as under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def project_root():
    return ROOT


def use_one_device(patch):
    """Runs in this process use one of its eight devices; their configs need not set the mesh."""
    import jax

    from mtp_jax import sharding

    make_mesh = sharding.make_mesh
    patch.setattr(sharding, "make_mesh", lambda mesh, devices=None: make_mesh(mesh, jax.devices()[:1]))


@pytest.fixture
def one_device(monkeypatch):
    """`use_one_device` for a test."""
    use_one_device(monkeypatch)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """The workdir that train_small (tests/decoding/trained.py) makes of its defaults, once for all processes."""
    from tests.decoding.trained import train_small

    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root  # a process of pytest-xdist has a folder in it
    folder = root / "small_run"
    with open(root / "small_run.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():  # else the training failed in another process
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            train_small(folder)
            (folder / "complete").touch()
    return folder / "run"


@pytest.fixture(scope="module")
def small_workdir(small_run, tmp_path_factory):
    """A copy of `small_run` for the tests of a file, which may write to it."""
    return shutil.copytree(small_run, tmp_path_factory.mktemp("small") / "run")


@pytest.fixture(scope="module", autouse=True)
def programs_dropped():
    """Programs compiled by a file are dropped after it. A program takes dozens of the memory maps that Linux allows a
    process (vm.max_map_count, 65,530): after a thousand programs the next one is a segmentation fault."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
