"""Schedules of the learning rate, of the weight of the MTP loss, and of the depths that contribute to it.

Every schedule is a function of the step, counted from 0, and can be traced.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtp_jax.config import MTPConfig, OptimizerConfig

# DeepSeek-V3 (2412.19437, section 4.2), in tokens: constant to 10 T of 14.8 T, cosine over 4.3 T, then 333 B at a tenth
# of the peak of 2.2e-4 and 167 B at 7.3e-6.
DEEPSEEK_CONSTANT_UNTIL = 10.0 / 14.8
DEEPSEEK_COSINE_UNTIL = 14.3 / 14.8
DEEPSEEK_TENTH_UNTIL = (14.3 + 0.333) / 14.8
DEEPSEEK_LAST = 7.3e-6 / 2.2e-4


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Returns step -> learning rate, float32.

    With s = step + 1 (so that the first step does not have a rate of 0 and the last one ends the schedule), warmup W,
    S steps, peak p and final fraction f, and q(a, b) = clip((s - a) / (b - a), 0, 1):

        warmup     p s / W                                              while s < W, in every schedule
        constant   p
        cosine     p (f + (1 - f) (1 + cos(pi q(W, S))) / 2)
        wsd        p (1 + (f - 1) q(S - decay_fraction S, S))           warmup, stable, decay (MiniCPM, 2404.06395)
        deepseek   p, cosine to p / 10, p / 10, p 7.3e-6 / 2.2e-4       switching at the shares of S above
    """
    final, warmup_steps = config.final_fraction, config.warmup_steps
    stable_until = num_steps * (1.0 - config.decay_fraction)
    shapes: dict[str, Callable[[jax.Array], jax.Array]] = {  # s -> fraction of the peak, after the warmup
        "constant": jnp.ones_like,
        "cosine": lambda done: _cosine_down(_ramp(done, warmup_steps, num_steps), final),
        "wsd": lambda done: 1.0 + (final - 1.0) * _ramp(done, stable_until, num_steps),
        "deepseek": lambda done: _deepseek(done, num_steps),
    }
    shape = shapes[config.schedule]

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        done = jnp.asarray(step, jnp.float32) + 1.0
        warmup = jnp.minimum(done / max(warmup_steps, 1), 1.0)
        return config.learning_rate * jnp.where(done < warmup_steps, warmup, shape(done))

    return schedule


def mtp_weight(mtp: MTPConfig, default: float) -> Callable[[jax.typing.ArrayLike, jax.typing.ArrayLike], jax.Array]:
    """Returns (step, tokens) -> lambda, float32.

    It is piecewise constant in mtp.weight_unit: `weight_values[i]` from boundary i on, before the first boundary
    mtp.weight, or `default` if that is None.

    `tokens` is the number trained on before this step, as float32 (15 T does not fit an int32): step * tokens_per_step
    in float32 is accurate to 6e-8 of the count, which a running sum is not.

    Args:
      default: lambda of the MTP kind.
    """
    values = np.asarray([default if mtp.weight is None else mtp.weight, *mtp.weight_values], np.float32)
    in_tokens = mtp.weight_unit == "tokens"
    # steps compare as integers: float32 cannot represent every integer beyond 2^24
    boundaries = np.asarray(mtp.weight_boundaries, np.float32 if in_tokens else np.int32)

    def weight(step: jax.typing.ArrayLike, tokens: jax.typing.ArrayLike) -> jax.Array:
        position = jnp.asarray(tokens, jnp.float32) if in_tokens else jnp.asarray(step, jnp.int32)
        return jnp.asarray(values)[jnp.sum(position >= boundaries)]

    return weight


def active_depths(mtp: MTPConfig, depth: int, num_steps: int) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """Returns step -> float32[D] of 0 and 1: the depths whose loss counts (curriculum of 2505.22757).

    forward: depth k from step (k - 1) / D * num_steps on; reverse: depth k before step (D - k + 1) / D * num_steps, and
    depth 1 always; none: all, always.
    """
    k = np.arange(1, depth + 1)
    starts, ends = np.zeros(depth, np.int64), np.full(depth, np.iinfo(np.int32).max)
    if mtp.curriculum == "forward":
        starts = -(-(k - 1) * num_steps // depth)
    elif mtp.curriculum == "reverse" and depth:
        ends = np.append(ends[:1], -(-(depth - k[1:] + 1) * num_steps // depth))
    starts, ends = starts.astype(np.int32), ends.astype(np.int32)

    def active(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.int32)
        return jnp.asarray((starts <= step) & (step < ends), jnp.float32)

    return active


def depth_weights(mtp: MTPConfig, depth: int) -> np.ndarray:
    """Returns w_k = beta^(k - 1) for k = 1 .. depth, float32[depth]."""
    return np.power(np.float32(mtp.depth_decay), np.arange(depth, dtype=np.float32))


def _deepseek(done: jax.Array, num_steps: int) -> jax.Array:
    cosine = _cosine_down(_ramp(done, DEEPSEEK_CONSTANT_UNTIL * num_steps, DEEPSEEK_COSINE_UNTIL * num_steps), 0.1)
    return jnp.where(done > DEEPSEEK_TENTH_UNTIL * num_steps, DEEPSEEK_LAST, cosine)


def _ramp(done: jax.Array, start: float, end: float) -> jax.Array:
    """Returns 0 before `start`, 1 from `end` on, linear in between."""
    return jnp.clip((done - start) / max(end - start, 1e-6), 0.0, 1.0)


def _cosine_down(ramp: jax.Array, final: float) -> jax.Array:
    return final + (1.0 - final) * 0.5 * (1.0 + jnp.cos(jnp.pi * ramp))
