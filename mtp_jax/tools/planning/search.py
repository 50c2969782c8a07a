"""Trying meshes, recomputation and batch sizes: pruned by arithmetic, then compiled, then ranked.

What is fixed is the topology, the model and the tokens a step: where a batch is too large for the chips, it is cut into
more micro-batches, and never changed. Every candidate's memory and time are first estimated from sizes alone; the
estimate leaves out what the compiler adds, so only what is hopeless is dropped, and the most promising are compiled.
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
from mtp_jax.sharding import spec
from mtp_jax.tools.planning import estimate
from mtp_jax.tools.planning.compile import CompilerError, resolve
from mtp_jax.tools.planning.estimate import GIB, Plan
from mtp_jax.tools.planning.topology import Topology
from mtp_jax.training.flops import train_flops_per_token
from mtp_jax.typing import JsonObject

EXECUTED = {"none": 1.0, "dots": 1.1, "full": 4 / 3}  # work over the model's own: all of the forward pass again at most
KEPT = {"none": 34, "dots": 12, "full": 1}  # saved numbers a token and layer, in units of the model dim; 2205.05198


@dataclass(frozen=True)
class Candidate:
    """A config to try, and what arithmetic says of it: GiB a device, seconds a step."""

    config: Config
    gib: float
    seconds: float


@dataclass(frozen=True)
class Found:
    """A compiled candidate; plan is None where the compiler refused it, for the reason in `why`."""

    candidate: Candidate
    plan: Plan | None
    why: str = ""

    @property
    def seconds(self) -> float:
        """A step's bound; infinite where it does not fit."""
        return self.plan.roofline.seconds if self.plan and self.plan.fits and self.plan.roofline else math.inf


def search(config: Config, topology: Topology, num_tries: int) -> list[Found]:
    """Compile the `num_tries` most promising candidates; the fastest first.

    Raises:
      UserError: nothing can run there, or nothing comes near to fitting.
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
    chosen = sorted(hopeful, key=_promise)[:num_tries]
    print(f"{len(everything)} candidates, {len(hopeful)} may fit, compiling {len(chosen)}", file=sys.stderr, flush=True)
    found = []
    for number, candidate in enumerate(chosen, 1):
        started = time.perf_counter()
        found.append(_try(candidate, topology))
        took = time.perf_counter() - started
        print(f"[{number}/{len(chosen)}] {_line(found[-1])}  ({took:.0f} s)", file=sys.stderr, flush=True)
    return sorted(found, key=lambda f: f.seconds)


def _promise(candidate: Candidate) -> tuple[float, int, float]:
    """Fast first; what is as fast to two digits by fewer micro-batches, then by less memory."""
    return float(f"{candidate.seconds:.2g}"), candidate.config.training.grad_accum_steps, candidate.gib


def _try(candidate: Candidate, topology: Topology) -> Found:
    try:
        return Found(candidate, estimate.make_plan(candidate.config, topology))
    except (CompilerError, ValueError, NotImplementedError) as error:
        return Found(candidate, None, first_line(error))


def candidates(config: Config, topology: Topology) -> Iterator[Candidate]:
    """Every mesh whose axes multiply to the devices and divide the config, with every remat policy, in as few
    micro-batches as arithmetic allows and in twice and four times as many."""
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
    """Axis sizes that multiply to the devices. data joins slices only: within one, fsdp does all that data does with
    less memory. Heads, experts and positions are cut 16 ways at most, beyond which their exchanges rule the step."""
    for expert, context, tensor in itertools.product((1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8, 16), (1, 2, 4, 8, 16)):
        cut = num_slices * expert * context * tensor
        if num_devices % cut == 0:
            fsdp = num_devices // cut
            yield {"data": num_slices, "fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}


def memory_gib(config: Config, sizes: dict[str, int]) -> float:
    """State, gradients and saved activations of a device, GiB; what a layer needs while it runs is left out."""
    model, moments = config.model, 2 if config.optimizer.moment_dtype == "bfloat16" else 4
    param_bytes = 4 if model.param_dtype == "float32" else 2
    moment_count = 2 if config.optimizer.name == "adamw" else 1
    state = 0.0
    for _, info, leaf in weights(config.architecture):  # weight, moments, gradient
        cut = math.prod(sizes[axis] for axes in spec(info.axes) for axis in _names(axes))
        state += leaf.size / cut * (param_bytes + moment_count * moments + 4)
    rows = config.data.batch_size / config.training.grad_accum_steps / (sizes["data"] * sizes["fsdp"] * sizes["expert"])
    tokens = rows * config.data.sequence_length / sizes["context"]
    layers = kind_of(config).num_main_layers + kind_of(config).num_blocks
    kept = KEPT[model.remat] / (sizes["tensor"] if model.remat != "full" else 1)
    dtype = 2 if model.compute_dtype == "bfloat16" else 4
    return (state + tokens * layers * model.embed_dim * kept * dtype) / GIB


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def step_seconds(config: Config, sizes: dict[str, int], topology: Topology) -> float:
    """The slower of matrix units and links, seconds: weights collected over fsdp three times a micro-batch, activations
    over tensor, tokens over expert, what attention reads of other positions over context."""
    model, chip = config.model, topology.chip
    num_devices = math.prod(sizes.values())
    tokens = config.data.batch_size * config.data.sequence_length
    compute = train_flops_per_token(config) * tokens * EXECUTED[model.remat] / num_devices / chip.flops
    links = 2 * chip.link_bandwidth * len([n for n in topology.shape if n > 1])
    gathered = 0.0
    for _, info, leaf in weights(config.architecture):
        names = set(info.axes)
        cut = sizes["expert"] if "experts" in names else 1
        cut *= sizes["tensor"] if names & {"heads", "kv_heads", "ffn", "vocab"} else 1
        gathered += 2 * leaf.size / cut if sizes["fsdp"] > 1 and "embed" in names else 0
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
    """Ranked lines, and the command of the best."""
    lines = ["rank  " + HEADER]
    lines += [f"{rank:4d}  {_line(one)}" for rank, one in enumerate(found, 1)]
    best = found[0]
    if math.isinf(best.seconds):
        return "\n".join([*lines, "none of them fits: use more chips, a smaller batch, or --tries=N to try more"])
    command = f"python train.py --config={config_path} --workdir=DIR {' '.join(overrides(best.candidate.config))}"
    return "\n".join([*lines, "", f"the best on {topology.name}:", f"  {command}"])


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
    """What makes the config file's config this one."""
    mesh = [f"--config.mesh.{name}={size}" for name, size in asdict(config.mesh).items()]
    steps = config.training.grad_accum_steps
    return [*mesh, f"--config.model.remat={config.model.remat}", f"--config.training.grad_accum_steps={steps}"]


def to_json(found: Found) -> JsonObject:
    """One candidate's line, and its whole plan where there is one."""
    plan = estimate.to_json(found.plan) if found.plan else None
    return {"overrides": overrides(found.candidate.config), "refused": found.why, "plan": plan}
