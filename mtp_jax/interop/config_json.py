"""Conversion between config.json of the released layouts and our `Config`, in both directions from `families/`.

A key that is in no table is refused, because it may change what the model computes. Sources: transformers'
configuration and modelling code; serving engines for MTP layers.
"""

import copy
import dataclasses
import typing
from typing import Any

from mtp_jax import storage
from mtp_jax.config import (
    CONVENTIONS,
    Config,
    Conventions,
    ModelConfig,
    MTPConfig,
    UserError,
    conventions,
    renamed,
    value_of,
    with_values,
)
from mtp_jax.interop import rope_scaling as rope
from mtp_jax.interop import windows
from mtp_jax.interop.families import FAMILIES, UNSUPPORTED, Family, Values
from mtp_jax.interop.families.common import IGNORED, WINDOW_KEYS
from mtp_jax.interop.json_fields import FIELD_TYPES, REMEDY, bad, imported_with, short, typed
from mtp_jax.interop.layouts import check_held, counts, stated
from mtp_jax.model import validate
from mtp_jax.mtp import RELEASED, kind_of
from mtp_jax.storage import read_json

MTP_KEY = "num_nextn_predict_layers"
LONGEST = 2**24  # tokens, as of data.sequence_length
CONVENTIONS_KEY = "mtp_conventions"  # written by mtp_jax only: where MTP modules differ from the preset
# Names of the same key in different layouts and versions of transformers; a family uses the name in its tables.
SYNONYMS = (
    (MTP_KEY, "num_mtp_layers"),
    ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"),
)
NULLS: Values = {"q_lora_rank": 0, "n_shared_experts": 0, "n_routed_experts": 0, "n_group": 1, "topk_group": 1}
NULLS |= {"attention_value_scale": 1.0}
WRITTEN_NULL = ("q_lora_rank",)  # the class in transformers refuses null for the other keys
FROM_OTHERS = ("num_key_value_heads", "head_dim")  # null: num_heads, embed_dim / num_heads

# --- config.json -> Config --------------------------------------------------------------------------------------------


def read_config(folder: storage.AnyPath) -> Values:
    """Reads config.json of a Hugging Face folder.

    Raises:
      UserError: the folder does not exist or has no config.json; the file is not a JSON object or has no model_type.
    """
    path = storage.path(folder) / "config.json"
    if not storage.is_file(path):
        if not storage.is_dir(path.parent):
            raise UserError(f"{folder}: no such folder; give one that holds config.json and safetensors files")
        raise UserError(f"{folder}: holds no config.json; give the folder of a Hugging Face model")
    values = read_json(path, REMEDY)
    if "model_type" not in values:
        raise UserError(f"{path}: field 'model_type' is missing; it names the layout, one of {', '.join(FAMILIES)}")
    return values


def to_config(hf: Values, where: str, ignore: tuple[str, ...] = (), depth: int | None = None) -> Config:
    """Converts config.json to a `Config`; only `model` and `mtp` differ from the defaults.

    Args:
      hf: values of the file. Absent keys and nulls take the defaults of the class in transformers.
      where: path of the file, for error messages.
      ignore: unknown keys to accept; a key inside rope_scaling is given as "rope_scaling.NAME".
      depth: MTP depth to keep; 0 drops the MTP layers, None keeps the depth of the file.

    Raises:
      UserError: an unknown layout or key, a value of the wrong type, or one that our model does not support.
    """
    family = family_named(hf.get("model_type"), where)
    values = _own_names(hf, family, where)
    _check_known(values, family, where, ignore)
    config = _read(values, family, where, depth)
    try:
        validate(config, 1)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    for key, wanted in family.derived(config.model).items():
        if values.get(key) is not None and values[key] not in (wanted, family.unset.get(key)):
            raise bad(where, key, values[key], f"is not supported; the other fields make it {short(wanted)}")
    return config


def longest_text(hf: Values, where: str) -> int:
    """Returns max_position_embeddings: the context length in tokens, with transformers' default where it is absent.

    Raises:
      UserError: an unknown layout, or a value that is not an integer from 2 to 2^24.
    """
    family = family_named(hf.get("model_type"), where)
    value = _field(_own_names(hf, family, where), family, where, "max_position_embeddings", int)
    if value < 2:
        raise bad(where, "max_position_embeddings", value, "leaves no room for a text; must be at least 2")
    if value > LONGEST:
        raise bad(where, "max_position_embeddings", value, f"must be at most {LONGEST}; correct the file")
    return value


def family_named(model_type: Any, where: str) -> Family:
    """Returns the family of a model_type; raises UserError if there is none, with the reason if it is known."""
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    reason = UNSUPPORTED.get(model_type, "") if isinstance(model_type, str) else ""
    if reason:
        reason += ", which mtp_jax does not have; "
    known = ", ".join(FAMILIES)
    raise UserError(f"{where}: field 'model_type'={short(model_type)} is not supported; {reason}use one of {known}")


def _own_names(hf: Values, family: Family, where: str) -> Values:
    """Returns `hf` under the family's own key names, without nulls except those that have a meaning; raises UserError
    if two names of the same key disagree.
    """
    telling = {*family.fields, *family.mixture, *windows.KEYS[family.window]} & {
        *NULLS,
        *FROM_OTHERS,
        *windows.KEYS[family.window],
    }
    values = {key: value for key, value in hf.items() if value is not None or key in telling}
    for alias in hf:
        key = _own_name(alias, family)
        if key == alias or alias not in values:
            continue
        if key in values and values[key] != values[alias]:
            raise bad(where, alias, hf[alias], f"contradicts {key!r}={short(values[key])}; remove one of them")
        values[key] = values.pop(alias)
    return family.own_names(rope.flat(values, family, where))


def _own_name(key: str, family: Family) -> str:
    """Name that the family uses for a key that has several names."""
    known = {MTP_KEY, *family.mixture}
    return next((n for names in SYNONYMS if key in names for n in names if n in known), key)


_WINDOWED = with_values(ModelConfig(), {"local.window": 1})  # a model for which a layout has all of its derived keys


def _check_known(values: Values, family: Family, where: str, ignore: tuple[str, ...]) -> None:
    known = {*IGNORED, *family.fields, *family.mixture, *family.fixed, *family.tolerated, *ignore}
    known |= {MTP_KEY, CONVENTIONS_KEY, "quantization_config", *rope.KEYS, *family.derived(_WINDOWED)}
    known |= {*WINDOW_KEYS} if "use_sliding_window" in family.fixed else {*windows.KEYS[family.window]}
    known |= {"swa_rope_theta"} if family.local_rope_theta is not None else set()
    known |= {"topk_method"} if family.groups_by_method else set()
    found = {key: value for key, value in values.items() if key not in known}
    found |= {key: value for key, value in rope.unknown(values).items() if key not in ignore}
    for key, value in found.items():
        remedy = f"is not one that mtp_jax reads for {family.model_type} and may change what the model computes; "
        remedy += f"if it does not, {imported_with(f'--ignore={key}', f'ignore=({key!r},)')}"
        raise bad(where, key, value, remedy)


def _read(values: Values, family: Family, where: str, depth: int | None) -> Config:
    """Returns the `Config` of values under the family's own names; raises UserError for unsupported values."""
    for key, wanted in (family.fixed | family.tolerated).items():
        if values.get(key, wanted) != wanted:
            raise bad(where, key, values[key], f"is not supported; mtp_jax has {wanted!r} there")
    _check_quantization(values.get("quantization_config"), family, where)
    model = with_values(ModelConfig(), _read_fields(values, family, where) | rope.read(values, family, where))
    model = dataclasses.replace(model, rotary_fraction=_rotated(model))
    model = with_values(model, windows.read(values, family, where, model.num_layers))
    implied = stated(family, model)
    counted = with_values(model, implied)
    model = with_values(model, {name: value for name, value in implied.items() if counts(name, counted)})
    return Config(model=model, mtp=_read_mtp(values, family, model, where, depth))


def _rotated(model: ModelConfig) -> float:
    """Fraction of the head dims that is rotated, a whole number of dims: rounded down, as in transformers."""
    share = model.rotary_fraction * model.head_dim
    return model.rotary_fraction if share == round(share) else int(share) / model.head_dim


def _read_fields(values: Values, family: Family, where: str) -> Values:
    out: Values = {}
    fields = dict(family.fields)
    if family.mixture:
        layers, experts, first = (
            _field(values, family, where, family.keys[name], int) if name in family.keys else 0
            for name in ("num_layers", "num_experts", "num_dense_layers")
        )
        if experts and first < layers:
            fields |= family.mixture
        else:
            out["num_experts"] = 0
    for key, name in fields.items():
        if key in FROM_OTHERS and values.get(key, family.defaults.get(key)) is None:
            out[name] = out["num_heads"] if name == "num_kv_heads" else out["embed_dim"] // max(1, out["num_heads"])
        else:
            out[name] = _field(values, family, where, key, FIELD_TYPES[name])
    if family.groups_by_method:
        method = values.get("topk_method", "greedy")
        if method not in ("greedy", "group_limited_greedy"):
            raise bad(where, "topk_method", method, "is not supported; mtp_jax has greedy and group_limited_greedy")
        if method == "greedy" and "router.num_groups" in out:
            out |= {"router.num_groups": 1, "router.groups_per_token": 1}
    return out


def _field(values: Values, family: Family, where: str, key: str, kind: type) -> Any:
    if key not in values and key not in family.defaults:
        raise UserError(f"{where}: field {key!r} is missing; add it")
    value = values.get(key, family.defaults.get(key))
    return typed(where, key, NULLS[key] if value is None and key in NULLS else value, kind)


def _read_mtp(values: Values, family: Family, model: ModelConfig, where: str, depth: int | None) -> MTPConfig:
    modules = typed(where, MTP_KEY, values.get(MTP_KEY) or 0, int)
    stated = _current_names(typed(where, CONVENTIONS_KEY, values.get(CONVENTIONS_KEY) or {}, dict), where)
    preset = dataclasses.asdict(CONVENTIONS[family.conventions])
    hints = typing.get_type_hints(MTPConfig)
    overrides = {}
    for key, value in stated.items():
        choices = [c for c in typing.get_args(hints.get(key)) if c] if key in preset else []
        if key not in (*preset, "shared_depths", "depth") or (choices and value not in choices):
            allowed = " or ".join(choices) or "no such key; one of " + ", ".join((*preset, "shared_depths", "depth"))
            raise bad(where, f"{CONVENTIONS_KEY}.{key}", value, f"is not known ({allowed}); correct the file")
        if choices and value != preset[key]:
            overrides[key] = value
    shared = typed(where, f"{CONVENTIONS_KEY}.shared_depths", stated.get("shared_depths", False), bool)
    stored = typed(where, f"{CONVENTIONS_KEY}.depth", stated.get("depth", modules), int)
    if (stored != modules and not shared) or (shared and modules != 1):
        remedy = f"does not fit {CONVENTIONS_KEY}={short(stated)}; shared depths are one module, others one per depth"
        raise bad(where, MTP_KEY, modules, remedy)
    if depth is not None and not (0 <= depth <= stored or (shared and depth > 0)):
        raise UserError(f"depth={depth}: {where} has {stored} MTP layers; give 0 to {stored}")
    wanted = stored if depth is None else depth
    out: Values = {"family": family.conventions}
    if wanted:
        out |= {"kind": RELEASED, "depth": wanted, "shared_depths": shared} | overrides | family.modules(model)
    return MTPConfig(**out)


def _current_names(stated: Values, where: str) -> Values:
    """Returns `mtp_conventions` with the keys and values of earlier versions replaced by the current ones."""
    current: Values = renamed({"mtp": stated}, where=where)["mtp"]
    return current


_FP8: Values = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def _check_quantization(value: Any, family: Family, where: str) -> None:
    """Refuses quantized files other than DeepSeek's fp8 in blocks of 128 x 128 (of stacked experts: than mxfp4)."""
    if value is None:
        return
    typed(where, "quantization_config", value, dict)
    for key, wanted in ({"quant_method": "mxfp4"} if family.stacked else _FP8).items():
        if value.get(key) != wanted:
            remedy = f"is not supported, only {wanted!r}; give files in bfloat16 or float32"
            raise bad(where, f"quantization_config.{key}", value.get(key), remedy)


# --- Config -> config.json --------------------------------------------------------------------------------------------


def from_config(config: Config, layout: str, base: Values | None = None) -> Values:
    """Converts a model to config.json of a layout.

    Args:
      config: the model. Training fields have no effect, except data.sequence_length: without `base`,
        max_position_embeddings follows from it.
      layout: a model_type.
      base: config.json that the model was imported from. The result is `base`, changed only where the model differs
        from it and without quantization_config. Without `base`, the file is complete except for the dtype and the
        token ids of the tokenizer.

    Raises:
      UserError: the layout cannot represent the model (`layouts.layout_of`), model.vocab_size is None, or `base` has
        another layout.
    """
    family = family_named(layout, "the requested layout")
    check_held(config, family)
    if config.model.vocab_size is None:
        raise UserError("model.vocab_size=None: config.json states a size; set it to that of the trained embedding")
    if base is None:
        new = _write(config, family, {})
        new = {key: value for key, value in new.items() if key not in family.internal}
        return _read_back(_scaffold(config, family) | family.fixed | new, family, new, {})
    if base.get("model_type") != layout:
        raise UserError(f"model_type={base.get('model_type')!r}: the model is exported as {layout}; leave base out")
    old = _write(_read(_own_names(base, family, "base"), family, "base", None), family, base)
    new = _write(config, family, base)
    changed = {key: value for key, value in new.items() if key not in old or old[key] != value}
    changed |= {key: new[key] for key in (CONVENTIONS_KEY,) if key in new}  # `base` may state it under old names
    gone = (old.keys() - new.keys()) | {"quantization_config"}
    changed = {key: value for key, value in changed.items() if key not in family.internal}
    result = {key: copy.deepcopy(value) for key, value in base.items() if _own_name(key, family) not in gone}
    for key, value in changed.items():
        names = [name for name in result if _own_name(name, family) == key] or [key]
        result |= dict.fromkeys(names, value)
    return _read_back(result, family, new, base)


def _read_back(result: Values, family: Family, new: Values, base: Values) -> Values:
    """Returns `result` after checking that it is read back with the model values of `new`."""
    where = "the config.json to write"
    back = _write(_read(_own_names(result, family, where), family, where, None), family, base)
    for key, value in new.items():
        if back.get(key) != value:
            raise bad(where, key, value, f"would be read back as {short(back.get(key))}; train the model with that")
    return result


def _write(config: Config, family: Family, base: Values) -> Values:
    """Returns the keys of config.json that describe the model; the form of the rope fields and the derived keys are
    those of `base`.
    """
    model = config.model
    mtp = _write_mtp(config, family)
    fields = family.fields | (family.mixture if model.num_experts else {})
    out = {key: value_of(model, name) for key, name in fields.items()}
    out |= {key: None for key in WRITTEN_NULL if out.get(key) == 0}
    if family.no_experts and not model.num_experts:
        # Serving engines determine from the layer index whether an MTP block has experts: with num_dense_layers counted
        # past the MTP modules, the block is dense, as in our model. (transformers' own MTP loader gives every module
        # experts and cannot represent this model.)
        out |= family.no_experts | {family.keys["num_dense_layers"]: model.num_layers + mtp.get(MTP_KEY, 0)}
    out |= windows.write(model, family, base)
    if family.groups_by_method:
        out["topk_method"] = "group_limited_greedy" if out["n_group"] > 1 else "greedy"
    if family.fields.get("v_head_dim") == "value_head_dim":
        out["v_head_dim"] = model.value_head_dim or model.head_dim
    is_written = {"num_key_value_heads", *base} | (
        {*family.derived(model)} if family.writes_derived and not base else set()
    )
    out |= {key: value for key, value in family.derived(model).items() if key in is_written}
    return out | rope.write(model, family, base) | mtp


def _write_mtp(config: Config, family: Family) -> Values:
    depth = kind_of(config).depth
    if not depth:
        return {MTP_KEY: 0} if family.always_depth else {}
    preset = CONVENTIONS[family.conventions]
    ours = conventions(config.mtp)
    names = [f.name for f in dataclasses.fields(Conventions)]
    differing: Values = {n: getattr(ours, n) for n in names if getattr(ours, n) != getattr(preset, n)}
    if config.mtp.shared_depths:
        differing |= {"shared_depths": True, "depth": depth}
    return {MTP_KEY: 1 if config.mtp.shared_depths else depth} | ({CONVENTIONS_KEY: differing} if differing else {})


def _scaffold(config: Config, family: Family) -> Values:
    """Keys of a complete file that `_write` does not return."""
    model = config.model
    longest = config.data.sequence_length
    for stretched in (model.rope.yarn, model.rope.llama3):
        if stretched.factor > 1:
            longest = max(longest, int(stretched.factor * stretched.original_length))
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "max_position_embeddings": longest,
        "initializer_range": model.init_std,
        "attention_dropout": 0.0,
        "use_cache": True,
        # If absent, they default to ids of another tokenizer, and generation would stop at arbitrary tokens.
        "bos_token_id": None,
        "eos_token_id": None,
    }
