"""Search over meshes, recomputation and micro-batches: candidates are pruned by estimates, compiled and ranked.

The topology, the model and the tokens per step are fixed: a batch that is too large for the chips is split into more
micro-batches. Memory and time of every candidate are first estimated from sizes alone. The estimate leaves out what the
compiler adds, so it only rejects candidates that cannot fit; the most promising of the others are compiled.
"""

import itertools
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from mtp_jax.config import Config, MeshConfig, UserError, with_values
from mtp_jax.errors import first_line
from mtp_jax.layers.attention import attention_of
from mtp_jax.layers.spec import layer_specs
from mtp_jax.model import weights
from mtp_jax.mtp import kind_of
from mtp_jax.sharding import weight_spec
from mtp_jax.tools.planning import estimate
from mtp_jax.tools.planning.compile import CompilerError, resolve
from mtp_jax.tools.planning.estimate import GIB, Plan
from mtp_jax.tools.planning.topology import Topology
from mtp_jax.training.flops import train_flops_per_token
from mtp_jax.typing import JsonObject

EXECUTED = {"none": 1.0, "dots": 1.1, "full": 4 / 3}  # executed / model FLOPs; "full" repeats the forward pass
KEPT = {"none": 34, "dots": 12, "full": 1}  # saved values per token and layer, in units of the model dim; 2205.05198


@dataclass(frozen=True)
class Candidate:
    """A config to try, with its estimates. gib: GiB per device. seconds: per step."""

    config: Config
    gib: float
    seconds: float


@dataclass(frozen=True)
class Found:
    """A compiled candidate. plan: None if the compiler refused it, for the reason in `why`."""

    candidate: Candidate
    plan: Plan | None
    why: str = ""

    @property
    def seconds(self) -> float:
        """Lower bound of the step time; infinite if the step does not fit."""
        return self.plan.roofline.seconds if self.plan and self.plan.fits and self.plan.roofline else math.inf


def search(config: Config, topology: Topology, num_tries: int) -> list[Found]:
    """Compiles the `num_tries` most promising candidates and returns them, fastest first.

    Raises:
      UserError: no mesh of the topology divides the config, or no candidate fits by its estimate.
    """
    everything = list(candidates(config, topology))
    if not everything:
        raise UserError(f"--topology={topology.name}: no mesh of {len(topology.devices)} devices divides this config")
    hopeful = [c for c in everything if c.gib < topology.chip.hbm_gib]
    if not hopeful:
        least = min(everything, key=lambda c: c.gib)
        raise UserError(
            f"--topology={topology.name}: state and saved activations alone take {least.gib:.0f} of "
            f"{topology.chip.hbm_gib:.0f} GiB on the best of {len(everything)} candidates; use more chips"
        )
    chosen = sorted(hopeful, key=_sort_key)[:num_tries]
    print(f"{len(everything)} candidates, {len(hopeful)} may fit, compiling {len(chosen)}", file=sys.stderr, flush=True)
    found = []
    for number, candidate in enumerate(chosen, 1):
        started = time.perf_counter()
        found.append(_try(candidate, topology))
        took = time.perf_counter() - started
        print(f"[{number}/{len(chosen)}] {_line(found[-1])}  ({took:.0f} s)", file=sys.stderr, flush=True)
    return sorted(found, key=lambda f: f.seconds)


def _sort_key(candidate: Candidate) -> tuple[float, int, float]:
    """Sort key: estimated time to two digits, then fewer micro-batches, then less memory."""
    return float(f"{candidate.seconds:.2g}"), candidate.config.training.grad_accum_steps, candidate.gib


def _try(candidate: Candidate, topology: Topology) -> Found:
    try:
        return Found(candidate, estimate.make_plan(candidate.config, topology))
    except (CompilerError, ValueError, NotImplementedError) as error:
        return Found(candidate, None, first_line(error))


def candidates(config: Config, topology: Topology) -> Iterator[Candidate]:
    """Yields every mesh whose axes multiply to the devices and divide the config, with every remat policy and with 1 to
    32 micro-batches, in powers of two."""
    for sizes in meshes(len(topology.devices), topology.num_slices):
        for remat, accumulate in itertools.product(EXECUTED, (1, 2, 4, 8, 16, 32)):
            changes = {"mesh": MeshConfig(**sizes), "model.remat": remat, "training.grad_accum_steps": accumulate}
            tried = with_values(config, changes)
            try:
                resolved = resolve(tried, topology)
            except UserError:
                continue
            yield Candidate(resolved, memory_gib(resolved, sizes), step_seconds(resolved, sizes, topology))


def meshes(num_devices: int, num_slices: int) -> Iterator[dict[str, int]]:
    """Yields axis sizes that multiply to the devices. data only joins slices: within one, fsdp does the same with less
    memory. Heads and positions are split into at most 16 parts, experts into at most 64; beyond these sizes their
    collectives dominate the step."""
    for expert, context, tensor in itertools.product((1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8, 16), (1, 2, 4, 8, 16)):
        num_parts = num_slices * expert * context * tensor
        if num_devices % num_parts == 0:
            fsdp = num_devices // num_parts
            yield {"data": num_slices, "fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}


def memory_gib(config: Config, sizes: dict[str, int]) -> float:
    """Estimates state, gradients and saved activations per device, GiB; temporaries of a running layer are left out."""
    model, moments = config.model, 4 if config.optimizer.stored_dtype == "float32" else 2
    param_bytes = 4 if model.param_dtype == "float32" else 2
    moment_count = 2 if config.optimizer.name == "adamw" else 1
    state = 0.0
    for _, info, leaf in weights(config.architecture):  # weight, moments, gradient
        dims = weight_spec(info.axes, leaf.shape, sizes)
        num_parts = math.prod(sizes[axis] for axes in dims for axis in _names(axes))
        state += leaf.size / num_parts * (param_bytes + moment_count * moments + 4)
    rows = config.data.batch_size / config.training.grad_accum_steps / (sizes["data"] * sizes["fsdp"] * sizes["expert"])
    tokens = rows * config.data.sequence_length / sizes["context"]
    layers = kind_of(config).num_main_layers + kind_of(config).num_blocks
    kept = KEPT[model.remat] / (sizes["tensor"] if model.remat != "full" else 1)
    dtype = 2 if model.compute_dtype == "bfloat16" else 4
    return (state + tokens * layers * model.embed_dim * kept * dtype) / GIB


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes of one entry of a PartitionSpec."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def step_seconds(config: Config, sizes: dict[str, int], topology: Topology) -> float:
    """Estimates the step time, seconds, as the larger of matrix units and links. The links carry weights gathered over
    fsdp three times per micro-batch, activations over tensor, tokens over expert, and over context what attention reads
    of other positions."""
    model, chip = config.model, topology.chip
    num_devices = math.prod(sizes.values())
    tokens = config.data.batch_size * config.data.sequence_length
    compute = train_flops_per_token(config) * tokens * EXECUTED[model.remat] / num_devices / chip.flops
    links = 2 * chip.link_bandwidth * len([n for n in topology.shape if n > 1])
    gathered = 0.0
    for _, info, leaf in weights(config.architecture):
        names = set(info.axes)
        num_parts = sizes["expert"] if "experts" in names else 1
        num_parts *= sizes["tensor"] if names & {"heads", "kv_heads", "ffn", "vocab"} else 1
        gathered += 2 * leaf.size / num_parts if sizes["fsdp"] > 1 and "embed" in names else 0
    local = tokens / (sizes["data"] * sizes["fsdp"] * sizes["expert"] * sizes["context"]) * model.embed_dim * 2
    layers = kind_of(config).num_main_layers + kind_of(config).num_blocks
    sent = 3 * gathered * config.training.grad_accum_steps
    sent += 12 * layers * local if sizes["tensor"] > 1 else 0
    sent += 6 * layers * local * model.num_experts_per_token if sizes["expert"] > 1 else 0
    if sizes["context"] > 1:
        kind = kind_of(config)
        specs = layer_specs(model, kind.num_main_layers) + [kind.layer_spec] * kind.num_blocks
        read = sum(attention_of(model).cache_size(model, spec.attention) for spec in specs)
        sent += 4 * local / model.embed_dim * read * (sizes["context"] - 1)
    return max(compute, sent / links)


def table(found: list[Found], config_path: str, topology: Topology) -> str:
    """Returns the ranked candidates as text, with the command of the best."""
    lines = ["rank  " + HEADER]
    lines += [f"{rank:4d}  {_line(one)}" for rank, one in enumerate(found, 1)]
    best = found[0]
    if math.isinf(best.seconds):
        return "\n".join([*lines, "none of them fits: use more chips, a smaller batch, or --tries=N to try more"])
    command = f"python -m mtp_jax.tools.train --config={config_path} --workdir=DIR"
    settings = " ".join(overrides(best.candidate.config))
    return "\n".join([*lines, "", f"the best on {topology.name}:", f"  {command} {settings}"])


HEADER = "mesh; micro-batches; remat                     GiB  step, s  bound    MFU"


def _line(found: Found) -> str:
    config = found.candidate.config
    mesh = " ".join(f"{name}={size}" for name, size in asdict(config.mesh).items() if size > 1)
    name = f"{mesh}; {config.training.grad_accum_steps}; {config.model.remat}"
    plan = found.plan
    if plan is None:
        return f"{name:44s} refused: {found.why[:60]}"
    if not plan.fits or plan.roofline is None:
        return f"{name:44s} {plan.needs_gib:5.1f}  does not fit"
    bounds = plan.roofline
    return f"{name:44s} {plan.needs_gib:5.1f}  {bounds.seconds:7.3f}  {bounds.bound:8s} {100 * bounds.mfu:4.1f} %"


def overrides(config: Config) -> list[str]:
    """Returns the flags that turn the config file's config into this one."""
    mesh = [f"--config.mesh.{name}={size}" for name, size in asdict(config.mesh).items()]
    steps = config.training.grad_accum_steps
    return [*mesh, f"--config.model.remat={config.model.remat}", f"--config.training.grad_accum_steps={steps}"]


def to_json(found: Found) -> JsonObject:
    """Returns a candidate's overrides, the reason if it was refused, and its plan if it has one."""
    plan = estimate.to_json(found.plan) if found.plan else None
    return {"overrides": overrides(found.candidate.config), "refused": found.why, "plan": plan}
