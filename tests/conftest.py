"""Eight devices on one CPU for every test, and one compilation cache for all processes of a test run."""

import os
import pathlib
import sys
import tempfile

# Before jax is imported: it reads these once.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
CACHE = pathlib.Path(tempfile.gettempdir()) / f"mtp_jax_tests_{os.getuid()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("MTP_JAX_CACHE", str(CACHE / "data"))

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # train.py and eval.py are imported by name

import pytest  # noqa: E402


@pytest.fixture
def project_root():
    return ROOT
