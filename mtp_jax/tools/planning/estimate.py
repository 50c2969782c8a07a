"""Plan of one config on one topology: the measurements of its compiled step."""

import math
from dataclasses import asdict, dataclass

import jax
import numpy as np

from mtp_jax.config import Config
from mtp_jax.model import count_parameters
from mtp_jax.mtp import kind_of
from mtp_jax.tools.planning import calibration, hlo, traffic
from mtp_jax.tools.planning.buffers import Memory, read_memory
from mtp_jax.tools.planning.collectives import Collective, collectives
from mtp_jax.tools.planning.compile import compile_step
from mtp_jax.tools.planning.roofline import Roofline, roofline
from mtp_jax.tools.planning.topology import Topology
from mtp_jax.training.flops import train_flops_per_token
from mtp_jax.typing import JsonObject, PyTree

GIB, TERA = 2.0**30, 1e12
TABLE_ROWS = 10


class OverFull(RuntimeError):
    """Raised if the step needs more memory than a chip has; the message is the whole report. Exit code 1."""


@dataclass(frozen=True)
class Plan:
    """Measurements per device and step unless stated otherwise, in bytes, FLOP and seconds.

    roofline: None if the program does not fit, because the compiler then writes an unfinished program.
    """

    config: Config
    topology: Topology
    mesh: dict[str, int]
    fits: bool
    params_bytes: int
    optimizer_bytes: int
    memory: Memory
    model_flops: float
    executed_flops: float
    hbm_bytes: float
    sent: list[Collective]
    roofline: Roofline | None
    lower_seconds: float
    compile_seconds: float
    hlo_bytes: int

    @property
    def estimate(self) -> calibration.Estimate | None:
        """Estimate from a published measurement; None if the program does not fit."""
        if self.roofline is None:
            return None
        return calibration.estimate(self.config, self.topology, self.model_flops, self.roofline)

    @property
    def needs_gib(self) -> float:
        """Memory that a chip must have free, GiB."""
        return self.memory.total / GIB


def make_plan(config: Config, topology: Topology) -> Plan:
    """Compiles the step and measures it.

    Args:
      config: from `compile.resolve`.

    Raises:
      CompilerError: see `compile_step`.
    """
    program = compile_step(config, topology)
    module = hlo.parse(program.hlo)
    mesh_shape = dict(program.mesh.shape)
    sent = collectives(module, mesh_shape)
    tokens = config.data.batch_size * config.data.sequence_length
    model_flops = train_flops_per_token(config) * tokens / program.mesh.size
    hbm_bytes = traffic.memory_bytes(module)
    bounds = None
    if not program.is_over_full:
        devices, names = np.asarray(program.mesh.devices), tuple(program.mesh.axis_names)
        bounds = roofline(topology, devices, names, model_flops, program.flops, hbm_bytes, sent)
    return Plan(
        config=config,
        topology=topology,
        mesh=mesh_shape,
        fits=not program.is_over_full,
        params_bytes=_bytes_per_device(program.trainer.abstract_state["params"]),
        optimizer_bytes=_bytes_per_device(program.trainer.abstract_state["opt_state"]),
        memory=read_memory(program.buffers, program.live, module),
        model_flops=model_flops,
        executed_flops=program.flops,
        hbm_bytes=hbm_bytes,
        sent=sent,
        roofline=bounds,
        lower_seconds=program.lower_seconds,
        compile_seconds=program.compile_seconds,
        hlo_bytes=len(program.hlo),
    )


def _bytes_per_device(tree: PyTree) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def over_full_message(plan: Plan) -> str:
    """Returns the error line "mesh (...): needs X of Y GiB, largest: ..."."""
    rows = [f"{row.bytes / GIB:.1f} GiB {row.shape} {row.source}" for row in plan.memory.largest[:3]]
    shown = ", ".join(f"{n}={s}" for n, s in plan.mesh.items())
    return (
        f"mesh ({shown}): needs {plan.needs_gib:.1f} of {plan.topology.chip.hbm_gib:.1f} GiB "
        f"({plan.memory.arguments / GIB:.1f} of it state), largest: {'; '.join(rows)}"
    )


def by_kind(sent: list[Collective]) -> list[JsonObject]:
    """Returns one row per kind and set of axes: runs per step, and bytes that a device sends and holds."""
    groups: dict[tuple[str, tuple[str, ...]], list[Collective]] = {}
    for one in sent:
        groups.setdefault((one.kind, one.axes), []).append(one)
    rows = [
        {
            "kind": kind,
            "axes": list(axes),
            "times": sum(c.times for c in all_),
            "bytes_sent": sum(c.bytes for c in all_),
            "bytes_held": sum(c.payload for c in all_),
            "largest_source": max(all_, key=lambda c: c.bytes).source,
        }
        for (kind, axes), all_ in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes_sent"])


def to_json(plan: Plan) -> JsonObject:
    """Returns the printed values at full precision as a JSON object."""
    counted = count_parameters(plan.config.architecture)
    memory, chip, bounds = plan.memory, plan.topology.chip, plan.roofline
    return {
        "topology": plan.topology.name,
        "slices": plan.topology.num_slices,
        "chip": asdict(chip),
        "num_devices": len(plan.topology.devices),
        "mesh": plan.mesh,
        "batch_size": plan.config.data.batch_size,
        "sequence_length": plan.config.data.sequence_length,
        "remat": plan.config.model.remat,
        "mtp": {"kind": plan.config.mtp.kind, "depth": kind_of(plan.config).depth},
        "fits": plan.fits,
        "peak_hbm_gib": memory.total / GIB,
        "peak_live_gib": (memory.arguments + memory.live) / GIB,
        "hbm_gib": chip.hbm_gib,
        "parameters": counted.total,
        "parameters_active": counted.active,
        "parameters_mtp": counted.mtp_total,
        "parameters_mtp_active": counted.mtp_active,
        "params_gib_per_chip": plan.params_bytes / GIB,
        "optimizer_gib_per_chip": plan.optimizer_bytes / GIB,
        "arguments_gib": memory.arguments / GIB,
        "temporaries_gib": memory.heap / GIB,
        "largest_buffers": [asdict(row) for row in memory.largest[:TABLE_ROWS]],
        "model_tflops_per_chip": plan.model_flops / TERA,
        "executed_tflops_per_chip": plan.executed_flops / TERA,
        "hbm_traffic_gib": plan.hbm_bytes / GIB,
        "collectives": by_kind(plan.sent),
        "seconds": bounds and bounds.parts,
        "step_seconds": bounds and bounds.seconds,
        "bound": bounds and bounds.bound,
        "mfu": bounds and bounds.mfu,
        "estimate": plan.estimate and asdict(plan.estimate),
        "lower_seconds": plan.lower_seconds,
        "compile_seconds": plan.compile_seconds,
        "hlo_bytes": plan.hlo_bytes,
    }
