"""The transformer block of trunk and MTP modules alike: h + attention(norm(h)), then h + ffn(norm(h))."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.layers.ffn import SwiGLU
from mtp_jax.layers.gqa import GroupedQueryAttention
from mtp_jax.layers.mla import MultiHeadLatentAttention
from mtp_jax.layers.moe import MixtureOfExperts
from mtp_jax.layers.norm import RMSNorm
from mtp_jax.layers.router import RouterStats
from mtp_jax.sharding import constrain


class Block(nnx.Module):
    """Pre-norm block with a dense or a mixture-of-experts feed-forward."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, is_moe: bool):
        attention = MultiHeadLatentAttention if config.attention == "mla" else GroupedQueryAttention
        self.attention_norm = RMSNorm(config.embed_dim, config)
        self.attention = attention(config, rngs)
        self.ffn_norm = RMSNorm(config.embed_dim, config)
        self.ffn = MixtureOfExperts(config, rngs) if is_moe else SwiGLU(config.ffn_dim, config, rngs)

    def __call__(
        self, h_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array
    ) -> tuple[jax.Array, RouterStats | None]:
        """[B, T, D] -> [B, T, D] and the router's statistics (None for a dense block).

        Args:
          h_BTD: the residual stream.
          positions_BT: int, for the rotary embedding.
          segments_BT: int; 0 is padding, which is seen by no document and counted nowhere.
        """
        h_BTD = constrain(h_BTD, "batch", "length", None)
        h_BTD = h_BTD + self.attention(self.attention_norm(h_BTD), positions_BT, segments_BT)
        x_BTD = self.ffn_norm(h_BTD)
        if isinstance(self.ffn, MixtureOfExperts):
            out_BTD, stats = self.ffn(x_BTD, segments_BT != 0)
        else:
            out_BTD, stats = self.ffn(x_BTD), None
        return constrain(h_BTD + out_BTD, "batch", "length", None), stats


def stacked(make: Callable[[nnx.Rngs], nnx.Module], num: int, rngs: nnx.Rngs) -> Any:
    """`num` modules as one, every weight with a leading dim of size `num`, each from its own key."""
    return nnx.vmap(lambda key: make(nnx.Rngs(params=key)))(jax.random.split(rngs.params(), num))


def scan_over(
    module: nnx.Module, body: Callable[..., Any], carry: Any, xs: Any, remat: str, is_shared: bool = False
) -> tuple[Any, Any]:
    """`carry, y = body(one module, carry, x)` over the stack of `module` and the leading dim of `xs`.

    One layer is compiled, whatever the number of layers. The body's activations are kept, recomputed ("full") or
    recomputed but for the matmuls ("dots") in the backward pass. With is_shared the stack is of one module, which
    every x goes through.

    Returns:
      the last carry and the stacked y.
    """
    graph, state = nnx.split(module)
    shared = jax.tree.map(lambda w: w[0], state) if is_shared else None

    def step(carry, scanned):
        layer_state, x = scanned
        return body(nnx.merge(graph, shared if is_shared else layer_state), carry, x)

    if remat == "dots":
        step = jax.checkpoint(step, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    elif remat == "full":
        step = jax.checkpoint(step)
    return jax.lax.scan(step, carry, (None if is_shared else state, xs))
