"""One pre-norm transformer block; the main model and the MTP modules use the same one."""

from tests.reference.gqa import gqa
from tests.reference.mla import mla
from tests.reference.moe import moe
from tests.reference.norm import rms_norm
from tests.reference.swiglu import swiglu


def block(params, model, h_BTD, segment_ids_BT, positions_BT):
    """h = h + attention(norm(h)); h = h + ffn(norm(h)).

    Positions whose segment id is 0 are in no statistic.

    Args:
      params: {"attention_norm", "attention", "ffn_norm", "ffn"}; an "ffn" with a "router" is a mixture of experts.

    Returns:
      h [B, T, D] and None (dense) or {"loads": [E], "balance": float}.
    """
    attention = mla if model.attention == "mla" else gqa
    x = rms_norm(params["attention_norm"], h_BTD, model.norm_eps)
    h_BTD = h_BTD + attention(params["attention"], model, x, segment_ids_BT, positions_BT)
    x = rms_norm(params["ffn_norm"], h_BTD, model.norm_eps)
    if "router" not in params["ffn"]:
        return h_BTD + swiglu(params["ffn"], x, model.gated_unit), None
    out, loads, balance = moe(params["ffn"], model, x, segment_ids_BT != 0)
    return h_BTD + out, {"loads": loads, "balance": balance}
