"""Rotary position embedding (2104.09864) with YaRN scaling (2309.00071), as in DeepSeek's released code.

Shape letters: B rows, T positions, H heads, R rotary dims, r = R / 2.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import RopeConfig


def inverse_frequencies(dim: int, rope: RopeConfig) -> np.ndarray:
    """Returns the frequencies 1 / theta^(2i / dim), scaled for long contexts as configured; float64[dim / 2].

    Linear (2306.15595): all frequencies are divided by linear_factor.
    Llama 3.1 (2407.21783, as released): wavelengths longer than original / low_frequency have their frequency divided
    by the factor, those shorter than original / high_frequency keep it, with a ramp in the inverse wavelength between.
    YaRN: dims that rotate more than beta_fast times within the original length keep their frequency, those that rotate
    less than beta_slow times have it divided by the factor, with a linear ramp between (2309.00071, eqs. 22-23). The
    ramp begins and ends at whole dims unless yarn.truncate is off.
    """
    llama3, yarn = rope.llama3, rope.yarn
    frequency = rope.theta ** -(np.arange(0, dim, 2) / dim) / rope.linear_factor
    if llama3.factor > 1:
        low, high = llama3.low_frequency, llama3.high_frequency
        turns = llama3.original_length * frequency / (2 * np.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return frequency * (kept + (1 - kept) / llama3.factor)
    if yarn.factor <= 1:
        return frequency

    def dim_of_turns(turns: float) -> float:
        return dim * math.log(yarn.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dim_of_turns(yarn.beta_fast), dim_of_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return frequency / yarn.factor * ramp + frequency * (1 - ramp)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotation_scale(rope: RopeConfig) -> float:
    """Returns the factor by which YaRN multiplies cos and sin."""
    yarn = rope.yarn
    if yarn.mscale_all_dim:
        return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    return _mscale(yarn.factor, 1.0)


def mla_softmax_scale(head_dim: int, rope: RopeConfig) -> float:
    """Returns the softmax scale of MLA: 1 / sqrt(head_dim), times mscale^2 where YaRN sets mscale_all_dim.

    Other attention variants have no such factor.
    """
    yarn = rope.yarn
    mscale = _mscale(yarn.factor, yarn.mscale_all_dim) if yarn.mscale_all_dim else 1.0
    return head_dim**-0.5 * mscale * mscale


def rotation(dim: int, positions_BT: jax.Array, rope: RopeConfig) -> tuple[jax.Array, jax.Array]:
    """Returns the scaled cosines and sines by which `dim` dims are rotated; float32[B, T, dim / 2] each."""
    inverse = jnp.asarray(inverse_frequencies(dim, rope), jnp.float32)
    angle_BTr = positions_BT.astype(jnp.float32)[..., None] * inverse
    scale = rotation_scale(rope)
    return jnp.cos(angle_BTr) * scale, jnp.sin(angle_BTr) * scale


def rotate(x_BTHR: jax.Array, positions_BT: jax.Array, rope: RopeConfig) -> jax.Array:
    """Rotates all dims of x by their positions; computed in float32, returned in the dtype of x.

    The rotated pairs are (2i, 2i + 1) if rope.interleaved, otherwise (i, i + R/2).
    """
    dim = x_BTHR.shape[-1]
    cos, sin = (factor_BTr[:, :, None] for factor_BTr in rotation(dim, positions_BT, rope))
    x = x_BTHR.astype(jnp.float32)
    if rope.interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        out = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    else:
        a, b = x[..., : dim // 2], x[..., dim // 2 :]
        out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return out.astype(x_BTHR.dtype)
