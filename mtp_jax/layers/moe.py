"""DeepSeekMoE (2401.06066): shared experts see every token, routed experts the tokens that chose them. Dropless.

Shape letters: B rows, T positions, D model, E experts, F expert width, K experts a token, N = B * T tokens.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.layers.ffn import SwiGLU
from mtp_jax.layers.param import matrix
from mtp_jax.layers.router import Router, RouterStats
from mtp_jax.sharding import constrain


class MixtureOfExperts(nnx.Module):
    """y = shared(x) + sum over the chosen experts of gate * expert(x)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        experts, dim, width = config.num_experts, config.embed_dim, config.expert_dim
        self.router = Router(config, rngs)
        self.gate = matrix(rngs, (experts, dim, width), ("experts", "embed", "ffn"), 1, config)
        self.up = matrix(rngs, (experts, dim, width), ("experts", "embed", "ffn"), 1, config)
        self.down = matrix(rngs, (experts, width, dim), ("experts", "ffn", "embed"), 1, config)
        if config.num_shared_experts:
            self.shared = SwiGLU(config.num_shared_experts * width, config, rngs)

    def __call__(self, x_BTD: jax.Array, valid_BT: jax.Array) -> tuple[jax.Array, RouterStats]:
        """[B, T, D] -> [B, T, D], and the router's statistics of valid positions."""
        gates_BTK, chosen_BTK, stats = self.router(x_BTD, valid_BT)
        run = self._ragged if uses_ragged(self.config) else self._dense
        out_BTD = run(x_BTD, gates_BTK.astype(x_BTD.dtype), chosen_BTK)
        if self.config.num_shared_experts:
            out_BTD = out_BTD + self.shared(x_BTD)
        return out_BTD, stats

    def _dense(self, x_BTD: jax.Array, gates_BTK: jax.Array, chosen_BTK: jax.Array) -> jax.Array:
        """Every expert runs on every token and the gate is zero where it was not chosen: E / K times the work, but
        plain matmuls that any mesh can cut."""
        dtype = x_BTD.dtype
        gates_BTE = (jax.nn.one_hot(chosen_BTK, self.config.num_experts, dtype=dtype) * gates_BTK[..., None]).sum(-2)
        # The expert axis holds rows outside this layer and experts inside it.
        x_BTD = constrain(x_BTD, "batch", "length", None)
        gate_BTEF = jnp.einsum("btd,edf->btef", x_BTD, self.gate[...].astype(dtype))
        up_BTEF = jnp.einsum("btd,edf->btef", x_BTD, self.up[...].astype(dtype))
        h_BTEF = jax.nn.silu(gate_BTEF) * up_BTEF * gates_BTE[..., None]
        return jnp.einsum("btef,efd->btd", h_BTEF, self.down[...].astype(dtype))

    def _ragged(self, x_BTD: jax.Array, gates_BTK: jax.Array, chosen_BTK: jax.Array) -> jax.Array:
        """Tokens sorted by expert, one grouped matmul over the groups as long as they are."""
        dtype, num_chosen = x_BTD.dtype, chosen_BTK.shape[-1]
        expert_N = chosen_BTK.reshape(-1)
        order_N = jnp.argsort(expert_N, stable=True)
        sizes_E = jnp.bincount(expert_N, length=self.config.num_experts).astype(jnp.int32)
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])[order_N // num_chosen]
        gate_NF = jax.lax.ragged_dot(x_ND, self.gate[...].astype(dtype), sizes_E)
        up_NF = jax.lax.ragged_dot(x_ND, self.up[...].astype(dtype), sizes_E)
        y_ND = jax.lax.ragged_dot(jax.nn.silu(gate_NF) * up_NF, self.down[...].astype(dtype), sizes_E)
        y_BTKD = y_ND[jnp.argsort(order_N)].reshape(*chosen_BTK.shape, x_BTD.shape[-1])
        return (y_BTKD * gates_BTK[..., None]).sum(axis=-2)


def uses_ragged(config: ModelConfig) -> bool:
    """Which dispatch runs. "auto": plain matmuls on a CPU, where ragged_dot computes every group densely anyway."""
    if config.moe_dispatch == "auto":
        return jax.default_backend() != "cpu"
    return config.moe_dispatch == "ragged"
