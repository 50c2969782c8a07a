"""The main model up to its last block, its final norm and its output head."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from mtp_jax.config import LocalConfig, RopeConfig
from mtp_jax.layers.spec import layer_places
from tests.reference.block import block
from tests.reference.norm import rms_norm
from tests.reference.tree import unstack


class DecoderOutput(NamedTuple):
    """z: input of the last block [B, T, D]; h: its output, not normed; aux: one entry a mixture-of-experts block."""

    z: np.ndarray
    h: np.ndarray
    aux: list[Any]


def embed(params, tokens_BT):
    """Rows of the embedding table."""
    B, T = tokens_BT.shape
    return np.array([[params["embed"][tokens_BT[b, t]] for t in range(T)] for b in range(B)])


def blocks(params, model):
    """All blocks in order, from the stacks that the model keeps them in."""
    stacks = {name: unstack(stack) for name, stack in params.items() if "blocks" in name}
    num_layers = sum(map(len, stacks.values()))
    return [stacks[name][index] for name, index in layer_places(model, num_layers)]


def of_layer(model, index):
    """The model's fields as they are in one layer: `local.window` is 0 where it sees everything."""
    letter = model.local.pattern[index % len(model.local.pattern)] if model.local.window else "G"
    return local(model) if letter == "L" else replace(model, local=LocalConfig())


def local(model):
    """The model's fields in a layer with a window."""
    rope = replace(RopeConfig(), theta=model.local.rope_theta, interleaved=model.rope.interleaved)
    return replace(
        model,
        rope=rope if model.local.rope_theta else model.rope,
        num_kv_heads=model.local.num_kv_heads or model.num_kv_heads,
        sinks=model.local.sinks,
        local=LocalConfig(window=model.local.window),
    )


def of_mtp(model, mtp):
    """The model's fields in an MTP block: those of the last layer, or of layers with the window asked for."""
    if mtp.window == model.local.window:
        return local(model)
    last = of_layer(model, model.num_layers - 1)
    return last if mtp.window is None else replace(model, local=LocalConfig(window=mtp.window))


def decoder(params, model, tokens_BT, segment_ids_BT, positions_BT):
    """Embedding and all blocks.

    Args:
      params: {"embed": [V, D], stacks of blocks, "final_norm", "unembed": [D, V] unless tied}.
    """
    h = embed(params, tokens_BT)
    z, aux = h, []
    for index, layer in enumerate(blocks(params, model)):
        z = h
        h, statistics = block(layer, of_layer(model, index), z, segment_ids_BT, positions_BT)
        if statistics is not None:
            aux.append(statistics)
    return DecoderOutput(z, h, aux)


def final_norm(params, model, h_BTD):
    """The main model's own norm before the head."""
    return rms_norm(params["final_norm"], h_BTD, model.norm_eps)


def unembed(params, hidden):
    """Logits [..., V]; the transposed embedding table when tied."""
    return hidden @ (params["unembed"] if "unembed" in params else params["embed"].T)
