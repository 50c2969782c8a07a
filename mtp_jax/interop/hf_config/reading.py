"""config.json -> `Config`.

A key that nobody here knows is refused: it may change what the model computes. Sources: transformers' configuration and
modelling code; MTP layers as serving engines read them.
"""

import dataclasses
import json
import pathlib
import typing
from typing import Any

from mtp_jax.config import CONVENTIONS, Config, ModelConfig, MTPConfig, UserError, with_values
from mtp_jax.interop import hf_fields
from mtp_jax.interop.hf_fields import Layout, Values, bad, short, typed
from mtp_jax.model import validate
from mtp_jax.mtp import RELEASED

MODEL_TYPES = ("deepseek_v3", "deepseek_v2", "glm4_moe", "mimo", "llama", "qwen2", "qwen3")
ORIGINAL = "original_max_position_embeddings"
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")


def read_config(folder: str | pathlib.Path) -> Values:
    """config.json of a Hugging Face folder.

    Raises:
      UserError: no such folder, no config.json in it, not a JSON object, no model_type.
    """
    path = pathlib.Path(folder) / "config.json"
    if not path.parent.is_dir():
        raise UserError(f"{folder}: no such folder; give one that holds config.json and safetensors files")
    if not path.is_file():
        raise UserError(f"{folder}: holds no config.json; give the folder of a Hugging Face model")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: not JSON, or not text at all
        raise UserError(f"{path}: cannot be read as JSON ({error}); fetch the file again".replace("\n", " ")) from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, not an object; fetch the file again")
    if "model_type" not in values:
        raise UserError(f"{path}: field 'model_type' is missing; it names the layout, one of {', '.join(MODEL_TYPES)}")
    return values


def to_config(hf: Values, where: str, ignore: tuple[str, ...] = (), depth: int | None = None) -> Config:
    """The `Config` that a config.json describes; only its `model` and `mtp` differ from the defaults.

    Args:
      hf: the file's values. Absent keys take the defaults of transformers' class.
      where: the file, named in errors.
      ignore: unknown keys to accept; keys inside rope_scaling as "rope_scaling.NAME".
      depth: MTP depth to keep; 0 leaves the MTP layers out, None keeps what the file has.

    Raises:
      UserError: an unknown layout or key, a value that our model cannot hold or of the wrong type.
    """
    layout = layout_named(hf.get("model_type"), where)
    values = hf_fields.without_aliases(hf, layout, where)
    _check_known(hf, layout, where, ignore)
    config = read_values(values, layout, where, depth)
    try:
        validate(config, 1)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return config


def longest_text(hf: Values, where: str) -> int:
    """Tokens that the model of a config.json was made to read at once: max_position_embeddings, as transformers has it.

    Raises:
      UserError: an unknown layout, or a value that is no number of tokens.
    """
    layout = layout_named(hf.get("model_type"), where)
    value = _field(hf_fields.without_aliases(hf, layout, where), layout, where, "max_position_embeddings", int)
    if value < 2:
        raise bad(where, "max_position_embeddings", value, "leaves no room for a text; must be at least 2")
    return value


def layout_named(model_type: Any, where: str) -> Layout:
    """The layout of a model_type; raises UserError where it is none that we have, with the reason where it is known."""
    if isinstance(model_type, str) and model_type in hf_fields.LAYOUTS:
        return hf_fields.LAYOUTS[model_type]
    known = ", ".join(MODEL_TYPES)
    reason = hf_fields.NOT_HELD.get(model_type, "") if isinstance(model_type, str) else ""
    if reason:
        reason += ", which mtp_jax does not have; "
    raise UserError(f"{where}: field 'model_type'={short(model_type)} is not supported; {reason}use one of {known}")


def _check_known(hf: Values, layout: Layout, where: str, ignore: tuple[str, ...]) -> None:
    known = (
        hf_fields.IGNORED | layout.fields.keys() | layout.mixture.keys() | layout.fixed.keys() | layout.tolerated.keys()
    )
    known |= {hf_fields.MTP_KEY, hf_fields.WIRING_KEY, "quantization_config", "layer_types", *ROPE_KEYS, *ignore}
    known |= {alias for alias, key in hf_fields.ALIASES.items() if key in known}
    known |= set(hf_fields.WINDOW_KEYS) if "use_sliding_window" in layout.fixed else set()
    known |= {"num_key_value_heads", "head_dim", "qk_head_dim"} if layout.implied["attention"] == "mla" else set()
    known |= {"topk_method"} if layout.groups_by_method else set()
    remedy = f"is not one that mtp_jax knows for {hf['model_type']} and may change what the model computes; "
    for key, value in hf.items():
        if key not in known:
            raise bad(where, key, value, f"{remedy}if it does not, pass ignore={key}")
    for name in ("rope_scaling", "rope_parameters"):
        rope = hf.get(name)
        if not isinstance(rope, dict):
            continue
        kind = str(rope.get("rope_type", rope.get("type", "default")))
        rope_known = {
            *hf_fields.ROPE_COMMON,
            *hf_fields.ROPE_TYPES.get(kind, rope),
            *hf_fields.ROPE_FIXED.get(kind, {}),
        }
        for key in sorted(rope.keys() - rope_known):
            if f"{name}.{key}" not in ignore:
                raise bad(where, f"{name}.{key}", rope[key], f"{remedy}if it does not, pass ignore={name}.{key}")


def read_values(values: Values, layout: Layout, where: str, depth: int | None) -> Config:
    """The `Config` that values say, whose aliases are gone; raises UserError where our model cannot hold them."""
    for key, wanted in (layout.fixed | layout.tolerated).items():
        if values.get(key, wanted) != wanted:
            raise bad(where, key, values[key], f"is not supported; mtp_jax has {wanted!r} there")
    hf_fields.check_quantization(values.get("quantization_config"), where)
    fields = _read_fields(values, layout, where) | _read_rope(values, layout, where)
    model = with_values(ModelConfig(), fields)
    implied = {name: value for name, value in layout.implied.items() if counts(name, model)}
    model = with_values(model, implied)
    for key, wanted in derived(model).items():
        if values.get(key) is not None and values[key] != wanted:
            raise bad(where, key, values[key], f"is not supported; the other fields make it {short(wanted)}")
    return Config(model=model, mtp=_read_mtp(values, layout, where, depth))


def _read_fields(values: Values, layout: Layout, where: str) -> Values:
    out: Values = {}
    fields = dict(layout.fields)
    if layout.mixture:
        first, layers, experts = (
            _field(values, layout, where, key, int)
            for key in ("first_k_dense_replace", "num_hidden_layers", "n_routed_experts")
        )
        if experts and first < layers:
            fields |= layout.mixture
        else:
            out["num_experts"] = 0
    for key, name in fields.items():
        if name in ("num_kv_heads", "head_dim") and values.get(key, layout.defaults[key]) is None:
            out[name] = out["num_heads"] if name == "num_kv_heads" else out["embed_dim"] // max(1, out["num_heads"])
        else:
            out[name] = _field(values, layout, where, key, hf_fields.KINDS[name])
    if layout.groups_by_method:
        method = values.get("topk_method", "greedy")
        if method not in ("greedy", "group_limited_greedy"):
            raise bad(where, "topk_method", method, "is not supported; mtp_jax has greedy and group_limited_greedy")
        if method == "greedy" and "router.num_groups" in out:
            out |= {"router.num_groups": 1, "router.groups_per_token": 1}
    return out


def _field(values: Values, layout: Layout, where: str, key: str, kind: type) -> Any:
    if key not in values and key not in layout.defaults:
        raise UserError(f"{where}: field {key!r} is missing; add it")
    value = values.get(key, layout.defaults.get(key))
    return typed(where, key, hf_fields.NULLS[key] if value is None and key in hf_fields.NULLS else value, kind)


def _read_rope(values: Values, layout: Layout, where: str) -> Values:
    """Our rope fields, as transformers reads `rope_scaling` (first) or `rope_parameters`, what is inside them first."""
    name = rope_key(values)
    rope = typed(where, name, values.get(name) or {}, dict)
    outer = {"rope_theta": 10_000.0, "partial_rotary_factor": layout.rotary_fraction or 1.0} | values | rope
    out = {"rope.theta": typed(where, "rope_theta", outer["rope_theta"], float)}
    fraction = typed(where, "partial_rotary_factor", outer["partial_rotary_factor"], float)
    if layout.rotary_fraction is not None:
        out["rotary_fraction"] = fraction
    elif fraction != 1.0:
        raise bad(where, "partial_rotary_factor", fraction, "is not supported; this layout rotates whole heads, 1.0")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in hf_fields.ROPE_TYPES:
        raise bad(where, f"{name}.rope_type", kind, f"is not supported; mtp_jax has {', '.join(hf_fields.ROPE_TYPES)}")
    for key, wanted in hf_fields.ROPE_FIXED.get(kind, {}).items():
        if rope.get(key, wanted) != wanted:
            raise bad(where, f"{name}.{key}", rope[key], f"is not supported; mtp_jax has {wanted!r} there")
    if kind == "default":
        return out
    scaling = _read_scaling(rope | {"rope_type": kind}, values, layout, where, name)
    factor = scaling[hf_fields.ROPE_TYPES[kind]["factor"]]
    if factor < 1:
        raise bad(where, f"{name}.factor", rope.get("factor"), f"stretches by {factor:g}; must be at least 1")
    return out | scaling if factor > 1 else out


def _read_scaling(rope: Values, values: Values, layout: Layout, where: str, name: str) -> Values:
    """Fields of one rope type, with transformers' own completion of what is absent."""
    kind = rope["rope_type"]
    rope = {key: value for key, value in rope.items() if value is not None}
    longest = values.get("max_position_embeddings", layout.defaults["max_position_embeddings"])
    if kind != "linear":
        rope.setdefault(ORIGINAL, longest)
    if kind == "yarn":
        if "factor" not in rope:
            original = typed(where, f"{name}.{ORIGINAL}", rope[ORIGINAL], int)
            rope["factor"] = typed(where, "max_position_embeddings", longest, int) / max(1, original)
        # zero counts as absent there
        rope = {k: v for k, v in rope.items() if v or k not in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")}
        if "mscale_all_dim" in rope and "mscale" not in rope:
            remedy = f"without {name}.mscale is not supported; give both or neither"
            raise bad(where, f"{name}.mscale_all_dim", rope["mscale_all_dim"], remedy)
    out = {}
    for key, ours in hf_fields.ROPE_TYPES[kind].items():
        if key not in rope and kind != "yarn":
            raise UserError(f"{where}: field '{name}.{key}' is missing; add it")
        if key in rope:
            out[ours] = typed(where, f"{name}.{key}", rope[key], hf_fields.KINDS[ours])
    return out


def _read_mtp(values: Values, layout: Layout, where: str, depth: int | None) -> MTPConfig:
    modules = typed(where, hf_fields.MTP_KEY, values.get(hf_fields.MTP_KEY) or 0, int)
    wiring = typed(where, hf_fields.WIRING_KEY, values.get(hf_fields.WIRING_KEY) or {}, dict)
    preset = dataclasses.asdict(CONVENTIONS[layout.family])
    hints = typing.get_type_hints(MTPConfig)
    wired = {}
    for key, value in wiring.items():
        choices = [c for c in typing.get_args(hints.get(key)) if c] if key in preset else []
        if key not in (*preset, "shared_depths", "depth") or (choices and value not in choices):
            allowed = " or ".join(choices) or "no such key; one of " + ", ".join((*preset, "shared_depths", "depth"))
            raise bad(where, f"{hf_fields.WIRING_KEY}.{key}", value, f"is not known ({allowed}); correct the file")
        if choices and value != preset[key]:
            wired[key] = value
    shared = typed(where, f"{hf_fields.WIRING_KEY}.shared_depths", wiring.get("shared_depths", False), bool)
    stored = typed(where, f"{hf_fields.WIRING_KEY}.depth", wiring.get("depth", modules), int)
    if (stored != modules and not shared) or (shared and modules != 1):
        remedy = (
            f"does not fit {hf_fields.WIRING_KEY}={short(wiring)}; shared depths are one module, others one a depth"
        )
        raise bad(where, hf_fields.MTP_KEY, modules, remedy)
    if depth is not None and not (0 <= depth <= stored or (shared and depth > 0)):
        raise UserError(f"depth={depth}: {where} has {stored} MTP layers; ask for 0 to {stored}")
    wanted = stored if depth is None else depth
    out: Values = {"family": layout.family}
    if wanted:
        out |= {"kind": RELEASED, "depth": wanted, "shared_depths": shared} | wired
    return MTPConfig(**out)


def rope_key(values: Values) -> str:
    """Where the file describes its rope: transformers looks into rope_scaling first."""
    return "rope_parameters" if values.get("rope_parameters") and not values.get("rope_scaling") else "rope_scaling"


def derived(model: ModelConfig) -> Values:
    """Keys that follow from others."""
    out: Values = {"layer_types": ["full_attention"] * model.num_layers}
    if model.attention == "mla":
        out["num_key_value_heads"] = model.num_heads
        out["head_dim"] = model.qk_rope_head_dim  # as transformers writes it
        out["qk_head_dim"] = model.qk_nope_head_dim + model.qk_rope_head_dim
    return out


def counts(name: str, model: ModelConfig) -> bool:
    """Whether the field changes what this model computes."""
    if name == "router.group_score":
        return model.num_experts > 0 and model.router.groups_per_token < model.router.num_groups
    return model.num_experts > 0 or name not in ("router.score", "router.renormalize")
