"""Rotary positions (2104.09864, eq. 34) and YaRN (2309.00071, section 3; constants as DeepSeek released them)."""

import math

import numpy as np


def get_mscale(factor, m):
    """0.1 * m * ln(factor) + 1 for factor > 1, else 1."""
    return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0


def inverse_frequencies(dim, model):
    """Angle per position of each of the dim / 2 pairs: theta^(-2i / dim), stretched where a factor is above 1.

    Llama 3.1 (as Meta released it): by wavelength against two bounds of the original length.

    YaRN: a pair that turns more than beta_fast times over the original length keeps its frequency, one that turns less
    than beta_slow times is divided by the factor, and a linear ramp over the pair index lies between.
    """
    plain = [model.rope.theta ** (-2.0 * i / dim) / model.rope.linear_factor for i in range(dim // 2)]
    if model.rope.llama3.factor > 1:
        return [llama3(f, model) for f in plain]
    if model.rope.yarn.factor <= 1:
        return plain
    low, high = correction_range(dim, model)
    out = []
    for i in range(dim // 2):
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)  # 0: keep, 1: interpolate
        out.append(plain[i] * (1.0 - ramp) + plain[i] / model.rope.yarn.factor * ramp)
    return out


def llama3(frequency, model):
    """One frequency after Llama 3.1's stretching."""
    wavelength = 2 * math.pi / frequency
    if wavelength < model.rope.llama3.original_length / model.rope.llama3.high_frequency:
        return frequency
    if wavelength > model.rope.llama3.original_length / model.rope.llama3.low_frequency:
        return frequency / model.rope.llama3.factor
    span = model.rope.llama3.high_frequency - model.rope.llama3.low_frequency
    smooth = (model.rope.llama3.original_length / wavelength - model.rope.llama3.low_frequency) / span
    return (1 - smooth) * frequency / model.rope.llama3.factor + smooth * frequency


def correction_range(dim, model):
    """(low, high): the pair indices where the ramp starts and ends, clipped to [0, dim - 1]; rounded to floor and
    ceiling where the config has truncate."""

    def pair_index(num_turns):
        return (
            dim
            * math.log(model.rope.yarn.original_length / (num_turns * 2 * math.pi))
            / (2 * math.log(model.rope.theta))
        )

    low, high = pair_index(model.rope.yarn.beta_fast), pair_index(model.rope.yarn.beta_slow)
    if model.rope.yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, (high + 0.001 if high == low else high)


def attention_factor(model):
    """Factor of cos and sin."""
    factor = model.rope.yarn.factor
    if factor <= 1:
        return 1.0
    if model.rope.yarn.mscale_all_dim > 0:
        return get_mscale(factor, model.rope.yarn.mscale) / get_mscale(factor, model.rope.yarn.mscale_all_dim)
    return 0.1 * math.log(factor) + 1.0


def softmax_factor(model):
    """Factor of the softmax scale of latent attention."""
    if model.rope.yarn.factor <= 1 or model.rope.yarn.mscale_all_dim <= 0:
        return 1.0
    return get_mscale(model.rope.yarn.factor, model.rope.yarn.mscale_all_dim) ** 2


def rotate(vector, position, model):
    """One vector [n] at one position, every pair (a, b) turned by position * inverse frequency.

    (a, b) -> (a cos - b sin, a sin + b cos), written back to the slots it came from: (2i, 2i + 1) when interleaved,
    (i, i + n / 2) otherwise.
    """
    n = len(vector)
    assert n % 2 == 0, n
    frequencies, scale = inverse_frequencies(n, model), attention_factor(model)
    out = np.zeros(n)
    for i in range(n // 2):
        first, second = (2 * i, 2 * i + 1) if model.rope.interleaved else (i, i + n // 2)
        cos = scale * math.cos(position * frequencies[i])
        sin = scale * math.sin(position * frequencies[i])
        out[first] = vector[first] * cos - vector[second] * sin
        out[second] = vector[first] * sin + vector[second] * cos
    return out
