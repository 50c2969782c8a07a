"""The configuration: frozen dataclasses, how a config file becomes one, and what is refused.

A config file is Python with a `get_config()` that returns an `ml_collections.ConfigDict`; `default_config()` gives it
one to start from. ConfigDict ends here: `load_config` turns it once into a frozen `Config`, and everything else sees
only that. Each section belongs to the component of its name.
"""

import ast
import dataclasses
import difflib
import importlib.util
import pathlib
import traceback
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

import ml_collections


class UserError(ValueError):
    """An input that cannot be used. The message is one line: the field, its value, the remedy. Exit code 2."""


@dataclass(frozen=True)
class ModelConfig:
    """The main model: DeepSeek-V3's architecture (2412.19437), every piece switchable.

    Raises nothing itself: `validate` checks a whole `Config`.
    """

    vocab_size: int | None = None  # None: the tokenizer's own, rounded up to a multiple of 8
    num_layers: int = 4  # blocks of the main model; parallel heads take theirs from these (mtp.parameter_matched)
    embed_dim: int = 128
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    init_std: float = 0.02
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full", "dots"] = "none"  # dots: keep matmul outputs, recompute the rest

    attention: Literal["mla", "gqa"] = "mla"
    num_heads: int = 4
    # multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1)
    q_lora_rank: int = 0  # 0: queries are projected directly
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    # grouped-query attention
    num_kv_heads: int = 4
    head_dim: int = 32
    qk_norm: bool = False
    qkv_bias: bool = False
    rotary_fraction: float = 1.0  # of head_dim; the rest of the head is not rotated
    # rotary positions; YaRN (2309.00071) is on when yarn_factor > 1
    rope_theta: float = 10_000.0
    rope_interleaved: bool = True  # pairs (2i, 2i+1) as DeepSeek; False: (i, i + n/2) as Llama
    yarn_factor: float = 1.0
    yarn_original_length: int = 4096
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    yarn_mscale: float = 1.0
    yarn_mscale_all_dim: float = 0.0  # 0: YaRN's own attention factor, 0.1 ln(factor) + 1

    # feed-forward: dense SwiGLU, or DeepSeekMoE (2401.06066) from block num_dense_layers on
    ffn_dim: int = 512
    num_experts: int = 0  # 0: every block is dense
    num_dense_layers: int = 1  # leading dense blocks of a mixture-of-experts model
    num_experts_per_token: int = 2
    num_shared_experts: int = 1
    expert_dim: int = 128
    router_score: Literal["sigmoid", "softmax"] = "sigmoid"
    router_num_groups: int = 1
    router_groups_per_token: int = 1
    router_group_score: Literal["top2_sum", "max"] = "top2_sum"  # V3: sum of the two best; V2: the best
    router_renormalize: bool = True
    routed_scaling_factor: float = 1.0
    router_bias_rate: float = 1e-3  # gamma of the auxiliary-loss-free balancing; 0: off
    router_bias_until: int = 0  # step after which gamma is 0; 0: never
    balance_loss_weight: float = 1e-4  # alpha of the sequence-wise balance loss
    moe_dispatch: Literal["auto", "dense", "ragged"] = "auto"


@dataclass(frozen=True)
class MTPConfig:
    """Multi-token prediction: which extra heads, how they are wired and how they are weighted."""

    kind: Literal["none", "parallel", "sequential"] = "none"
    depth: int = 1  # D extra tokens; ignored when kind is none
    # lambda: L = L_0 + lambda * sum_k w_k L_k / sum_k w_k. None: 0.3 (sequential), or depth (parallel), which makes
    # the plain sum of 2404.19737
    weight: float | None = None
    weight_values: tuple[float, ...] = ()  # lambda from each boundary on
    weight_boundaries: tuple[int, ...] = ()
    weight_unit: Literal["steps", "tokens"] = "steps"
    depth_decay: float = 1.0  # beta: w_k = beta^(k-1)
    normalize: Literal["paper", "valid"] = "paper"  # divide L_k by the valid depth-0 targets, or by depth k's own
    curriculum: Literal["none", "forward", "reverse"] = "none"  # active depths 1 -> D or D -> 1, evenly over training
    parameter_matched: bool = True  # parallel heads take their blocks from model.num_layers
    shared_depths: bool = False  # one sequential module for every depth
    detach_trunk: bool = False  # no MTP gradient reaches the main model
    freeze_trunk: bool = False  # only the MTP modules train
    # conventions of released checkpoints; "family" takes them from the preset, a non-empty value overrides it
    family: Literal["deepseek_v3", "glm4_moe", "mimo", "qwen3_next", "mimo_v2_flash", "glm5"] = "deepseek_v3"
    concat_order: Literal["", "embedding_first", "hidden_first"] = ""
    trunk_hidden: Literal["", "after_norm", "before_norm"] = ""  # h_0, seen from the main final norm
    recycled_hidden: Literal["", "after_norm", "before_norm"] = ""  # h_k, k >= 1, seen from its own output norm
    output_norm: Literal["", "own", "main"] = ""
    chain: Literal["", "previous", "trunk"] = ""  # what depth k + 1 receives


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it is cut into rows."""

    # python_source, text_files, synthetic, or the name of a TFDS dataset with a text feature
    source: str = "python_source"
    files: str = ""  # text_files: comma-separated globs of .txt, .md, .py ... or .jsonl
    text_field: str = "text"  # jsonl field or TFDS feature
    split: str = "train"  # TFDS split
    tfds_dir: str = ""  # TFDS data_dir; empty: TFDS's own default
    tokenizer: str = "bytes"  # bytes, or the path of a Hugging Face tokenizer.json
    sequence_length: int = 256  # T; a row carries T + 1 + D tokens
    batch_size: int = 8  # rows a step over all devices
    packing: Literal["packed", "contiguous"] = "packed"  # packed: documents do not see each other
    shuffle: bool = True  # documents in the stream, and rows in the batches
    validation_fraction: float = 0.02  # of the documents, by hash
    max_document_chars: int = 32_768  # plain text files are cut at blank lines into documents of about this length
    fim_rate: float = 0.0  # share of the training documents rearranged prefix, suffix, middle (2207.14255)
    cache_dir: str = ""  # empty: $MTP_JAX_CACHE or ~/.cache/mtp_jax
    num_workers: int = 0  # processes; 0: threads of this one
    prefetch: int = 4  # batches ready ahead of the step
    synthetic_documents: int = 2000


@dataclass(frozen=True)
class OptimizerConfig:
    """optax: AdamW or Muon, its schedule and its clip."""

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine", "wsd", "deepseek"] = "cosine"
    warmup_steps: int = 100
    final_fraction: float = 0.1  # of the peak, at the end of cosine and wsd
    decay_fraction: float = 0.2  # wsd: share of the steps spent in the final decay
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only
    clip_norm: float = 1.0  # 0: off
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    muon_momentum: float = 0.95
    muon_steps: int = 5  # Newton-Schulz iterations


@dataclass(frozen=True)
class TrainingConfig:
    """The loop: how long, how the batch is cut, what is reported when."""

    num_steps: int = 1000
    log_every: int = 10
    accumulate_steps: int = 1  # micro-batches a step; the result does not depend on it
    loss_chunk: int = 4096  # tokens whose logits exist at one time
    z_loss_weight: float = 0.0
    eval_batches: int = 16  # validation batches of the closing table
    sample_prompt: str = "def "
    sample_tokens: int = 200


@dataclass(frozen=True)
class CheckpointConfig:
    """orbax: how often, how many."""

    every: int = 500
    keep: int = 3
    async_save: bool = True


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1, the rest of the devices."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class Config:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    mtp: MTPConfig = field(default_factory=MTPConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    seed: int = 0
    init_from: str = ""  # a workdir whose matching weights start this run

    @property
    def depth(self) -> int:
        """D: extra tokens predicted at each position; 0 for next-token models."""
        return 0 if self.mtp.kind == "none" else self.mtp.depth

    @property
    def num_main_layers(self) -> int:
        """Blocks on the path to the next token. Matched parallel heads are taken out of model.num_layers."""
        gives_up = self.depth if self.mtp.kind == "parallel" and self.mtp.parameter_matched else 0
        return self.model.num_layers - gives_up


@dataclass(frozen=True)
class Conventions:
    """How one family of released checkpoints wires its sequential MTP modules."""

    concat_order: str = "embedding_first"
    trunk_hidden: str = "after_norm"
    recycled_hidden: str = "before_norm"
    output_norm: str = "own"
    chain: str = "previous"


CONVENTIONS = {
    "deepseek_v3": Conventions(),
    "glm4_moe": Conventions(),
    "glm5": Conventions(recycled_hidden="after_norm"),
    "mimo": Conventions(concat_order="hidden_first"),
    "mimo_v2_flash": Conventions(chain="trunk"),
    "qwen3_next": Conventions(),
}


def conventions(mtp: MTPConfig) -> Conventions:
    """The family's preset with the explicit overrides of `mtp`."""
    preset = CONVENTIONS[mtp.family]
    names = [f.name for f in dataclasses.fields(Conventions)]
    return dataclasses.replace(preset, **{n: getattr(mtp, n) for n in names if getattr(mtp, n)})


# ---------------------------------------------------------------------------------------------------------------
# ConfigDict <-> Config


def default_config() -> ml_collections.ConfigDict:
    """Every key with its default, for a config file to change. Setting a key that does not exist raises."""
    return to_config_dict(Config())


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """The locked ConfigDict of a Config; fields that may be None become typed placeholders."""
    out = ml_collections.ConfigDict(dataclasses.asdict(config))
    for key, (_, hint) in _leaves(Config).items():
        *parents, name = key.split(".")
        section = out
        for parent in parents:
            section = section[parent]
        if type(None) in typing.get_args(hint) and section[name] is None:
            kind = next(a for a in typing.get_args(hint) if a is not type(None))
            section[name] = ml_collections.config_dict.placeholder(kind)
    return out.lock()


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain dict, as written to a workdir's config.json."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], where: str) -> Config:
    """A Config from nested plain values.

    Args:
      values: any subset of the keys; the rest take their defaults.
      where: the file the values come from, named in errors.

    Raises:
      UserError: an unknown key (with the nearest real one) or a value of the wrong type.
    """
    leaves = _leaves(Config)
    for key, value in _flatten(values).items():
        if key not in leaves:
            is_section = any(leaf.startswith(key + ".") for leaf in leaves)
            if is_section and value == {}:
                continue
            raise _unknown_key(key, where)
    return _build(Config, values, "", where)


def load_config(path: str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Run a config file and apply command-line overrides.

    Args:
      path: a Python file with `get_config()`.
      overrides: strings `--config.section.key=value`; tuples in Python syntax, `true`/`false` for booleans.

    Raises:
      UserError: no such file, a file that does not run, an unknown key, a value of the wrong type.
    """
    values = _run_config_file(path)
    from_dict(values, path)  # the file's own mistakes are reported before the command line's
    leaves = _leaves(Config)
    for override in overrides:
        key, value = _parse_override(override)
        if key not in leaves:
            raise _unknown_key(key, "the command line")
        _set(values, key, _from_text(value, leaves[key][1]))
    return from_dict(values, "the command line" if overrides else path)


def _run_config_file(path: str) -> dict[str, Any]:
    if not pathlib.Path(path).is_file():
        raise UserError(f"--config={path}: no such file; give a Python file with get_config(), as in configs/")
    spec = importlib.util.spec_from_file_location("config_file", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"--config={path}: has no get_config()")
        config = module.get_config()
    except UserError:
        raise
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        line = f" (line {frames[-1].lineno})" if frames else ""
        message = str(error).strip().strip("'\"").splitlines() or [type(error).__name__]
        raise UserError(f"{path}{line}: {message[0]}") from error
    if isinstance(config, ml_collections.ConfigDict):
        return config.to_dict()
    if isinstance(config, dict):
        return config
    raise UserError(f"{path}: get_config() returned {type(config).__name__}; return a ml_collections.ConfigDict")


def _parse_override(override: str) -> tuple[str, str]:
    name, equals, value = override.partition("=")
    if not name.startswith("--config.") or not equals:
        raise UserError(f"{override}: not understood; overrides read --config.section.key=value")
    return name[len("--config.") :], value


def _from_text(text: str, hint: Any) -> Any:
    """The value a command-line string stands for; what does not parse stays a string for the type check."""
    kinds = typing.get_args(hint) if _is_union(hint) else (hint,)
    if str in kinds or typing.get_origin(hint) is Literal:
        return text
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _leaves(cls: type, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (owning dataclass, type hint), for every key that holds a value."""
    out: dict[str, tuple[Any, Any]] = {}
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        if dataclasses.is_dataclass(hint):
            out |= _leaves(typing.cast(type, hint), f"{prefix}{f.name}.")
        else:
            out[prefix + f.name] = (cls, hint)
    return out


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            out |= _flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, name = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
    values[name] = value


def _unknown_key(key: str, where: str) -> UserError:
    leaves = list(_leaves(Config))
    near = difflib.get_close_matches(key, leaves, 1, 0.0)
    same_name = [leaf for leaf in leaves if leaf.split(".")[-1] == key.split(".")[-1]]
    nearest = (same_name or near)[0]
    return UserError(f"{key}: no such config key (in {where}); did you mean {nearest}?")


def _build(cls: Any, values: dict[str, Any], prefix: str, where: str) -> Any:
    hints = typing.get_type_hints(cls)
    arguments = {}
    for f in dataclasses.fields(cls):
        if f.name not in values:
            continue
        hint, value, key = hints[f.name], values[f.name], prefix + f.name
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise UserError(f"{key}={value!r} (in {where}): is a section; set one of its keys")
            arguments[f.name] = _build(hint, value, f"{key}.", where)
        else:
            arguments[f.name] = _typed(value, hint, key, where)
    return cls(**arguments)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _typed(value: Any, hint: Any, key: str, where: str) -> Any:
    """`value` as the type `hint` asks for, or a UserError that says what was wanted."""
    if _is_union(hint):
        if value is None:
            return None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value in choices:
            return value
        wanted = " or ".join(repr(c) for c in choices if c != "")
        raise UserError(f"{key}={value!r} (in {where}): must be {wanted}")
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if isinstance(value, (tuple, list)):
            return tuple(_typed(v, item, key, where) for v in value)
        raise UserError(f"{key}={value!r} (in {where}): must be a tuple of {item.__name__}, as in (1, 2)")
    is_bool = isinstance(value, bool)
    if hint is float and isinstance(value, (int, float)) and not is_bool:
        return float(value)
    if isinstance(value, hint) and is_bool == (hint is bool):
        return value
    raise UserError(f"{key}={value!r} (in {where}): must be of type {hint.__name__}, not {type(value).__name__}")


# ---------------------------------------------------------------------------------------------------------------
# Checks that need more than one field


def validate(config: Config, num_devices: int, tokenizer_size: int | None = None) -> None:
    """Refuse what cannot run.

    Args:
      config: the run.
      num_devices: devices the mesh must fill, over all processes.
      tokenizer_size: ids the tokenizer can produce, when it is known.

    Raises:
      UserError: on the first problem, naming field, value and remedy.
    """
    _check_positive(config)
    _check_mtp(config)
    _check_experts(config)
    sizes = mesh_sizes(config.mesh, num_devices)
    _check_mesh(config, sizes)
    vocab = config.model.vocab_size
    if tokenizer_size is not None and vocab is not None and vocab < tokenizer_size:
        raise UserError(
            f"model.vocab_size={vocab}: smaller than the tokenizer's {tokenizer_size} "
            f"(data.tokenizer={config.data.tokenizer}); use at least {tokenizer_size}"
        )


def mesh_sizes(mesh: MeshConfig, num_devices: int) -> dict[str, int]:
    """Axis sizes with -1 filled in.

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
    product = 1
    for size in sizes.values():
        product *= size if size != -1 else 1
    shown = ", ".join(f"{n}={s}" for n, s in sizes.items())
    if num_devices % product or (not free and product != num_devices):
        raise UserError(f"mesh ({shown}): takes {product} devices, there are {num_devices}; set one axis to -1")
    if free:
        sizes[free[0]] = num_devices // product
    return sizes


def _check_positive(config: Config) -> None:
    keys = [
        *("model.num_layers", "model.embed_dim", "model.num_heads", "model.ffn_dim", "model.kv_lora_rank"),
        *("data.sequence_length", "data.batch_size", "data.prefetch", "data.max_document_chars"),
        *("training.num_steps", "training.log_every", "training.accumulate_steps", "training.loss_chunk"),
        *("checkpoint.every", "checkpoint.keep", "training.eval_batches"),
    ]
    for key in keys:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value < 1:
            raise UserError(f"{key}={value}: must be at least 1")
    for key in ("data.validation_fraction", "data.fim_rate", "optimizer.final_fraction", "optimizer.decay_fraction"):
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if not 0.0 <= value <= 1.0:
            raise UserError(f"{key}={value}: must lie between 0 and 1")
    rope_dim = config.model.qk_rope_head_dim
    if config.model.attention == "mla" and (rope_dim % 2 or rope_dim < 2):
        raise UserError(f"model.qk_rope_head_dim={rope_dim}: rotary dimensions come in pairs; use an even number")
    if config.model.attention == "gqa" and config.model.num_heads % config.model.num_kv_heads:
        raise UserError(
            f"model.num_kv_heads={config.model.num_kv_heads}: does not divide model.num_heads={config.model.num_heads}"
        )


MAX_DEPTH = 16


def _check_mtp(config: Config) -> None:
    mtp = config.mtp
    if mtp.kind == "none":
        return
    if not 1 <= mtp.depth <= MAX_DEPTH:
        raise UserError(f"mtp.depth={mtp.depth}: must lie between 1 and {MAX_DEPTH}; for no MTP set mtp.kind=none")
    if config.num_main_layers < 2 and mtp.kind == "parallel":
        raise UserError(
            f"mtp.depth={mtp.depth}: parallel heads take {mtp.depth} of model.num_layers={config.model.num_layers} and "
            f"leave no trunk; use a depth of at most {config.model.num_layers - 2}, more layers, or "
            "mtp.parameter_matched=false"
        )
    if len(mtp.weight_values) != len(mtp.weight_boundaries):
        raise UserError(
            f"mtp.weight_values={mtp.weight_values}: needs one value a boundary, "
            f"mtp.weight_boundaries={mtp.weight_boundaries}"
        )
    if list(mtp.weight_boundaries) != sorted(set(mtp.weight_boundaries)):
        raise UserError(f"mtp.weight_boundaries={mtp.weight_boundaries}: must increase")
    if mtp.depth_decay <= 0:
        raise UserError(f"mtp.depth_decay={mtp.depth_decay}: must be above 0")
    if mtp.shared_depths and mtp.kind == "parallel":
        raise UserError("mtp.shared_depths=true: parallel heads that share weights are one head; use mtp.kind=sequential")


def _check_experts(config: Config) -> None:
    m = config.model
    if not m.num_experts:
        return
    if not 1 <= m.num_experts_per_token <= m.num_experts:
        raise UserError(
            f"model.num_experts_per_token={m.num_experts_per_token}: must lie between 1 and model.num_experts={m.num_experts}"
        )
    if m.num_experts % m.router_num_groups:
        raise UserError(f"model.router_num_groups={m.router_num_groups}: does not divide model.num_experts={m.num_experts}")
    if not 1 <= m.router_groups_per_token <= m.router_num_groups:
        raise UserError(
            f"model.router_groups_per_token={m.router_groups_per_token}: must lie between 1 and "
            f"model.router_num_groups={m.router_num_groups}"
        )
    reachable = m.num_experts // m.router_num_groups * m.router_groups_per_token
    if reachable < m.num_experts_per_token:
        raise UserError(
            f"model.num_experts_per_token={m.num_experts_per_token}: the chosen groups hold only {reachable} experts; "
            "raise model.router_groups_per_token"
        )
    if m.num_dense_layers < 0:
        raise UserError(f"model.num_dense_layers={m.num_dense_layers}: must be at least 0")


def _check_mesh(config: Config, sizes: dict[str, int]) -> None:
    model, data = config.model, config.data
    rows = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    micro = data.batch_size // config.training.accumulate_steps
    if data.batch_size % config.training.accumulate_steps or micro % rows:
        times = f" x training.accumulate_steps={config.training.accumulate_steps}" if data.batch_size != micro else ""
        raise UserError(
            f"data.batch_size={data.batch_size}: does not divide over the mesh's data={sizes['data']} x "
            f"fsdp={sizes['fsdp']} x expert={sizes['expert']}{times}; use a multiple of "
            f"{rows * config.training.accumulate_steps}"
        )
    pairs = [
        ("context", "data.sequence_length", data.sequence_length),
        ("tensor", "model.num_heads", model.num_heads),
        *([("tensor", "model.num_kv_heads", model.num_kv_heads)] if model.attention == "gqa" else []),
        *([("tensor", "model.vocab_size", model.vocab_size)] if model.vocab_size else []),
        *([("expert", "model.num_experts", model.num_experts)] if model.num_experts else []),
        ("tensor", "model.ffn_dim", model.ffn_dim),
        *([("tensor", "model.expert_dim", model.expert_dim)] if model.num_experts else []),
        ("fsdp", "model.embed_dim", model.embed_dim),
    ]
    for axis, key, value in pairs:
        if value % sizes[axis]:
            raise UserError(f"mesh.{axis}={sizes[axis]}: does not divide {key}={value}")
    if sizes["expert"] > 1 and not model.num_experts:
        raise UserError(f"mesh.expert={sizes['expert']}: the model has no experts; use mesh.data or mesh.fsdp")
