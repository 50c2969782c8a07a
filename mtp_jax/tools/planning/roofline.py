"""Lower bounds of the step time: the time that each part of the machine needs for its share of the work.

Each figure assumes perfect overlap, every matrix unit at its peak and every link full. A real step is slower; the
figures compare one plan with another. MFU is the model's own FLOPs (without recomputation) over the bound's time.
"""

import math
from dataclasses import dataclass

import numpy as np

from mtp_jax.tools.planning.collectives import Collective
from mtp_jax.tools.planning.topology import Chip, Topology


@dataclass(frozen=True)
class Roofline:
    """Bounds of a step. parts: busy seconds per step of each part. mfu: at the slowest part's time."""

    parts: dict[str, float]
    mfu: float

    @property
    def seconds(self) -> float:
        """Predicted step time: that of the slowest part."""
        return max(self.parts.values())

    @property
    def bound(self) -> str:
        """Name of the slowest part."""
        return max(self.parts, key=lambda name: self.parts[name])


def roofline(
    topology: Topology,
    mesh: np.ndarray,
    names: tuple[str, ...],
    model_flops: float,
    executed_flops: float,
    hbm_bytes: float,
    sent: list[Collective],
) -> Roofline:
    """Returns the bounds of one step.

    Args:
      mesh: the mesh's array of devices; names: its axes.
      model_flops, executed_flops: FLOP per device and step, without and with recomputation.
      hbm_bytes: bytes read and written, per device and step.
      sent: the program's collectives.
    """
    chip = topology.chip
    ici = network = 0.0
    for one in sent:
        num_crossed = slices_crossed(mesh, names, one.axes)
        if num_crossed > 1:
            network += network_seconds(one, chip, num_crossed)
        else:
            ici += link_seconds(one, chip, dims_used(mesh, names, one.axes), topology.shape)
    compute, hbm = executed_flops / chip.flops, hbm_bytes / chip.hbm_bandwidth
    parts = {"compute": compute, "HBM": hbm, "ICI": ici, "network": network}
    return Roofline(parts, model_flops / chip.flops / max(parts.values()))


def dims_used(mesh: np.ndarray, names: tuple[str, ...], axes: tuple[str, ...]) -> list[tuple[int, int]]:
    """Returns (physical dim, number of chips along it) for the torus dims that the mesh axes run along."""
    index = tuple(slice(None) if name in axes else 0 for name in names)
    coords = np.array([device.coords for device in np.asarray(mesh[index]).flat])
    lengths = [len(set(coords[:, d].tolist())) for d in range(coords.shape[1])]
    return [(d, n) for d, n in enumerate(lengths) if n > 1]


def slices_crossed(mesh: np.ndarray, names: tuple[str, ...], axes: tuple[str, ...]) -> int:
    """Returns the number of slices that the devices along the mesh axes belong to."""
    index = tuple(slice(None) if name in axes else 0 for name in names)
    return len({getattr(device, "slice_index", 0) for device in np.asarray(mesh[index]).flat})


def link_seconds(one: Collective, chip: Chip, dims: list[tuple[int, int]], shape: tuple[int, ...]) -> float:
    """Seconds that a collective occupies the links.

    Gathers and reductions use every dim at once, in both directions if the dim is a ring and all of it takes part. In
    an all-to-all each byte crosses on average a quarter of a ring or a third of a line. A permute uses one link in one
    direction.
    """
    if not dims:  # between the two cores of a chip
        return one.bytes / (2 * chip.link_bandwidth)
    if one.kind == "collective-permute":
        return one.bytes / chip.link_bandwidth
    rings = [n == shape[d] >= chip.wraps_from for d, n in dims]
    bandwidth = sum(chip.link_bandwidth * (2 if is_ring else 1) for is_ring in rings)
    if one.kind in ("all-to-all", "ragged-all-to-all"):
        hops = math.fsum(n / (4 if is_ring else 3) for (_, n), is_ring in zip(dims, rings, strict=True))
        links = sum(2 * chip.link_bandwidth for _ in dims)
        return one.bytes * max(hops, 1.0) / links
    return one.bytes / bandwidth


def network_seconds(one: Collective, chip: Chip, num_slices: int) -> float:
    """Seconds on the network between slices. The chips of a slice share the transfer, so each sends only its part."""
    within = max(one.group // num_slices, 1)
    return one.bytes / within / chip.network_bandwidth
