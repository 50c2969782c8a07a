"""DeepSeekMoE (2401.06066): shared experts see every token, routed experts the tokens that chose them. Dropless.

Shape letters: B rows, T positions, D model, E experts, F expert width, K experts a token, N = B * T tokens.
"""

import functools

import jax
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.kernels.device import device
from mtp_jax.kernels.permute import through_experts
from mtp_jax.layers.exchange import exchanged
from mtp_jax.layers.ffn import SwiGLU
from mtp_jax.layers.linear import cast, grouped, linear, sum_over_experts
from mtp_jax.layers.param import matrix
from mtp_jax.layers.router import Router, RouterStats
from mtp_jax.sharding import LOGICAL_AXES, constrain, num_shards, spec


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
        with jax.named_scope("router"):
            gates_BTK, chosen_BTK, stats = self.router(x_BTD, valid_BT)
        run = self._ragged if uses_ragged(self.config) else self._dense
        with jax.named_scope("dispatch"):
            out_BTD = run(x_BTD, gates_BTK.astype(x_BTD.dtype), chosen_BTK)
        if self.config.num_shared_experts:
            with jax.named_scope("ffn"):
                out_BTD = out_BTD + self.shared(x_BTD)
        return out_BTD, stats

    def _dense(self, x_BTD: jax.Array, gates_BTK: jax.Array, chosen_BTK: jax.Array) -> jax.Array:
        """Every expert runs on every token and the gate is zero where it was not chosen: E / K times the work, but
        plain matmuls that any mesh can cut."""
        dtype = x_BTD.dtype
        # The expert axis holds rows outside this layer and experts inside it: each device gathers its neighbours' rows,
        # runs its own experts on them, and the sums over experts are scattered back.
        gates_BTE = (jax.nn.one_hot(chosen_BTK, self.config.num_experts, dtype=dtype) * gates_BTK[..., None]).sum(-2)
        gates_BTE = constrain(gates_BTE, "moe_batch", "length", "experts")
        x_BTD = constrain(x_BTD, "moe_batch", "length", None)
        gate_BTEF = linear(x_BTD, self.gate)
        up_BTEF = linear(x_BTD, self.up)
        h_BTEF = constrain(jax.nn.silu(gate_BTEF) * up_BTEF, "moe_batch", "length", "experts", "ffn")
        h_BTEF = h_BTEF * gates_BTE[..., None]
        return sum_over_experts(h_BTEF, self.down)

    def _ragged(self, x_BTD: jax.Array, gates_BTK: jax.Array, chosen_BTK: jax.Array) -> jax.Array:
        """Tokens sorted by expert, one grouped matmul over the groups as long as they are.

        On a mesh each device sorts its own tokens (a sort over all devices' tokens would gather every token on every
        one of them). Where the expert axis is cut, tokens go to the owners of their experts and come back; the experts'
        weights stay where they are, but for the model dim, which is collected over the fsdp axis.
        """
        weights = tuple(cast(w, x_BTD.dtype) for w in (self.gate, self.up, self.down))
        experts = functools.partial(_experts, kernel=self.config.expert_kernel)
        if num_shards("batch") * num_shards("length") * num_shards("ffn") == 1:
            here = functools.partial(experts, weights=weights)
            return through_experts(x_BTD, gates_BTK, chosen_BTK, self.config.num_experts, here)
        owned = functools.partial(exchanged, experts=experts, per_token=self.config.num_experts_per_token)
        travel = owned if num_shards("experts") > 1 else experts
        tokens, wide = spec(("batch", "length", None)), spec(("experts", None, "ffn"))
        specs = (tokens, tokens, tokens, (wide, wide, spec(("experts", "ffn", None))))

        def run(x_BTD, gates_BTK, chosen_BTK, weights):
            here = functools.partial(travel, weights=weights)
            out_BTD = through_experts(x_BTD, gates_BTK, chosen_BTK, self.config.num_experts, here)
            return jax.lax.psum(out_BTD, LOGICAL_AXES["ffn"])

        return jax.shard_map(run, in_specs=specs, out_specs=tokens, check_vma=False)(
            x_BTD, gates_BTK, chosen_BTK, weights
        )


def _experts(x_ND, sizes_E, weights, kernel):
    """SwiGLU of every expert on its group of rows."""
    gate_EDF, up_EDF, down_EFD = weights
    with jax.named_scope("experts"):
        gate_NF, up_NF = grouped(x_ND, (gate_EDF, up_EDF), sizes_E, kernel)
        return grouped(jax.nn.silu(gate_NF) * up_NF, (down_EFD,), sizes_E, kernel)[0]


def uses_ragged(config: ModelConfig) -> bool:
    """Whether tokens are dispatched by grouped matmuls. "auto": the exchange of tokens where experts live on several
    devices, and otherwise grouped matmuls unless the device prefers dense ones."""
    if config.moe_dispatch == "auto":
        return num_shards("experts") > 1 or not device().prefers_dense_experts
    return config.moe_dispatch == "ragged"
