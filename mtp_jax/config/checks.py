"""Checks of several fields together, which reject a config that cannot run before anything is built."""

import dataclasses
import math
import re

from mtp_jax.config.fields import UserError, check_bounds
from mtp_jax.config.schema import (
    Config,
    DataConfig,
    MeshConfig,
    MixtureConfig,
    ModelConfig,
    RopeConfig,
    SourceConfig,
    TrainingConfig,
    ValidationConfig,
)


def validate(config: Config, num_devices: int, tokenizer_size: int | None = None) -> None:
    """Checks that a config can run.

    Args:
      config: the run.
      num_devices: devices the mesh must fill, over all processes.
      tokenizer_size: ids the tokenizer can produce, if known.

    Raises:
      UserError: on the first problem, naming field, value and remedy.
    """
    check_bounds(config, {config.model.attention, "moe"} if config.model.num_experts > 0 else {config.model.attention})
    _check_pattern(config.model)
    _check_rope(config.model.rope)
    _check_experts(config)
    check_data(config.data)
    _check_training(config)
    sizes = mesh_sizes(config.mesh, num_devices)
    _check_mesh(config, sizes)
    vocab = config.model.vocab_size
    if tokenizer_size is not None and vocab is not None and vocab < tokenizer_size:
        raise UserError(
            f"model.vocab_size={vocab}: smaller than the tokenizer's {tokenizer_size} "
            f"(data.tokenizer={config.data.tokenizer}); use at least {tokenizer_size}"
        )


def mesh_sizes(mesh: MeshConfig, num_devices: int) -> dict[str, int]:
    """Returns the axis sizes with -1 resolved.

    Raises:
      UserError: more than one -1, a size below 1, or a product that is not `num_devices`.
    """
    sizes = dataclasses.asdict(mesh)
    free = [name for name, size in sizes.items() if size == -1]
    bad = [f"mesh.{n}={s}" for n, s in sizes.items() if s < 1 and s != -1]
    if bad:
        raise UserError(f"{bad[0]}: an axis is at least 1, or -1 for the devices that are left")
    if len(free) > 1:
        raise UserError(f"mesh.{free[0]}=-1 and mesh.{free[1]}=-1: only one axis may be -1")
    product = math.prod(size for size in sizes.values() if size != -1)
    shown = ", ".join(f"{n}={s}" for n, s in sizes.items())
    if num_devices % product or (not free and product != num_devices):
        raise UserError(f"mesh ({shown}): takes {product} devices, there are {num_devices}; set one axis to -1")
    if free:
        sizes[free[0]] = num_devices // product
    return sizes


def profiled_steps(training: TrainingConfig) -> range:
    """Returns the steps of training.profile, the first and the last included; empty if there are none.

    Raises:
      UserError: it is not two numbers of steps in order.
    """
    if not training.profile:
        return range(0)
    found = re.fullmatch(r"(\d{1,10}):(\d{1,10})", training.profile)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not 1 <= first <= last:
        raise UserError(
            f"training.profile={training.profile!r}: must be the first and the last step to trace, such as 10:12"
        )
    return range(first, last + 1)


def _check_training(config: Config) -> None:
    profiled_steps(config.training)
    try:
        config.training.sample_prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"training.sample_prompt={ascii(config.training.sample_prompt)}: character {error.start} is not text "
            "(half of a surrogate pair, or a byte that is not UTF-8); remove it"
        ) from error
    if config.training.eval_every and not config.data.validation_fraction and not config.data.validation:
        raise UserError(
            f"training.eval_every={config.training.eval_every}: there are no held-out documents "
            "(data.validation_fraction=0); raise that, name a set in data.validation, or set training.eval_every=0"
        )


def check_data(data: DataConfig) -> None:
    """Checks the sources of a config.

    Raises:
      UserError: keys that contradict each other or would have no effect, naming both.
    """
    if data.mixture:
        for own in dataclasses.fields(SourceConfig):
            value = getattr(data, own.name)
            if value != own.default:
                raise UserError(f"data.{own.name}={value!r}: of no effect beside data.mixture; set it for its sources")
    named: dict[str, MixtureConfig | ValidationConfig] = {
        f"data.mixture[{i}].": each for i, each in enumerate(data.mixture)
    }
    named |= {f"data.validation[{i}].": each for i, each in enumerate(data.validation)}
    names: set[str] = set()
    for key, source in named.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", source.name) or source.name in ("train", "validation"):
            raise UserError(
                f"{key}name={source.name!r}: must be a word of a-z, 0-9 and _, other than train and validation"
            )
        if source.name in names:
            raise UserError(f"{key}name={source.name!r}: is the name of another source; use a name of its own")
        names.add(source.name)
    sources: dict[str, SourceConfig] = {**({} if data.mixture else {"data.": data}), **named}
    for key, each in sources.items():
        _check_source(key, each, 0.0 if isinstance(each, ValidationConfig) else data.fim_rate)


def _check_source(key: str, source: SourceConfig, fim_rate: float) -> None:
    form = f"{key}records={source.records}"
    if source.records != "text" and source.source in ("python_source", "synthetic"):
        raise UserError(f"{form}: {key}source={source.source} has texts only; use text_files or a dataset")
    if source.records in ("chat", "prompt") and source.packing == "contiguous":
        raise UserError(f"{key}packing=contiguous: with {form} one conversation would see another; use packed or whole")
    if source.weights_field and source.records != "tokens":
        raise UserError(f"{key}weights_field={source.weights_field!r}: of no effect with {form}; use records=tokens")
    if fim_rate and (source.records != "text" or source.packing == "whole"):
        other = form if source.records != "text" else f"{key}packing=whole"
        raise UserError(f"data.fim_rate={fim_rate}: not with {other}, only with texts that may be split; use 0")


def _check_pattern(model: ModelConfig) -> None:
    pattern = model.local.pattern
    if model.local.window and (not pattern or set(pattern) - {"L", "G"} or "L" not in pattern):
        raise UserError(
            f"model.local.pattern={pattern!r}: a string of L (local) and G (global) with at least one L; L alone makes "
            "every layer local"
        )


def _check_rope(rope: RopeConfig) -> None:
    factors = {
        "linear_factor": rope.linear_factor,
        "llama3.factor": rope.llama3.factor,
        "yarn.factor": rope.yarn.factor,
    }
    stretched = [f"model.rope.{name}" for name, factor in factors.items() if factor > 1]
    if len(stretched) > 1:
        raise UserError(f"{stretched[0]} and {stretched[1]}: both above 1; positions are stretched one way")
    low, high = rope.llama3.low_frequency, rope.llama3.high_frequency
    if rope.llama3.factor > 1 and not 0 < low < high:
        raise UserError(
            f"model.rope.llama3.low_frequency={low}: must lie between 0 and model.rope.llama3.high_frequency={high}"
        )


MAX_DEPTH = 16


def _check_experts(config: Config) -> None:
    m = config.model
    if not m.num_experts:
        return
    if not 1 <= m.num_experts_per_token <= m.num_experts:
        limit = f"model.num_experts={m.num_experts}"
        raise UserError(f"model.num_experts_per_token={m.num_experts_per_token}: must lie between 1 and {limit}")
    if m.num_experts % m.router.num_groups:
        raise UserError(
            f"model.router.num_groups={m.router.num_groups}: does not divide model.num_experts={m.num_experts}"
        )
    if not 1 <= m.router.groups_per_token <= m.router.num_groups:
        limit = f"model.router.num_groups={m.router.num_groups}"
        raise UserError(f"model.router.groups_per_token={m.router.groups_per_token}: must lie between 1 and {limit}")
    reachable = m.num_experts // m.router.num_groups * m.router.groups_per_token
    if reachable < m.num_experts_per_token:
        raise UserError(
            f"model.num_experts_per_token={m.num_experts_per_token}: the chosen groups hold only {reachable} experts; "
            "raise model.router.groups_per_token"
        )
    if m.num_dense_layers >= m.num_layers:
        raise UserError(
            f"model.num_dense_layers={m.num_dense_layers}: leaves no layer of model.num_layers={m.num_layers} to the "
            "experts; lower it, or set model.num_experts=0"
        )


def _check_mesh(config: Config, sizes: dict[str, int]) -> None:
    model, data = config.model, config.data
    rows = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    micro = data.batch_size // config.training.grad_accum_steps
    if data.batch_size % config.training.grad_accum_steps or micro % rows:
        times = f" x training.grad_accum_steps={config.training.grad_accum_steps}" if data.batch_size != micro else ""
        raise UserError(
            f"data.batch_size={data.batch_size}: does not divide over the mesh's data={sizes['data']} x "
            f"fsdp={sizes['fsdp']} x expert={sizes['expert']}{times}; use a multiple of "
            f"{rows * config.training.grad_accum_steps}"
        )
    pairs = [("context", "data.sequence_length", data.sequence_length), ("tensor", "model.num_heads", model.num_heads)]
    if model.vocab_size:
        pairs.append(("tensor", "model.vocab_size", model.vocab_size))
    if model.num_experts:
        pairs.append(("expert", "model.num_experts", model.num_experts))
        pairs.append(("tensor", "model.expert_dim", model.expert_dim))
    pairs.append(("tensor", "model.ffn_dim", model.ffn_dim))
    if model.embed_dim % (sizes["fsdp"] * sizes["expert"]):
        raise UserError(
            f"mesh.fsdp={sizes['fsdp']} x mesh.expert={sizes['expert']}: does not divide model.embed_dim="
            f"{model.embed_dim}, which both shard"
        )
    for axis, key, value in pairs:
        if value % sizes[axis]:
            raise UserError(f"mesh.{axis}={sizes[axis]}: does not divide {key}={value}")
    if sizes["expert"] > 1 and not model.num_experts:
        raise UserError(f"mesh.expert={sizes['expert']}: the model has no experts; use mesh.data or mesh.fsdp")
