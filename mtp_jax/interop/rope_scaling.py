"""Rotary embedding in config.json, in both forms: `rope_scaling` next to rope_theta, and `rope_parameters`."""

import math

from mtp_jax.config import ModelConfig, UserError, value_of
from mtp_jax.interop.families import Family, Names, Values
from mtp_jax.interop.families.common import LAYER_TYPES
from mtp_jax.interop.json_fields import FIELD_TYPES, bad, typed

KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
ORIGINAL = "original_max_position_embeddings"

# Keys of each rope type inside rope_scaling or rope_parameters -> our fields.
TYPES: dict[str, Names] = {
    "default": {},
    "linear": {"factor": "rope.linear_factor"},
    "llama3": {
        "factor": "rope.llama3.factor",
        "original_max_position_embeddings": "rope.llama3.original_length",
        "low_freq_factor": "rope.llama3.low_frequency",
        "high_freq_factor": "rope.llama3.high_frequency",
    },
    "yarn": {
        "factor": "rope.yarn.factor",
        "original_max_position_embeddings": "rope.yarn.original_length",
        "beta_fast": "rope.yarn.beta_fast",
        "beta_slow": "rope.yarn.beta_slow",
        "mscale": "rope.yarn.mscale",
        "mscale_all_dim": "rope.yarn.mscale_all_dim",
        "truncate": "rope.yarn.truncate",
    },
}
STORED = {"rope.theta", *(ours for names in TYPES.values() for ours in names.values())}  # our fields
_COMMON = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
_FIXED: dict[str, Values] = {"yarn": {"attention_factor": None}}


_BY_LAYER = {"rope_theta", "rope_type", "partial_rotary_factor"}


def flat(values: Values, family: Family, where: str) -> Values:
    """Returns `values` with rope_theta, swa_rope_theta and partial_rotary_factor in place of a rope_parameters that has
    a section per layer type; without such sections, `values` unchanged.

    Raises:
      UserError: sections that differ in more than rope_theta, that scale positions, or that have unknown keys.
    """
    nested = values.get("rope_parameters")
    if family.local_rope_theta is None or not isinstance(nested, dict) or not {*nested} & {*LAYER_TYPES}:
        return values
    out = {key: value for key, value in values.items() if key != "rope_parameters"}
    sections = [typed(where, f"rope_parameters.{kind}", nested.get(kind) or {}, dict) for kind in LAYER_TYPES]
    for key in sorted(nested.keys() - {*LAYER_TYPES}):
        raise bad(where, f"rope_parameters.{key}", nested[key], f"is no kind of layer; {' and '.join(LAYER_TYPES)} are")
    for kind, section in zip(LAYER_TYPES, sections, strict=True):
        for key, value in section.items():
            if key not in _BY_LAYER or (key == "rope_type" and value != "default"):
                raise bad(
                    where, f"rope_parameters.{kind}.{key}", value, "is not supported; positions are not stretched"
                )
    first, second = (section.get("partial_rotary_factor", family.rotary_fraction) for section in sections)
    if first != second:
        raise bad(where, "rope_parameters.sliding_attention.partial_rotary_factor", second, f"must be {first}")
    out["partial_rotary_factor"] = first
    for key, section in zip(("rope_theta", "swa_rope_theta"), sections, strict=True):
        if "rope_theta" in section:
            out[key] = section["rope_theta"]
    return out


def unknown(values: Values) -> Values:
    """Returns the keys that the stated rope type does not have, as "rope_scaling.NAME"."""
    out: Values = {}
    for name in ("rope_scaling", "rope_parameters"):
        rope = values.get(name)
        if isinstance(rope, dict):
            kind = str(rope.get("rope_type", rope.get("type", "default")))
            known = {*_COMMON, *TYPES.get(kind, rope), *_FIXED.get(kind, {})}
            out |= {f"{name}.{key}": rope[key] for key in sorted(rope.keys() - known) if rope[key] is not None}
    return out


def read(values: Values, family: Family, where: str) -> Values:
    """Returns our rope fields. As in transformers, `rope_scaling` takes precedence over `rope_parameters`, and the keys
    inside over those next to it.
    """
    name = _key(values)
    if not {"rope_scaling", "rope_parameters"} & values.keys():
        name, values = "rope_parameters", {"rope_parameters": family.defaults.get("rope_parameters")} | values
    rope = {k: value for k, value in typed(where, name, values.get(name) or {}, dict).items() if value is not None}
    outer = {"rope_theta": 10_000.0, "partial_rotary_factor": family.rotary_fraction or 1.0} | family.defaults
    outer |= values | rope
    out = {"rope.theta": typed(where, "rope_theta", outer["rope_theta"], float)}
    if family.local_rope_theta is not None:
        out["local.rope_theta"] = typed(
            where, "swa_rope_theta", values.get("swa_rope_theta", family.local_rope_theta), float
        )
    fraction = typed(where, "partial_rotary_factor", outer["partial_rotary_factor"], float)
    if family.rotary_fraction is not None:
        out["rotary_fraction"] = fraction
    elif fraction != 1.0:
        raise bad(where, "partial_rotary_factor", fraction, "is not supported; this layout rotates whole heads, 1.0")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in TYPES:
        raise bad(where, f"{name}.rope_type", kind, f"is not supported; mtp_jax has {', '.join(TYPES)}")
    if kind != "default" and family.local_rope_theta is not None:
        raise bad(where, f"{name}.rope_type", kind, "is not supported in this layout; mtp_jax has default there")
    for key, wanted in _FIXED.get(kind, {}).items():
        if rope.get(key, wanted) != wanted:
            raise bad(where, f"{name}.{key}", rope[key], f"is not supported; mtp_jax has {wanted!r} there")
    if kind == "default":
        return out
    scaling = _read_scaling(rope | {"rope_type": kind}, values, family, where, name)
    factor = scaling[TYPES[kind]["factor"]]
    if factor < 1:
        raise bad(where, f"{name}.factor", rope.get("factor"), f"stretches by {factor:g}; must be at least 1")
    return out | scaling if factor > 1 else out


def _read_scaling(rope: Values, values: Values, family: Family, where: str, name: str) -> Values:
    """Returns the fields of one rope type; absent keys are completed as in transformers."""
    kind = rope["rope_type"]
    longest = values.get("max_position_embeddings", family.defaults["max_position_embeddings"])
    if kind != "linear":
        rope.setdefault(ORIGINAL, longest)
    if kind == "yarn":
        if "factor" not in rope:
            original = typed(where, f"{name}.{ORIGINAL}", rope[ORIGINAL], int)
            rope["factor"] = typed(where, "max_position_embeddings", longest, int) / max(1, original)
        # transformers treats zero as absent
        rope = {k: v for k, v in rope.items() if v or k not in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")}
        if "mscale_all_dim" in rope and "mscale" not in rope:
            remedy = f"without {name}.mscale is not supported; give both or neither"
            raise bad(where, f"{name}.mscale_all_dim", rope["mscale_all_dim"], remedy)
    out = {}
    for key, ours in TYPES[kind].items():
        if key not in rope and kind != "yarn":
            raise UserError(f"{where}: field '{name}.{key}' is missing; add it")
        if key in rope:
            out[ours] = typed(where, f"{name}.{key}", rope[key], FIELD_TYPES[ours])
    return out


def write(model: ModelConfig, family: Family, base: Values) -> Values:
    """Returns the keys of config.json that describe the rope, in the form used by `base`."""
    kind = next((k for k, f in TYPES.items() if f and value_of(model, f["factor"]) > 1), "default")
    scaling = {key: value_of(model, name) for key, name in TYPES[kind].items()}
    if kind == "yarn" and model.rope.yarn.truncate:
        del scaling["truncate"]
    if kind == "yarn" and not model.rope.yarn.mscale_all_dim:
        del scaling["mscale_all_dim"]
        if model.rope.yarn.mscale == 1.0:
            del scaling["mscale"]
    outer: Values = {"rope_theta": model.rope.theta}
    if family.rotary_fraction is not None:
        outer["partial_rotary_factor"] = _fraction(model, base)
    if family.local_rope_theta is not None:
        return _by_layer(model, outer, base)
    name = "rope_parameters" if kind == "default" and "rope_parameters" in family.defaults else _key(base)
    if name == "rope_parameters" or outer.keys() & (base.get(name) or {}).keys():
        return {name: outer | {"rope_type": kind} | scaling}
    # Older versions of transformers read "type", newer ones "rope_type".
    return outer | {"rope_scaling": {"type": kind, "rope_type": kind} | scaling if scaling else None}


def _fraction(model: ModelConfig, base: Values) -> float:
    """Returns the fraction in `base` if it gives the model's number of dims, rounded down, else one that does."""
    dims = round(model.rotary_fraction * model.head_dim)
    stated = [(base.get(name) or {}).get("partial_rotary_factor") for name in ("rope_scaling", "rope_parameters")]
    for fraction in (base.get("partial_rotary_factor"), *stated, model.rotary_fraction):
        if isinstance(fraction, float) and int(fraction * model.head_dim) == dims:
            return fraction
    return math.nextafter(model.rotary_fraction, 2)


def _by_layer(model: ModelConfig, outer: Values, base: Values) -> Values:
    """Returns both rotary bases as rope_theta and swa_rope_theta and, if `base` has rope_parameters or is empty, also
    in one section per layer type.
    """
    out = outer | {"swa_rope_theta": model.local.rope_theta or model.rope.theta}
    if base and "rope_parameters" not in base:
        return out
    thetas = (out["rope_theta"], out["swa_rope_theta"])
    sections = {
        kind: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": outer["partial_rotary_factor"]}
        for kind, theta in zip(LAYER_TYPES, thetas, strict=True)
    }
    return out | {"rope_parameters": sections}


def _key(values: Values) -> str:
    """Name of the key that describes the rope; transformers reads rope_scaling first."""
    return "rope_parameters" if values.get("rope_parameters") and not values.get("rope_scaling") else "rope_scaling"
