"""Hidden states of depths 1..D: sequential modules (DeepSeek-V3, eqs. 21-23) and parallel heads (2404.19737, eq. 2)."""

import numpy as np

from tests.reference.block import block
from tests.reference.decoder import embed, final_norm, of_mtp
from tests.reference.norm import rms_norm
from tests.reference.tree import entry, unstack


def sequential(params, model, mtp, conventions, decoder_output, inputs_KBT, segments_KBT, positions_BT):
    """h_k = Block_k(M_k [norm_e(Emb(x[i + k])); norm_h(h_{k-1})]), p_k = Head(norm_k(h_k)).

    The conventions state which half comes first (concat_order), whether h_0 (decoder_hidden) and h_k (recycled_hidden)
    are taken before or after their output norm, whose norm that is (output_norm), and whether depth k + 1 receives
    h_k or h_0 again (chain).

    Args:
      params: {"trunk", "mtp"}; the leaves of "mtp" are stacked on a leading depth axis (of 1 with shared_depths).
      inputs_KBT: x[i + k]; depth 0 is not read.
      segments_KBT: segment ids of each depth, 0 where the depth has no valid input or target.

    Returns:
      D hidden states [B, T, D], ready for the head, and D statistics as of `block`.
    """
    main_norm = params["trunk"]["final_norm"]
    after_norm = conventions.decoder_hidden == "after_norm"
    h_0 = final_norm(params["trunk"], model, decoder_output.h) if after_norm else decoder_output.h
    received, hiddens, aux = h_0, [], []
    for k in range(1, mtp.depth + 1):
        module = entry(params["mtp"], 0 if mtp.shared_depths else k - 1)
        e = rms_norm(module["embed_norm"], embed(params["trunk"], inputs_KBT[k]), model.norm_eps)
        h = rms_norm(module["hidden_norm"], received, model.norm_eps)
        halves = [e, h] if conventions.concat_order == "embedding_first" else [h, e]
        joined = np.concatenate(halves, axis=-1) @ module["projection"]
        h_k, statistics = block(module["block"], of_mtp(model, mtp), joined, segments_KBT[k], positions_BT)
        norm = module["output_norm"] if conventions.output_norm == "own" else main_norm
        normed = rms_norm(norm, h_k, model.norm_eps)
        hiddens.append(normed)
        aux.append(statistics)
        if conventions.chain == "previous":
            received = normed if conventions.recycled_hidden == "after_norm" else h_k
    return hiddens, aux


def parallel(params, model, mtp, decoder_output, segments_KBT, positions_BT):
    """h_k = Block_k(z) for k >= 1 on z, the input of the main model's last block, which makes h_0 from it.

    One head and one norm, the main model's, serve all depths.
    """
    hiddens, aux = [], []
    modules = unstack(params["mtp"]["block"])
    assert len(modules) == mtp.depth, (len(modules), mtp.depth)
    for k in range(1, mtp.depth + 1):
        h_k, statistics = block(modules[k - 1], of_mtp(model, mtp), decoder_output.z, segments_KBT[k], positions_BT)
        hiddens.append(final_norm(params["trunk"], model, h_k))
        aux.append(statistics)
    return hiddens, aux


def markov(params, inputs_KBT):
    """Correction by the Markov head (DSpark, 2607.05147): W_in[x[i + k]] W_out, and 0 at depth 0; [K, B, T, V].

    Args:
      params: {"w_in": [V, R], "w_out": [R, V]}.
      inputs_KBT: x[i + k].
    """
    out = np.zeros((*inputs_KBT.shape, params["w_out"].shape[1]))
    for k, b, i in np.ndindex(*inputs_KBT.shape):
        if k:
            out[k, b, i] = params["w_in"][inputs_KBT[k, b, i]] @ params["w_out"]
    return out
