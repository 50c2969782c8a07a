"""TPU slices without a TPU: figures of the chips, and the devices of a topology for the compiler."""

import difflib
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtp_jax.config import UserError
from mtp_jax.errors import first_line

if TYPE_CHECKING:  # `prepare_environment` must run before jax is imported
    import jax

# Read by libtpu and jax when they start. Without the first, a second process fails on /tmp/libtpu_lockfile; without the
# second, libtpu waits for a cloud's metadata server; the others state that there is one host, this one, with a CPU.
ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # any known type: it describes the compiling machine, not the target
    "JAX_PLATFORMS": "cpu",
}


def prepare_environment() -> None:
    """Sets the variables that libtpu and jax read; must be called before jax is imported."""
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # hides libtpu's warnings that there is no TPU


@dataclass(frozen=True)
class Chip:
    """Figures of one jax device of a TPU generation.

    hbm_gib: HBM that a program may use, GiB: the limit in the compiler's out-of-memory message.
    flops: dense bfloat16, FLOP/s. hbm_bandwidth: bytes/s. link_bandwidth: bytes/s of one inter-chip link in one
    direction; a chip has two links per torus dim. network_bandwidth: bytes/s to other slices. wraps_from: smallest
    number of chips along a dim at which the dim is a ring.
    devices: jax devices per chip, which share the chip's figures evenly.
    """

    name: str
    hbm_gib: float
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    wraps_from: int
    devices: int = 1


# Per jax device. docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, read 2026-11: "peak compute per chip (BF16)",
# "HBM bandwidth per chip", "bidirectional ICI bandwidth per chip" (both directions of all links: 4 links per chip on
# the 2D generations, 6 on the 3D ones; 400, 1200, 800 and 1200 GB/s are 50, 100, 100 and 100 per link and direction),
# "data center network bandwidth" (per chip if the page states it, else that of the pod divided by its chips).
# Rings: v5e and v6e have wraparound links on 16-chip dims only, the 3D generations on dims of 4 chips and more.
# hbm_gib: from out-of-memory messages of libtpu 0.0.42.
CHIPS = {
    "v4": Chip("TPU v4", 31.25, 275e12 / 2, 1200e9 / 2, 50e9 / 2, 3.1e9 / 2, 4, devices=2),
    "v5e": Chip("TPU v5e", 15.75, 197e12, 819e9, 50e9, 3.1e9, 16),
    "v5p": Chip("TPU v5p", 95.74, 459e12, 2765e9, 100e9, 6.25e9, 4),
    "v6e": Chip("TPU v6e", 31.25, 918e12, 1638e9, 100e9, 12.5e9, 16),
    "tpu7x": Chip("TPU7x, one of a chip's two cores", 94.75, 2307e12 / 2, 7380e9 / 2, 100e9 / 2, 12.5e9 / 2, 4, 2),
}


@dataclass(frozen=True)
class Topology:
    """A topology. chip: figures of one device. shape: chips along each physical dim. devices: those of all slices."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    num_slices: int
    devices: "list[jax.Device]"

    @property
    def num_chips(self) -> int:
        """Number of chips of all slices."""
        return len(self.devices) // self.chip.devices


def open_topology(name: str, num_slices: int = 1) -> Topology:
    """Returns the topology of `num_slices` slices of "generation:AxB" or "generation:AxBxC".

    Raises:
      UserError: the generation is unknown, libtpu refuses the shape, or libtpu is not installed.
    """
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)*)", name)
    if not match or match[1] not in CHIPS:
        generation = name.split(":")[0]
        near = (difflib.get_close_matches(generation, CHIPS, 1, 0.0) or ["v5p"])[0]
        shape = "4x4" if near in ("v5e", "v6e") else "4x4x4"
        raise UserError(
            f"--topology={name}: unknown; a topology is a generation ({', '.join(CHIPS)}) and its chips, "
            f"as in {near}:{shape}"
        )
    if num_slices < 1:
        raise UserError(f"--slices={num_slices}: must be at least 1")
    return Topology(name, CHIPS[match[1]], tuple(map(int, match[2].split("x"))), num_slices, _devices(name, num_slices))


def _devices(name: str, num_slices: int) -> "list[jax.Device]":
    from jax.experimental import topologies

    try:
        import libtpu  # noqa: F401  (imported here for a message of its own)
    except ImportError as error:
        raise UserError("libtpu is not installed; it comes with the extra tpu: pip install 'jax[tpu]'") from error
    slices = {"num_slices": num_slices} if num_slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **slices).devices)
    except Exception as error:  # jax raises a RuntimeError for every reason
        reason = first_line(error).removeprefix("INVALID_ARGUMENT: ")
        raise UserError(f"--topology={name}: {reason}") from error
