"""The main model up to its last block, its final norm and its output head."""

from typing import Any, NamedTuple

import numpy as np

from tests.reference.block import block
from tests.reference.norm import rms_norm
from tests.reference.tree import unstack


class TrunkOutput(NamedTuple):
    """z: input of the last block [B, T, D]; h: its output, not normed; aux: one entry a mixture-of-experts block."""

    z: np.ndarray
    h: np.ndarray
    aux: list[Any]


def embed(params, tokens_BT):
    """Rows of the embedding table."""
    B, T = tokens_BT.shape
    return np.array([[params["embed"][tokens_BT[b, t]] for t in range(T)] for b in range(B)])


def blocks(params):
    """All blocks in order: the leading dense ones, then the others."""
    out = []
    for stack in ("dense_blocks", "blocks"):
        if stack in params:
            out += unstack(params[stack])
    return out


def trunk(params, model, tokens_BT, segment_ids_BT, positions_BT):
    """Embedding and all blocks.

    Args:
      params: {"embed": [V, D], "dense_blocks", "blocks", "final_norm", "unembed": [D, V] unless tied}.
    """
    h = embed(params, tokens_BT)
    z, aux = h, []
    for layer in blocks(params):
        z = h
        h, statistics = block(layer, model, z, segment_ids_BT, positions_BT)
        if statistics is not None:
            aux.append(statistics)
    return TrunkOutput(z, h, aux)


def final_norm(params, model, h_BTD):
    """The main model's own norm before the head."""
    return rms_norm(params["final_norm"], h_BTD, model.norm_eps)


def unembed(params, hidden):
    """Logits [..., V]; the transposed embedding table when tied."""
    return hidden @ (params["unembed"] if "unembed" in params else params["embed"].T)
