"""Samplers: tuples of logit filters that are applied in order before sampling.

(Temperature(0.8), TopK(50), TopP(0.95)) samples from the softmax of the logits after the three filters; (Greedy(),)
selects the most likely token. Parameters are leaves of a pytree, so changing them does not trigger recompilation.

Shape letters: B rows, V vocabulary.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mtp_jax.config import UserError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Greedy:
    """Keeps only the most likely token, the first one of several."""

    def filter(self, logits: jax.Array) -> jax.Array:
        best = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=bool)
        return jnp.where(best, logits, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Temperature:
    """Divides logits by `value` > 0."""

    value: float

    def filter(self, logits: jax.Array) -> jax.Array:
        return logits / self.value


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TopK:
    """Keeps the `num` most likely tokens, and those tied with the last of them (1805.04833)."""

    num: int

    def filter(self, logits: jax.Array) -> jax.Array:
        ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        last = jnp.take(ordered, jnp.minimum(self.num, logits.shape[-1]) - 1, axis=-1)
        return jnp.where(logits >= last[..., None], logits, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TopP:
    """Keeps the smallest set of most likely tokens of probability >= `mass`, and ties with the last (1904.09751)."""

    mass: float

    def filter(self, logits: jax.Array) -> jax.Array:
        ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
        probs = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs  # mass of the more likely tokens
        # The cumulative sum may round to 1 before the last token.
        last = jnp.where((before <= 0) | (before < self.mass) | (self.mass >= 1), ordered, jnp.inf).min(
            axis=-1, keepdims=True
        )
        return jnp.where(logits >= last, logits, -jnp.inf)


Sampler = tuple[Greedy | Temperature | TopK | TopP, ...]
GREEDY: Sampler = (Greedy(),)
LEAST_TEMPERATURE = 1e-4  # smaller values may overflow the logits


def make_sampler(temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None) -> Sampler:
    """Returns the sampler for temperature, top-k and top-p, applied in this order; temperature 0 is greedy.

    Raises:
      UserError: temperature is negative, not finite or between 0 and LEAST_TEMPERATURE, top_k < 1, top_p is outside
        (0, 1], or top_k or top_p is given with temperature 0.
    """
    if not isinstance(temperature, int | float) or not 0 <= temperature < float("inf"):
        raise UserError(f"temperature={temperature}: must be 0 (greedy) or a positive number")
    if 0 < temperature < LEAST_TEMPERATURE:
        raise UserError(f"temperature={temperature}: is below {LEAST_TEMPERATURE}; use 0, which is greedy")
    if top_k is not None and not (isinstance(top_k, int) and 1 <= top_k < 2**31):
        raise UserError(f"top_k={top_k}: must be an integer of at least 1; leave it out for no limit")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: must be above 0 and at most 1; leave it out for no limit")
    if temperature == 0:
        if top_k is not None or top_p is not None:
            limit = f"top_k={top_k}" if top_k is not None else f"top_p={top_p}"
            raise UserError(f"{limit}: changes nothing at temperature=0; give a temperature above 0, or leave it out")
        return GREEDY
    steps: list[Greedy | Temperature | TopK | TopP] = [Temperature(float(temperature))]
    steps += [] if top_k is None else [TopK(int(top_k))]
    steps += [] if top_p is None else [TopP(float(top_p))]
    return tuple(steps)


def is_greedy(sampler: Sampler) -> bool:
    """Returns whether the sampler is deterministic."""
    return any(isinstance(step, Greedy) for step in sampler)


def filtered(sampler: Sampler, logits: jax.Array) -> jax.Array:
    """Returns the logits to sample from, float32[..., V]; -inf for excluded tokens."""
    for step in sampler:
        logits = step.filter(logits)
    return logits


def draw(logits_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """Samples one token per row from softmax(logits), with one key per row: argmax(logits + Gumbel noise); int32[B]."""
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
    return jnp.argmax(logits_BV + noise_BV, axis=-1).astype(jnp.int32)
