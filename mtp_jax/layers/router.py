"""Expert routing and its load-balance statistics (DeepSeek-V3, 2412.19437, eqs. 13-20).

Shape letters: B rows, T positions, D model, E experts, K experts per token, G groups.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.layers.linear import linear
from mtp_jax.layers.param import RouterBias, matrix, vector
from mtp_jax.sharding import local


class RouterStats(NamedTuple):
    """Router statistics of valid positions, as sums that can be added over devices and micro-batches.

    load_E: float32, number of tokens that chose each expert.
    balance: float32, sum over rows of sum_i f_i P_i (eqs. 17-20, without alpha).
    num_rows: float32, number of rows with at least one valid position.
    """

    load_E: jax.Array
    balance: jax.Array
    num_rows: jax.Array


class Router(nnx.Module):
    """Top-k router: selects by score + bias within the best groups, gates by the score alone; all in float32."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        # "router" is not in the axis table: each device scores its tokens against every expert.
        self.weight = matrix(rngs, (config.embed_dim, config.num_experts), ("embed", "router"), 1, config)
        self.bias = RouterBias(jnp.zeros((config.num_experts,), jnp.float32))
        if config.router.logit_bias:
            self.logit_bias = vector((config.num_experts,), ("router",), 0.0, config)

    def __call__(self, x_BTD: jax.Array, valid_BT: jax.Array) -> tuple[jax.Array, jax.Array, RouterStats]:
        """Returns gates float32[B, T, K], chosen experts int32[B, T, K] and the statistics of valid positions."""
        config = self.config
        logits_BTE = linear(x_BTD.astype(jnp.float32), self.weight, precision="highest")
        if config.router.logit_bias:
            logits_BTE = logits_BTE + self.logit_bias[...].astype(jnp.float32)
        scores_BTE = jax.nn.sigmoid(logits_BTE) if config.router.score == "sigmoid" else jax.nn.softmax(logits_BTE)
        choice_BTE = jax.lax.stop_gradient(scores_BTE) + self.bias[...]
        # Independent per token, but some compilers do not partition a top-k and would gather the scores of all devices.
        tokens = ("batch", "length", None)
        chosen_BTK = local(self._choose, (tokens,), tokens)(choice_BTE)
        gates_BTK = jnp.take_along_axis(scores_BTE, chosen_BTK, axis=-1)
        if config.router.renormalize:
            gates_BTK = gates_BTK / (gates_BTK.sum(-1, keepdims=True) + 1e-20)
        return gates_BTK * config.routed_scaling_factor, chosen_BTK, self._stats(scores_BTE, chosen_BTK, valid_BT)

    def _choose(self, choice_BTE: jax.Array) -> jax.Array:
        return jax.lax.top_k(self._keep_best_groups(choice_BTE), self.config.num_experts_per_token)[1]

    def _keep_best_groups(self, choice_BTE: jax.Array) -> jax.Array:
        """Returns the scores with -inf outside each token's best groups ("node-limited routing", section 2.1.2)."""
        config = self.config
        if config.router.groups_per_token == config.router.num_groups:
            return choice_BTE
        grouped_BTGE = choice_BTE.reshape(*choice_BTE.shape[:2], config.router.num_groups, -1)
        best = 2 if config.router.group_score == "top2_sum" else 1
        group_score_BTG = jax.lax.top_k(grouped_BTGE, min(best, grouped_BTGE.shape[-1]))[0].sum(-1)
        kept_BTK = jax.lax.top_k(group_score_BTG, config.router.groups_per_token)[1]
        keep_BTG = jax.nn.one_hot(kept_BTK, config.router.num_groups, dtype=bool).any(axis=-2)
        return jnp.where(keep_BTG[..., None], grouped_BTGE, -jnp.inf).reshape(choice_BTE.shape)

    def _stats(self, scores_BTE: jax.Array, chosen_BTK: jax.Array, valid_BT: jax.Array) -> RouterStats:
        """f_i = E / (K T) * number of tokens that chose i; P_i = mean of s_i / sum_j s_j; T = valid tokens of the row.

        f counts the experts selected by score + bias within the kept groups.
        """
        config = self.config
        valid_BT1 = valid_BT[..., None].astype(jnp.float32)
        picked_BTE = jax.nn.one_hot(chosen_BTK, config.num_experts, dtype=jnp.float32).sum(axis=-2) * valid_BT1
        count_B1 = jnp.maximum(valid_BT1.sum(axis=1), 1.0)
        share_BTE = scores_BTE / (scores_BTE.sum(-1, keepdims=True) + 1e-20) * valid_BT1
        f_BE = picked_BTE.sum(axis=1) * (config.num_experts / config.num_experts_per_token) / count_B1
        p_BE = share_BTE.sum(axis=1) / count_B1
        num_rows = valid_BT.any(axis=1).sum().astype(jnp.float32)
        return RouterStats(picked_BTE.sum(axis=(0, 1)), (f_BE * p_BE).sum(), num_rows)


def moved_bias(bias_E: jax.Array, load_E: jax.Array, rate: jax.Array) -> jax.Array:
    """Returns the bias after one step of auxiliary-loss-free balancing (2408.15664).

    b_i + gamma where the load of expert i is below the mean, b_i - gamma where it is above.

    Args:
      bias_E, load_E: float32[..., E]; the load is that of the whole global batch.
      rate: gamma.
    """
    mean = load_E.mean(axis=-1, keepdims=True)
    return bias_E + rate * jnp.sign(mean - load_E)
