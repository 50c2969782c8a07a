"""`Config` -> config.json: a complete one, or the one a model was imported from with what has changed since."""

import copy
import dataclasses

from mtp_jax.config import CONVENTIONS, Config, Conventions, ModelConfig, UserError, conventions, value_of
from mtp_jax.interop import hf_fields
from mtp_jax.interop.hf_config.reading import counts, derived, layout_named, read_values, rope_key
from mtp_jax.interop.hf_fields import Layout, Values, bad, short
from mtp_jax.mtp import kind_of


def from_config(config: Config, layout: str, base: Values | None = None) -> Values:
    """config.json for a model in a layout.

    Args:
      config: the model; what belongs to training does not matter.
      layout: a model_type.
      base: the config.json that the model was imported from. The result is then `base` but for what differs from what
        it said of the model. Without it the file is complete but for the dtype and the tokenizer's ids.

    Raises:
      UserError: the layout cannot hold the model (see `layout_of`), or `base` has another layout.
    """
    table = layout_named(layout, "the layout asked for")
    _check_held(config, layout)
    if config.model.vocab_size is None:
        raise UserError("model.vocab_size=None: config.json states a size; set it to that of the trained embedding")
    if base is None:
        new = _write(config, table, {})
        return _read_back(_scaffold(config, layout) | table.fixed | new, table, new, {})
    if base.get("model_type") != layout:
        raise UserError(f"model_type={base.get('model_type')!r}: the model is exported as {layout}; leave base out")
    old = _write(read_values(hf_fields.without_aliases(base, table, "base"), table, "base", None), table, base)
    new = _write(config, table, base)
    changed = {key: value for key, value in new.items() if key not in old or old[key] != value}
    gone = (old.keys() - new.keys()) | {"quantization_config"}
    result = {key: copy.deepcopy(value) for key, value in base.items() if hf_fields.ALIASES.get(key, key) not in gone}
    for key, value in changed.items():
        names = [name for name in result if hf_fields.ALIASES.get(name, name) == key] or [key]
        result |= dict.fromkeys(names, value)
    return _read_back(result, table, new, base)


def layout_of(config: Config) -> str:
    """The model_type whose layout holds the model.

    Raises:
      UserError: naming the first key that no layout can hold.
    """
    model, mtp = config.model, config.mtp
    if model.attention == "mla":
        layout = "deepseek_v2" if model.num_experts and model.router.score == "softmax" else "deepseek_v3"
    elif model.num_experts:
        layout = "glm4_moe"
    elif model.qkv_bias and model.qk_norm:
        raise UserError(
            "model.qk_norm=True: no released layout of dense blocks has it together with model.qkv_bias=True; "
            "set one of them to False"
        )
    elif model.qkv_bias:
        layout = "mimo" if kind_of(config).depth and mtp.family == "mimo" else "qwen2"
    else:
        layout = "qwen3" if model.qk_norm else "llama"
    _check_held(config, layout)
    return layout


def _read_back(result: Values, table: Layout, new: Values, base: Values) -> Values:
    """`result`, once it is sure to say of the model what `new` says."""
    where = "the config.json to write"
    back = _write(read_values(hf_fields.without_aliases(result, table, where), table, where, None), table, base)
    for key, value in new.items():
        if back.get(key) != value:
            raise bad(where, key, value, f"would be read back as {short(back.get(key))}; train the model with that")
    return result


def _check_held(config: Config, layout: str) -> None:
    """Refuse, by our key, what the layout cannot say."""
    table, model = hf_fields.LAYOUTS[layout], config.model
    kind_of(config).check_export()
    for name, wanted in table.implied.items():
        value = value_of(model, name)
        if value != wanted and counts(name, model):
            raise UserError(
                f"model.{name}={value!r}: the {layout} layout cannot hold it, it has {wanted!r} there; train the model "
                f"with model.{name}={wanted!r} to export it"
            )
    if table.heads_divide and model.embed_dim % model.num_heads:
        raise UserError(
            f"model.num_heads={model.num_heads}: does not divide model.embed_dim={model.embed_dim}, which transformers "
            f"asks of {layout}; train the model with a divisor to export it"
        )


def _write(config: Config, layout: Layout, base: Values) -> Values:
    """What the file says of the model. base: whose way of writing the rope, and whose derived keys, are kept."""
    model = config.model
    mtp = _write_mtp(config, layout)
    fields = layout.fields | (layout.mixture if model.num_experts else {})
    out = {key: value_of(model, name) for key, name in fields.items()}
    out |= {key: None for key in hf_fields.WRITTEN_NULL if out.get(key) == 0}
    if layout.mixture and not model.num_experts:
        # Serving engines decide by the layer's number what an MTP block holds: counted past the modules, it is dense as
        # ours is. (transformers' own MTP loader gives every module experts and cannot hold this one.)
        out |= hf_fields.NO_EXPERTS | {"first_k_dense_replace": model.num_layers + mtp.get(hf_fields.MTP_KEY, 0)}
        out |= {key: True for key in layout.mixture.keys() - hf_fields.EXPERTS.keys()}
    if layout.groups_by_method:
        out["topk_method"] = "group_limited_greedy" if out["n_group"] > 1 else "greedy"
    out |= {k: v for k, v in derived(model).items() if k in base or k == "num_key_value_heads"}
    return out | _write_rope(model, layout, base) | mtp


def _write_rope(model: ModelConfig, layout: Layout, base: Values) -> Values:
    kind = next((k for k, f in hf_fields.ROPE_TYPES.items() if f and value_of(model, f["factor"]) > 1), "default")
    scaling = {key: value_of(model, name) for key, name in hf_fields.ROPE_TYPES[kind].items()}
    if kind == "yarn" and not model.rope.yarn.mscale_all_dim:
        del scaling["mscale_all_dim"]
        if model.rope.yarn.mscale == 1.0:
            del scaling["mscale"]
    outer: Values = {"rope_theta": model.rope.theta}
    if layout.rotary_fraction is not None:
        outer["partial_rotary_factor"] = model.rotary_fraction
    name = rope_key(base)
    if name == "rope_parameters" or outer.keys() & (base.get(name) or {}).keys():
        return {name: outer | {"rope_type": kind} | scaling}
    # Older code reads "type", newer "rope_type".
    return outer | {"rope_scaling": {"type": kind, "rope_type": kind} | scaling if scaling else None}


def _write_mtp(config: Config, layout: Layout) -> Values:
    depth = kind_of(config).depth
    if not depth:
        return {hf_fields.MTP_KEY: 0} if layout.always_depth else {}
    preset = CONVENTIONS[layout.family]
    ours = conventions(config.mtp)
    names = [f.name for f in dataclasses.fields(Conventions)]
    wiring: Values = {n: getattr(ours, n) for n in names if getattr(ours, n) != getattr(preset, n)}
    if config.mtp.shared_depths:
        wiring |= {"shared_depths": True, "depth": depth}
    modules = 1 if config.mtp.shared_depths else depth
    return {hf_fields.MTP_KEY: modules} | ({hf_fields.WIRING_KEY: wiring} if wiring else {})


def _scaffold(config: Config, layout: str) -> Values:
    """What a complete file holds besides the model."""
    model = config.model
    longest = config.data.sequence_length
    for stretched in (model.rope.yarn, model.rope.llama3):
        if stretched.factor > 1:
            longest = max(longest, int(stretched.factor * stretched.original_length))
    return {
        "architectures": [hf_fields.LAYOUTS[layout].architecture],
        "model_type": layout,
        "max_position_embeddings": longest,
        "initializer_range": model.init_std,
        "attention_dropout": 0.0,
        "use_cache": True,
        # The classes' own ids belong to another tokenizer: absent, they would end a text at any word.
        "bos_token_id": None,
        "eos_token_id": None,
    }
