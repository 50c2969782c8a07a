"""Sliding windows in config.json: `sliding_window` applies to every layer, or to the layers that other keys select."""

import itertools

from mtp_jax.config import ModelConfig
from mtp_jax.interop.families import Family, Values
from mtp_jax.interop.families.common import LAYER_TYPES, layer_types
from mtp_jax.interop.json_fields import SETTINGS, bad, typed

WINDOW = "sliding_window"
SWITCH = "use_sliding_window"
FIRST = "max_window_layers"  # index of the first layer with a window, if the switch is on

# By `Family.window`: its keys in config.json, and our fields that they determine.
KEYS = {"": (), "every": (WINDOW,), "last": (SWITCH, WINDOW, FIRST), "typed": (WINDOW,)}
STORED: dict[str, set[str]] = {
    "": set(),
    "every": {"local.window"},
    "last": {"local.window", "local.pattern"},
    "typed": {"local.window", "local.pattern"},
}


_MOST_LAYERS = SETTINGS["num_layers"].at_most or 0  # of a valid model


def read(values: Values, family: Family, where: str, num_layers: int) -> Values:
    """Returns our `local.window` and `local.pattern`; an empty dict without windows.

    The query position is counted among the keys of a window, in transformers as in our model.

    Raises:
      UserError: a window that is not an integer of at least 1; layer types that are unknown or not one per layer.
    """
    window = values.get(WINDOW, family.defaults.get(WINDOW))
    is_on = bool(family.window) and (family.window != "last" or typed(where, SWITCH, values.get(SWITCH, False), bool))
    if num_layers > _MOST_LAYERS or not is_on or window is None or _reaches_all(window, values, family, where):
        return {}
    if typed(where, WINDOW, window, int) < 1:
        raise bad(where, WINDOW, window, "must be at least 1, or null for no window")
    pattern = itertools.islice(itertools.cycle(family.default_pattern), num_layers)
    types = [LAYER_TYPES[letter == "L"] for letter in pattern]
    if family.window == "last":
        first = typed(where, FIRST, values.get(FIRST, family.defaults[FIRST]), int)
        types = [LAYER_TYPES[layer >= first] for layer in range(num_layers)]
    if family.window != "every":
        types = values.get("layer_types", types)
    if not isinstance(types, list) or len(types) != num_layers or any(kind not in LAYER_TYPES for kind in types):
        raise bad(where, "layer_types", types, f"must be {' or '.join(LAYER_TYPES)} for each of {num_layers} layers")
    letters = "".join("GL"[LAYER_TYPES.index(kind)] for kind in types)
    period = next(n for n in range(1, num_layers + 1) if letters[n:] == letters[:-n])
    return {"local.window": window, "local.pattern": letters[:period]} if "L" in letters else {}


def write(model: ModelConfig, family: Family, base: Values) -> Values:
    """Returns the keys of config.json that describe the windows; one in `base` that covers all positions is kept."""
    types = layer_types(model)["layer_types"]
    is_windowed = LAYER_TYPES[True] in types
    out: Values = {WINDOW: model.local.window} if is_windowed else {}
    if family.window == "every" and not is_windowed:  # null: no window; if absent, the class has a default
        out[WINDOW] = base.get(WINDOW) if base and _reaches_all(base.get(WINDOW), base, family, "base") else None
    if family.window == "last":
        out[SWITCH] = is_windowed
    if family.window == "typed" or (family.window == "last" and is_windowed):
        out["layer_types"] = types
    if family.window == "last" and is_windowed:
        out[FIRST] = types.index(LAYER_TYPES[True])
    return out


def _reaches_all(window: object, values: Values, family: Family, where: str) -> bool:
    """True if the window applies to every layer and is at least max_position_embeddings."""
    longest = values.get("max_position_embeddings", family.defaults["max_position_embeddings"])
    longest = typed(where, "max_position_embeddings", longest, int)
    return family.window == "every" and window is not None and typed(where, WINDOW, window, int) >= longest
