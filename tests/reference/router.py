"""Routing: the experts of each token and their weights (DeepSeek-V3, 2412.19437, eqs. 13-16 and section 2.1.2)."""

import math

import numpy as np

from tests.reference.attention import softmax


def scores(params, model, x):
    """Affinities s [E] of one token [D]: sigmoid of, or softmax over, its dot products with the experts' centroids."""
    logits = x @ params["router"] + params.get("logit_bias", 0)
    if model.router.score == "softmax":
        return softmax(logits)
    return np.array([1.0 / (1.0 + math.exp(-logit)) for logit in logits])


def best(values, count):
    """Indices of the `count` largest values, best first; of equal ones the lower index."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def choose(s, bias, model):
    """The experts of one token, best s + b first, from the best groups only.

    A group's score is the sum of its two best s + b (V3), or its best (V2).
    """
    choice = s + bias
    size = model.num_experts // model.router.num_groups
    group_scores = []
    for g in range(model.router.num_groups):
        inside = sorted(choice[g * size : (g + 1) * size], reverse=True)
        group_scores.append(sum(inside[:2]) if model.router.group_score == "top2_sum" else inside[0])
    groups = best(group_scores, model.router.groups_per_token)
    allowed = [e for e in range(model.num_experts) if e // size in groups]
    order = best([choice[e] for e in allowed], model.num_experts_per_token)
    return [allowed[i] for i in order]


def gates(s, chosen, model):
    """Weights of the chosen experts: s itself (never s + b), over its sum when renormalised, times the factor."""
    total = sum(s[e] for e in chosen) + 1e-20 if model.router.renormalize else 1.0
    return [model.routed_scaling_factor * s[e] / total for e in chosen]


def route(params, model, x):
    """(s [E], chosen experts, their gates) of one token [D]."""
    s = scores(params, model, x)
    chosen = choose(s, params["bias"], model)
    return s, chosen, gates(s, chosen, model)
