"""Plain sampling from the main model: one full forward pass a token, no cache.

Shape letters: B rows, N positions of the buffer, D model, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import sharding
from mtp_jax.config import Config
from mtp_jax.model import Tree, skeleton
from mtp_jax.sharding import constrain


def sample(
    config: Config, params: Tree, biases: Tree, prompt: np.ndarray, num_tokens: int, temperature: float, seed: int
) -> np.ndarray:
    """Continue a prompt.

    Args:
      prompt: int[P], at least one token.
      num_tokens: how many to add.
      temperature: of the softmax; 0 takes the likeliest token.

    Returns:
      int32[P + num_tokens].

    Raises:
      ValueError: an empty prompt.
    """
    if len(prompt) == 0:
        raise ValueError("the prompt is empty; give at least one token")
    # The mesh's data axes must have a row each, and its context axis an equal share of the positions.
    rows, cut = sharding.num_shards("batch"), sharding.num_shards("length")
    length = len(prompt) + num_tokens
    buffer_BN = np.zeros((rows, -(-length // cut) * cut), np.int32)
    buffer_BN[:, : len(prompt)] = prompt
    out_BN = _fill(config, params, biases, buffer_BN, len(prompt), length, temperature, jax.random.key(seed))
    return np.asarray(jax.device_get(out_BN))[0, :length]


@functools.partial(jax.jit, static_argnums=0)
def _fill(config: Config, params: Tree, biases: Tree, buffer_BN, start, stop, temperature, key):
    """Fill positions start..stop-1 of the buffer, one after another. Later positions are seen by none before them."""
    model = skeleton(config).merge(params, biases)
    positions_BN = jnp.broadcast_to(jnp.arange(buffer_BN.shape[1]), buffer_BN.shape)

    def one(n, buffer_BN):
        hidden_BND = model.main(buffer_BN, jnp.ones_like(buffer_BN), positions_BN)
        hidden_BD = jax.lax.dynamic_index_in_dim(hidden_BND, n - 1, axis=1, keepdims=False)
        logits_BV = jnp.einsum(
            "bd,dv->bv", hidden_BD, model.head().astype(hidden_BD.dtype), preferred_element_type=jnp.float32
        )
        noise_V = jax.random.gumbel(jax.random.fold_in(key, n), logits_BV.shape[1:])  # argmax(logits / t + G) ~ softmax
        token_B = jnp.argmax(logits_BV + temperature * noise_V, axis=-1)
        return buffer_BN.at[:, n].set(token_B.astype(buffer_BN.dtype))

    filled_BN = jax.lax.fori_loop(start, stop, one, jnp.asarray(buffer_BN))
    return constrain(filled_BN, None, None)  # every process can read it
