"""Several processes as one run: detected on TPU pods, GKE and SLURM, given by flags elsewhere, never on a laptop.

jax.distributed.initialize() detects clusters too, but raises where there is none, and takes an allocation of one task
for one. This module therefore decides, from the environment and before jax starts, only *whether* there are peers.
"""

import argparse
import ctypes
import glob
import os
import pathlib
import re
import signal
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mtp_jax import cli, signals
from mtp_jax.errors import EXIT_LOST, UserError, first_line

# When a peer dies, the others wait in a collective for this long: 30 s end them within a minute, and no healthy process
# is silent for as long, since a thread outside Python sends the heartbeats.
HEARTBEAT_SECONDS = 30
MIN_HEARTBEAT_SECONDS, MAX_HEARTBEAT_SECONDS = 5, 600
ADDRESS = ("coordinator", "num_processes", "process_id")
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


class DistributedError(RuntimeError):
    """The peers did not connect. Exit code 1, so that a supervisor tries again."""


@dataclass(frozen=True)
class Cluster:
    """Peers to connect to: their source, and the arguments that jax.distributed.initialize cannot detect itself."""

    source: str
    arguments: dict[str, Any] = field(default_factory=dict)


def add_flags(flags: argparse.ArgumentParser) -> None:
    """Adds the flags of one process among several; each has an environment variable, MTP_COORDINATOR and so on."""
    group = flags.add_argument_group("several processes", "not needed on TPU pods, GKE and SLURM, which are detected")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--num_processes", metavar="N", help="how many there are")
    group.add_argument("--process_id", metavar="I", help="which this is, from 0")
    group.add_argument(
        "--heartbeat_seconds", metavar="S", help=f"a peer silent for so long ends the run; default {HEARTBEAT_SECONDS}"
    )


def initialize(args: argparse.Namespace) -> None:
    """Connects to the other processes, if there are any; must precede any use of jax. Process 0 prints one line.

    Raises:
      UserError: flags that cannot be used.
      DistributedError: the others did not connect.
    """
    heartbeat = _heartbeat(args, os.environ)
    cluster = detect(args, os.environ)
    if cluster is None:
        return
    import jax

    # For the CPU backend only; without it several CPU processes have no collectives.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        # A process that fails alone waits for the others before it exits, no longer than for a dead one.
        jax.distributed.initialize(
            **cluster.arguments, heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=heartbeat
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise DistributedError(
            f"several processes (found by {cluster.source}) did not connect: {first_line(error)}; look at the other "
            "processes, and whether the coordinator's port is open to them"
        ) from error
    _end_clearly_without_a_peer()
    if signals.STOP.is_installed and (native := signals.native_handler(signal.SIGTERM)):
        signals.STOP.forward_to(signal.SIGTERM, native)
    cli.set_up_logging(jax.process_index())
    if jax.process_index() == 0:
        print(f"peers    {jax.process_count()} processes, found by {cluster.source}", flush=True)


# Referenced here for as long as C may call it.
_ON_ABORT = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: _abort())


def _end_clearly_without_a_peer() -> None:
    """Ends this process with EXIT_LOST and one line where jax's client would abort it (exit code 134).

    The client ends its process by abort() when a peer has sent no heartbeat for too long or the coordinator is gone.
    It has an option for a callback instead, which jaxlib cannot call (its argument, an absl::Status, has no Python
    type: std::bad_cast ends the process as well). So the handler of SIGABRT is set, in C, because those of the signal
    module run after abort() has ended the process. The signal comes from the failing thread itself, not in the middle
    of other work, so the handler may run Python.
    """
    library = ctypes.CDLL(None)
    library.signal.restype = ctypes.c_void_p
    library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    library.signal(signal.SIGABRT, ctypes.cast(_ON_ABORT, ctypes.c_void_p))


def _abort() -> None:
    os.write(
        2,
        b"error: the runtime of jax ended this process, most likely because another one of the run died or stopped; "
        b"look at the other processes, and run the same command again to go on from the newest checkpoint\n",
    )
    signals.end_process(EXIT_LOST)


def detect(
    args: argparse.Namespace, env: Mapping[str, str], metadata: Callable[[str], str] | None = None
) -> Cluster | None:
    """Returns the Cluster this process belongs to, or None if it is alone.

    Args:
      args: the flags of `add_flags`; they take precedence over the environment.
      env: the environment.
      metadata: reads an attribute of this Cloud TPU VM ("" where there is none); None: from its metadata server, if
        there is one.
    """
    return _by_flags(args, env) or _by_slurm(env) or _by_tpu(env, metadata or _metadata)


def _by_flags(args: argparse.Namespace, env: Mapping[str, str]) -> Cluster | None:
    given = {name: getattr(args, name) for name in ADDRESS}
    source, label = "flags", "--{}"
    if not any(given.values()):
        given = {name: env.get(f"MTP_{name.upper()}") for name in ADDRESS}
        source, label = "MTP_COORDINATOR", "MTP_{}"
    if not any(given.values()):
        return None
    labels = {name: label.format(name if source == "flags" else name.upper()) for name in ADDRESS}
    missing = [labels[name] for name in ADDRESS if not given[name]]
    if missing:
        first_given = next(f"{labels[name]}={given[name]}" for name in ADDRESS if given[name])
        raise UserError(f"{first_given}: {' and '.join(missing)} missing; give all three or none")
    address = str(given["coordinator"])
    if not re.fullmatch(r"\S+:\d+", address):
        raise UserError(f"{labels['coordinator']}={address}: must be HOST:PORT, such as 10.0.0.1:8476")
    num = _integer(labels["num_processes"], given["num_processes"], 1, None)
    index = _integer(labels["process_id"], given["process_id"], 0, num - 1)
    if num == 1:
        return None
    peers = {"coordinator_address": address, "num_processes": num, "process_id": index}
    # One process with all of its devices, whatever other cluster variables are set.
    return Cluster(source, peers | {"cluster_detection_method": "deactivate"})


def _by_slurm(env: Mapping[str, str]) -> Cluster | None:
    """A task of an srun step with several tasks. Batch scripts and salloc shells inherit SLURM_NTASKS and are alone."""
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if not all(name in env for name in needed):
        return None
    if int(env.get("SLURM_STEP_NUM_TASKS", env["SLURM_NTASKS"])) < 2:
        return None
    arguments: dict[str, Any] = {"cluster_detection_method": "slurm"}
    one_task_a_node = re.fullmatch(r"1(\(x\d+\))?", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    num_gpus = env.get("SLURM_GPUS_ON_NODE", "")
    if one_task_a_node and num_gpus.isdigit():  # jax would assign one GPU to the task and leave the others idle
        arguments["local_device_ids"] = list(range(int(num_gpus)))
    return Cluster("SLURM", arguments)


def _by_tpu(env: Mapping[str, str], metadata: Callable[[str], str]) -> Cluster | None:
    platforms = env.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms.split(","):
        return None
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if hosts:  # set by GKE
        return Cluster("GKE") if _count(hosts) * int(env.get("MEGASCALE_NUM_SLICES") or 1) > 1 else None
    if "TPU_SKIP_MDS_QUERY" in env:
        return None
    num_slices = env.get("MEGASCALE_NUM_SLICES") or _line(metadata("tpu-env"), "MEGASCALE_NUM_SLICES")
    several = _count(metadata("worker-network-endpoints")) * int(num_slices or 1) > 1
    return Cluster("Cloud TPU") if several else None


def _count(comma_separated: str) -> int:
    return sum(1 for part in comma_separated.split(",") if part.strip())


def _line(text: str, key: str) -> str:
    """Returns the value of `key: 'value'` in the lines of tpu-env."""
    found = re.search(rf"^\s*{key}\s*:\s*'?([^'\n]*)'?\s*$", text, re.MULTILINE)
    return found.group(1).strip() if found else ""


def _metadata(key: str) -> str:
    """Returns an attribute of this Cloud TPU VM; "" without a request on machines without Google's PCI devices."""
    vendors = (pathlib.Path(path) for path in glob.glob("/sys/bus/pci/devices/*/vendor"))
    if not any(path.read_text().strip() == "0x1ae0" for path in vendors):
        return ""
    request = urllib.request.Request(METADATA + key, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:  # no such attribute (no TPU), or no metadata server
        return ""


def _heartbeat(args: argparse.Namespace, env: Mapping[str, str]) -> int:
    if args.heartbeat_seconds is not None:
        name, value = "--heartbeat_seconds", args.heartbeat_seconds
    else:
        name, value = "MTP_HEARTBEAT_SECONDS", env.get("MTP_HEARTBEAT_SECONDS") or HEARTBEAT_SECONDS
    return _integer(name, value, MIN_HEARTBEAT_SECONDS, MAX_HEARTBEAT_SECONDS)


def _integer(name: str, value: str | int, low: int, high: int | None) -> int:
    bounds = f"{low} or more" if high is None else f"from {low} to {high}"
    if not re.fullmatch(r"\d+", str(value)) or int(value) < low or (high is not None and int(value) > high):
        raise UserError(f"{name}={value}: must be a whole number, {bounds}")
    return int(value)
