"""DeepSeekMoE (2401.06066): shared experts process every token, routed experts those that chose them; dropless.

Shape letters: B rows, T positions, D model, E experts, F expert width, K experts per token, N = B * T tokens.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.kernels.device import device
from mtp_jax.kernels.few_rows import experts as few_experts
from mtp_jax.kernels.permute import through_experts
from mtp_jax.layers.all_to_all import exchanged
from mtp_jax.layers.ffn import SwiGLU, gated_unit
from mtp_jax.layers.linear import cast, gated_biases, grouped, linear, sum_over_experts
from mtp_jax.layers.param import matrix, vector
from mtp_jax.layers.router import Router, RouterStats
from mtp_jax.sharding import LOGICAL_AXES, Axes, constrain, is_on_one_device, num_shards, spec


class MixtureOfExperts(nnx.Module):
    """Mixture of experts: y = shared(x) + sum over the chosen experts of gate * expert(x)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        experts, dim, width = config.num_experts, config.embed_dim, config.expert_dim
        self.router = Router(config, rngs)
        self.gate = matrix(rngs, (experts, dim, width), ("experts", "embed", "ffn"), 1, config)
        self.up = matrix(rngs, (experts, dim, width), ("experts", "embed", "ffn"), 1, config)
        self.down = matrix(rngs, (experts, width, dim), ("experts", "ffn", "embed"), 1, config)
        if config.expert_bias:
            self.gate_bias = vector((experts, width), ("experts", "ffn"), 0.0, config)
            self.up_bias = vector((experts, width), ("experts", "ffn"), 0.0, config)
            self.down_bias = vector((experts, dim), ("experts", None), 0.0, config)
        if config.num_shared_experts:
            self.shared = SwiGLU(config.num_shared_experts * width, config, rngs)

    def __call__(self, x_BTD: jax.Array, valid_BT: jax.Array) -> tuple[jax.Array, RouterStats]:
        """Returns the output [B, T, D] and the router's statistics of valid positions."""
        with jax.named_scope("router"):
            gates_BTK, chosen_BTK, stats = self.router(x_BTD, valid_BT)
        run = self._ragged if uses_ragged(self.config) else self._dense
        with jax.named_scope("dispatch"):
            out_BTD = run(x_BTD, gates_BTK.astype(x_BTD.dtype), chosen_BTK)
        if self.config.num_shared_experts:
            with jax.named_scope("ffn"):
                out_BTD = out_BTD + self.shared(x_BTD)
        return out_BTD, stats

    def decode(self, x_BTD: jax.Array, valid_BT: jax.Array) -> jax.Array:
        """Returns the output [B, T, D]; has no gradient.

        Few tokens on Hopper GPUs read the weights of the experts they chose only.
        """
        config = self.config
        num_chosen = x_BTD.shape[0] * x_BTD.shape[1] * config.num_experts_per_token
        is_plain = is_on_one_device() and not config.expert_bias and config.matmul_precision == "default"
        if not is_plain or few_experts.unsupported_reason(num_chosen, config.num_experts, x_BTD.dtype):
            return self(x_BTD, valid_BT)[0]
        gates_BTK, chosen_BTK, _ = self.router(x_BTD, valid_BT)
        x_ND, expert_A = x_BTD.reshape(-1, x_BTD.shape[-1]), chosen_BTK.reshape(-1)
        gate, up, down = (cast(weight, x_BTD.dtype) for weight in (self.gate, self.up, self.down))
        unit = functools.partial(gated_unit, config=config.gated_unit)
        h_AF = few_experts.products(x_ND, [gate, up], expert_A, unit)
        out_BTKD = few_experts.products(h_AF, [down], expert_A).reshape(*chosen_BTK.shape, -1)
        out_BTD = (out_BTKD * gates_BTK.astype(x_BTD.dtype)[..., None]).sum(axis=2)
        return self.shared(x_BTD, out_BTD) if config.num_shared_experts else out_BTD

    def _dense(self, x_BTD: jax.Array, gates_BTK: jax.Array, chosen_BTK: jax.Array) -> jax.Array:
        """Runs every expert on every token, with gate 0 where the expert was not chosen.

        E / K times the work of `_ragged`, but plain matmuls that can be sharded over any mesh.
        """
        dtype = x_BTD.dtype
        # The expert axis shards rows outside this layer and experts inside it: each device gathers the rows of its
        # group, runs its own experts on them, and the sums over experts are scattered back.
        gates_BTE = (jax.nn.one_hot(chosen_BTK, self.config.num_experts, dtype=dtype) * gates_BTK[..., None]).sum(-2)
        gates_BTE = constrain(gates_BTE, "moe_batch", "length", "experts")
        x_BTD = constrain(x_BTD, "moe_batch", "length", None)
        gate_BTEF = linear(x_BTD, self.gate)
        up_BTEF = linear(x_BTD, self.up)
        if self.config.expert_bias:
            gate_BTEF, up_BTEF = gate_BTEF + cast(self.gate_bias, dtype), up_BTEF + cast(self.up_bias, dtype)
        h_BTEF = gated_unit(gate_BTEF, up_BTEF, self.config.gated_unit)
        h_BTEF = constrain(h_BTEF, "moe_batch", "length", "experts", "ffn") * gates_BTE[..., None]
        out_BTD = sum_over_experts(h_BTEF, self.down)
        return out_BTD + gated_biases(gates_BTE, self.down_bias) if self.config.expert_bias else out_BTD

    def _ragged(self, x_BTD: jax.Array, gates_BTK: jax.Array, chosen_BTK: jax.Array) -> jax.Array:
        """Sorts tokens by expert and runs grouped matmuls over groups of unequal size.

        On a mesh each device sorts its own tokens; a global sort would gather all tokens on every device. If the expert
        axis is larger than 1, an all-to-all dispatches tokens to the devices that own their experts and returns the
        outputs. Expert weights are not moved, except that their model dim is gathered over the fsdp axis.
        """
        named = {"gate": self.gate, "up": self.up, "down": self.down}
        if self.config.expert_bias:
            named |= {"gate_bias": self.gate_bias, "up_bias": self.up_bias, "down_bias": self.down_bias}
        weights = {name: cast(weight, x_BTD.dtype) for name, weight in named.items()}
        experts = functools.partial(_experts, config=self.config)
        if num_shards("batch") * num_shards("length") * num_shards("ffn") == 1:
            here = functools.partial(experts, weights=weights)
            return through_experts(x_BTD, gates_BTK, chosen_BTK, self.config.num_experts, here)
        owned = functools.partial(exchanged, experts=experts, per_token=self.config.num_experts_per_token)
        run_experts = owned if num_shards("experts") > 1 else experts
        # The model dim of a weight is gathered before shard_map, so it is not sharded inside.
        kept: dict[str, Axes] = {"gate": (None, "ffn"), "up": (None, "ffn"), "down": ("ffn", None)}
        kept |= {"gate_bias": ("ffn",), "up_bias": ("ffn",), "down_bias": (None,)}
        tokens = spec(("batch", "length", None))
        specs = (tokens, tokens, tokens, {name: spec(("experts", *kept[name])) for name in weights})

        def run(x_BTD, gates_BTK, chosen_BTK, weights):
            here = functools.partial(run_experts, weights=weights)
            out_BTD = through_experts(x_BTD, gates_BTK, chosen_BTK, self.config.num_experts, here)
            return jax.lax.psum(out_BTD, LOGICAL_AXES["ffn"])

        return jax.shard_map(run, in_specs=specs, out_specs=tokens, check_vma=False)(
            x_BTD, gates_BTK, chosen_BTK, weights
        )


def _experts(x_ND: jax.Array, sizes_E: jax.Array, weights: dict[str, jax.Array], config: ModelConfig) -> jax.Array:
    """Runs the feed-forward of each expert on its group of rows, inside or outside shard_map."""
    with jax.named_scope("experts"):
        kernel, precision = config.expert_kernel, config.matmul_precision
        gate_NF, up_NF = grouped(x_ND, (weights["gate"], weights["up"]), sizes_E, kernel, precision)
        if config.expert_bias:
            # Rows after the last group get its biases; they are never read.
            expert_N = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(len(x_ND)), side="right")
            gate_NF, up_NF = gate_NF + weights["gate_bias"][expert_N], up_NF + weights["up_bias"][expert_N]
        h_NF = gated_unit(gate_NF, up_NF, config.gated_unit)
        (out_ND,) = grouped(h_NF, (weights["down"],), sizes_E, kernel, precision)
        if config.expert_bias:
            # Outputs are summed over the devices that share an expert's width, so only the first one adds the bias.
            is_first = jax.lax.axis_index(LOGICAL_AXES["ffn"]) == 0 if num_shards("ffn") > 1 else True
            out_ND = out_ND + jnp.where(is_first, weights["down_bias"], 0)[expert_N]
        return out_ND


def uses_ragged(config: ModelConfig) -> bool:
    """Returns whether experts run as grouped matmuls on the tokens that chose them.

    With model.moe_dispatch="auto": if experts are sharded, or the device does not prefer dense experts.
    """
    if config.moe_dispatch == "auto":
        return num_shards("experts") > 1 or not device().prefers_dense_experts
    return config.moe_dispatch == "ragged"
