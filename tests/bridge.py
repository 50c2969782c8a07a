"""Between the oracles' parameters and the model's: the same arrays under the model's own nesting."""

import jax
import jax.numpy as jnp
import numpy as np


def to_model(reference):
    """Oracle parameters -> (params, biases) of `mtp_jax.model`, float32."""
    params = {"trunk": reference["trunk"]}
    if "mtp" in reference:
        is_parallel = set(reference["mtp"]) <= {"block", "markov"}
        params["mtp"] = reference["mtp"] if is_parallel else {"module": reference["mtp"]}
    weights, biases = _split(params)
    as_float32 = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)  # noqa: E731
    return as_float32(weights), as_float32(biases)


def _split(tree):
    weights, biases = {}, {}
    for name, value in tree.items():
        if name == "router":
            weights["router"], biases["router"] = {"weight": value}, {"bias": tree["bias"]}
            weights["router"] |= {name: tree[name] for name in ("logit_bias",) if name in tree}
        elif name in ("bias", "logit_bias"):
            continue
        elif isinstance(value, dict):
            weights[name], inner = _split(value)
            if inner:
                biases[name] = inner
        else:
            weights[name] = value
    return weights, biases


def packed_rows(rng, batch, length, vocab_size, num_padding=0):
    """(tokens, segment_ids, positions), each int[batch, length]: documents of random lengths, one after another."""
    tokens = rng.integers(0, vocab_size, (batch, length))
    segments, positions = np.zeros((batch, length), int), np.zeros((batch, length), int)
    for b in range(batch):
        at, segment = 0, 1
        while at < length - num_padding:
            end = min(at + int(rng.integers(1, 10)), length - num_padding)
            segments[b, at:end], positions[b, at:end] = segment, np.arange(end - at)
            at, segment = end, segment + 1
    return tokens, segments, positions
