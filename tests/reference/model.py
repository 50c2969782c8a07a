"""The whole model and its loss, from parameters and rows of tokens."""

import numpy as np

from tests.reference import loss as loss_module
from tests.reference import mtp as mtp_module
from tests.reference import targets as targets_module
from tests.reference.decoder import decoder, final_norm, unembed
from tests.reference.tree import as_float64


def forward(params, config, tokens, segment_ids, positions, conventions=None, mtp_weight=None):
    """Hidden states, logits, router statistics and loss.

    Depth k, the main model's k = 0 included, runs on segment ids that are 0 wherever its input or target is missing,
    so those positions enter no statistic and no valid position attends to them.

    Args:
      params: {"trunk", "mtp"}, nested dicts of arrays.
      config: has .model, .mtp (fields of ModelConfig and MTPConfig) and, optionally, .training.z_loss_weight and
        .conventions.
      tokens, segment_ids: int[B, T + 1 + D]; D = 0 when mtp.kind is "none".
      positions: int[B, T], for rope.
      conventions: of sequential modules; None: config.conventions.
      mtp_weight: lambda; None: config.mtp.weight, or its default (0.3 sequential, D parallel).

    Returns:
      dict: hidden [K, B, T, D] (normed, ready for the head), logits [K, B, T, V], targets, aux {"trunk": one entry a
      mixture-of-experts block, "mtp": one per depth, None when dense} of {"loads": [E], "balance": float}, and the
      entries of `loss.loss` ("loss" without the balance loss, which is left to the caller to weigh).
    """
    params = as_float64(params)
    model, mtp = config.model, config.mtp
    tokens, segment_ids, positions = np.asarray(tokens), np.asarray(segment_ids), np.asarray(positions)
    D = 0 if mtp.kind == "none" else mtp.depth
    built = targets_module.build(tokens, segment_ids, D)
    segments_KBT = targets_module.depth_segments(segment_ids, built)
    main = decoder(params["trunk"], model, shifted_inputs(tokens, D)[0], segments_KBT[0], positions)
    hiddens, aux = [], []
    if mtp.kind == "sequential":
        conventions = conventions or config.conventions
        arguments = (model, mtp, conventions, main, shifted_inputs(tokens, D), segments_KBT, positions)
        hiddens, aux = mtp_module.sequential(params, *arguments)
    elif mtp.kind == "parallel":
        hiddens, aux = mtp_module.parallel(params, model, mtp, main, segments_KBT, positions)
    hidden_KBTD = np.stack([final_norm(params["trunk"], model, main.h), *hiddens])
    logits_KBTV = unembed(params["trunk"], hidden_KBTD)
    if "markov" in params.get("mtp", {}):
        logits_KBTV += mtp_module.markov(params["mtp"]["markov"], shifted_inputs(tokens, D))
    T = positions.shape[1]
    weights = [mtp.depth_decay ** (k - 1) for k in range(1, D + 1)]
    z_weight = config.training.z_loss_weight if hasattr(config, "training") else 0.0
    lam = mtp_weight if mtp_weight is not None else default_weight(mtp)
    losses = loss_module.loss(logits_KBTV, built, segment_ids[:, :T], lam, weights, mtp.normalize, z_weight)
    return {
        "hidden": hidden_KBTD,
        "logits": logits_KBTV,
        "targets": built,
        "aux": {"trunk": main.aux, "mtp": aux},
        **losses,
    }


def shifted_inputs(tokens, depth):
    """x[i + k] for k = 0 .. D, whether or not it is of i's document: [K, B, T]."""
    B, length = tokens.shape
    T = length - 1 - depth
    out = np.zeros((depth + 1, B, T), int)
    for k, b, i in np.ndindex(depth + 1, B, T):
        out[k, b, i] = tokens[b, i + k]
    return out


def default_weight(mtp):
    """lambda when the config leaves it open: 0.3 for sequential modules, the plain sum for parallel heads."""
    if mtp.weight is not None:
        return mtp.weight
    return {"none": 0.0, "sequential": 0.3, "parallel": float(mtp.depth)}[mtp.kind]
