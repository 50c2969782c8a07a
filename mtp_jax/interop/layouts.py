"""Layouts that can represent a model: the closest one, and the fields that a layout cannot hold."""

from typing import Any

from mtp_jax.config import Config, ModelConfig, MTPConfig, UserError, value_of, walk, with_values
from mtp_jax.interop import rope_scaling as rope
from mtp_jax.interop import windows
from mtp_jax.interop.families import FAMILIES, Family, Values
from mtp_jax.interop.json_fields import SETTINGS
from mtp_jax.mtp import kind_of

# Our fields that distinguish layouts, most distinctive first. A model is exported in the family whose first
# disagreement in this order comes last, or refused because of a field that this family cannot represent.
TELLING = (
    *("attention", "num_experts", "local.window", "local.pattern", "gated_unit.alpha", "qkv_bias", "qk_norm"),
    *("rope.interleaved", "rotary_fraction", "router.score", "router.group_score", "router.renormalize"),
    *("num_shared_experts", "num_dense_layers", "latent_norm_eps"),
)


def layout_of(config: Config) -> str:
    """Returns the model_type of the layout that represents the model.

    If several do, it is the one with the model's MTP conventions, else the first.

    Raises:
      UserError: no layout represents the model; names the first field that the closest layout cannot represent.
    """
    mtp = kind_of(config)

    def disagreement(family: Family) -> list[bool]:
        differs = {name for name, _ in _not_held(config, family)}
        differs |= {"num_experts"} if bool(family.mixture) != (config.model.num_experts > 0) else set()
        return [*(name in differs for name in TELLING), mtp.depth > 0 and family.conventions != config.mtp.family]

    family = min(FAMILIES.values(), key=disagreement)
    check_held(config, family)
    return family.model_type


def _not_held(config: Config, family: Family) -> list[tuple[str, Any]]:
    """Returns (our field, value in the layout) for each field of the model that the layout cannot represent."""
    model = config.model
    implied = _implied(family, model)
    if family.mixture and not model.num_experts and not family.no_experts:
        implied |= {"num_experts": 1}
    return [(n, value) for n, value in implied.items() if value_of(model, n) != value and counts(n, model)]


def _implied(family: Family, model: ModelConfig) -> Values:
    """Values of our model for which the layout has no key: those of `Family.implied`, and our defaults for fields in no
    table, so that no field is dropped silently.
    """
    stored = {*family.fields.values(), *family.mixture.values(), *rope.STORED}
    stored |= {"local.rope_theta"} if family.local_rope_theta is not None else set()
    stored |= windows.STORED[family.window] | ({"rotary_fraction"} if family.rotary_fraction is not None else set())
    kept = {key: value for key, value, setting in walk(ModelConfig()) if setting.may_change == "never"}
    return stated(family, model) | {n: v for n, v in kept.items() if n not in family.implied and n not in stored}


def stated(family: Family, model: ModelConfig) -> Values:
    """Values of `Family.implied` for this model."""
    return {name: value(model) if callable(value) else value for name, value in family.implied.items()}


# Fields of MTPConfig that determine the blocks of the MTP modules, and for which no layout has a key.
_BLOCKS = ("window", "dense_ffn")


def _check_blocks_held(config: Config, family: Family) -> None:
    """Refuses MTP modules whose blocks differ from those of the layout."""
    theirs_stated = {name: value_of(MTPConfig(), name) for name in _BLOCKS} | family.modules(config.model)
    theirs = with_values(config, {f"mtp.{name}": value for name, value in theirs_stated.items()})
    if not kind_of(config).depth or kind_of(theirs).layer_spec == kind_of(config).layer_spec:
        return
    for name in _BLOCKS:
        value, wanted = getattr(config.mtp, name), getattr(theirs.mtp, name)
        if kind_of(with_values(config, {f"mtp.{name}": wanted})).layer_spec != kind_of(config).layer_spec:
            raise UserError(
                f"mtp.{name}={value!r}: the {family.model_type} layout cannot hold it, it has {wanted!r} there; train "
                f"the model with mtp.{name}={wanted!r} to export it"
            )


def check_held(config: Config, family: Family) -> None:
    """Refuses a model that the layout cannot represent; the error names our field."""
    model, layout = config.model, family.model_type
    kind_of(config).check_export()
    for name, wanted in _not_held(config, family):
        raise UserError(
            f"model.{name}={value_of(model, name)!r}: the {layout} layout cannot hold it, it has {wanted!r} there; "
            f"train the model with model.{name}={wanted!r} to export it"
        )
    _check_blocks_held(config, family)
    if family.heads_divide and model.embed_dim % model.num_heads:
        raise UserError(
            f"model.num_heads={model.num_heads}: does not divide model.embed_dim={model.embed_dim}, which transformers "
            f"requires of {layout}; train the model with a divisor to export it"
        )


# Fields, or prefixes of fields, that have an effect only in a part of the model; `Setting.when` states it for others.
_PARTS = {
    "mla": ("q_lora_rank", "latent_norm_eps"),
    "gqa": ("qk_norm", "qkv_bias", "value_head_dim", "value_scale", "output_bias", "rotary_fraction"),
    "moe": ("router.", "num_shared_experts", "num_dense_layers", "routed_scaling_factor", "expert_bias"),
    "local": ("local.",),
    "llama3": ("rope.llama3.",),
    "yarn": ("rope.yarn.",),
}
_DEFAULTS_TO = {"value_head_dim": "head_dim", "local.num_kv_heads": "num_kv_heads"}  # where they are 0


def counts(name: str, model: ModelConfig) -> bool:
    """True if the field changes what this model computes."""
    if name == "router.group_score":
        return model.num_experts > 0 and model.router.groups_per_token < model.router.num_groups
    if name == "ffn_dim":
        return not model.num_experts or model.num_dense_layers > 0
    if name in _DEFAULTS_TO and value_of(model, name) == value_of(model, _DEFAULTS_TO[name]):
        return False
    part = SETTINGS[name].when or next((part for part, names in _PARTS.items() if name.startswith(names)), "")
    in_use = {"": True, "mla": model.attention == "mla", "gqa": model.attention == "gqa", "moe": model.num_experts > 0}
    in_use |= {
        "local": model.local.window > 0,
        "llama3": model.rope.llama3.factor > 1,
        "yarn": model.rope.yarn.factor > 1,
    }
    return in_use[part] or name in ("local.window", "rope.llama3.factor", "rope.yarn.factor")
