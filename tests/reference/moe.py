"""DeepSeekMoE feed-forward with its load counts and balance loss (DeepSeek-V3, 2412.19437, eqs. 12 and 17-20)."""

import numpy as np

from tests.reference.router import route
from tests.reference.swiglu import swiglu


def moe(params, model, x_BTD, valid_BT):
    """FFN_shared(x) + sum_{e chosen} gate_e FFN_e(x); no token is dropped.

    Args:
      params: {"router": [D, E], "bias": [E], "gate", "up": [E, D, F], "down": [E, F, D]}, optionally
        "shared", "logit_bias" and the experts' "gate_bias", "up_bias": [E, F], "down_bias": [E, D].
      valid_BT: positions that count. The others go through the experts, but no statistic sees them.

    Returns:
      out [B, T, D], loads [E] (valid positions that chose each expert), balance loss (without alpha).
    """
    B, T, _ = x_BTD.shape
    out, loads = np.zeros(x_BTD.shape), np.zeros(model.num_experts)
    rows = []
    for b in range(B):
        routed = []
        for t in range(T):
            s, chosen, gate = route(params, model, x_BTD[b, t])
            for e, weight in zip(chosen, gate, strict=True):
                expert = {name: value[e] for name, value in params.items() if name.startswith(("gate", "up", "down"))}
                out[b, t] += weight * swiglu(expert, x_BTD[b, t], model.gated_unit)
            if "shared" in params:
                out[b, t] += swiglu(params["shared"], x_BTD[b, t], model.gated_unit)
            if valid_BT[b, t]:
                routed.append((s, chosen))
                for e in chosen:
                    loads[e] += 1
        rows.append(routed)
    return out, loads, balance_loss(rows, model)


def balance_loss(rows, model):
    """Mean over rows with a valid position of sum_e f_e P_e, without alpha (eqs. 17-20).

    f_e = E / (K n) * (positions that chose e), P_e = 1 / n * sum_t s_te / sum_j s_tj, over the n valid positions of a
    row; the experts are those chosen (with the bias). 1 when the load is even.

    Args:
      rows: for each row, its valid positions' (s [E], chosen).
    """
    losses = []
    for routed in rows:
        n = len(routed)
        if n == 0:
            continue
        loss = 0.0
        for e in range(model.num_experts):
            times_chosen = sum(1 for _, chosen in routed if e in chosen)
            f = model.num_experts / (model.num_experts_per_token * n) * times_chosen
            p = sum(s[e] / np.sum(s) for s, _ in routed) / n
            loss += f * p
        losses.append(loss)
    return sum(losses) / len(losses) if losses else 0.0
