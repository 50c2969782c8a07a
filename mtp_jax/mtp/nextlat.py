"""Next-latent prediction (NextLat, 2511.05963): an MLP that rolls the decoder's hidden state forward by one token.

    p_0 = h_i,   p_j = p_{j-1} + MLP(norm([p_{j-1}; Emb(x_{i+j})]))   for j = 1 .. D

where h is what the output head reads. p_j is trained to be h_{i+j}, by smooth L1 distance and by the KL divergence of
the tokens that the head predicts from either; h_{i+j} is detached in both. The decoder is unchanged at inference, and
drafts come from rolling the MLP: no cache, any number of drafts.

The abstract was read at the source; the architecture (three layers, GELU, residual) and the losses were read in notes
by third parties. Not verified: the width of the MLP, the kind of norm (RMSNorm here, as in the rest of the model),
whether the head receives the gradient of the KL term (here it does, unless `mtp.detach_trunk`), and whether depths are
averaged (here they are, as in every other kind: lambda * sum_j w_j (...) / sum_j w_j, lambda 1 by default).

The last j positions of a row have no h_{i+j} in it: they do not count at depth j.

Shape letters: B rows, T positions, K = 1 + N depths, N extra depths, D model, M width of the MLP.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.layers.linear import linear
from mtp_jax.layers.norm import RMSNorm
from mtp_jax.layers.param import matrix
from mtp_jax.losses import CrossEntropy, HiddenTerm, KLDivergence, Term
from mtp_jax.mtp.kind import Caches, Extra, Kind, MainModel, Propose, Ready, Scales, Text
from mtp_jax.sharding import constrain
from mtp_jax.targets import Rows


class LatentStep(nnx.Module):
    """One step of the roll: p + W3 gelu(W2 gelu(W1 norm([p; e])))."""

    def __init__(self, model: ModelConfig, width: int, rngs: nnx.Rngs):
        dim = model.embed_dim
        self.norm = RMSNorm(2 * dim, model)
        self.w1 = matrix(rngs, (2 * dim, width), ("embed", "ffn"), 1, model)
        self.w2 = matrix(rngs, (width, width), ("embed", "ffn"), 1, model)
        self.w3 = matrix(rngs, (width, dim), ("ffn", "embed"), 1, model)

    def __call__(self, latent_BTD: jax.Array, embedding_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D], one token further."""
        x = self.norm(jnp.concatenate([latent_BTD, embedding_BTD], axis=-1))
        for weight in (self.w1, self.w2):
            x = jax.nn.gelu(linear(x, weight), approximate=False)
        return constrain(latent_BTD + linear(x, self.w3), "batch", "length", None)


class NextLatent(Kind):
    """mtp.kind = nextlat."""

    name = "nextlat"
    max_drafts = None

    @property
    def depth(self) -> int:
        return self.mtp.depth

    @property
    def times_applied(self) -> int:
        """The MLP runs at every depth."""
        return self.depth

    @property
    def head_products(self) -> float:
        """Every depth's prediction, and forward only the hidden state it is compared with."""
        return 1 + self.depth * (1 + 1 / 3)

    def make_module(self, rngs: nnx.Rngs) -> LatentStep:
        return LatentStep(self.model, self.mtp.nextlat.width or 2 * self.model.embed_dim, rngs)

    def hidden_states(self, module: LatentStep, main: MainModel, rows: Rows) -> Extra:
        """p_1 .. p_N. Positions whose tokens lie in another document hold anything; they have weight 0."""
        latent_BTD, hidden = main.final_norm(main.hidden), []
        for k in range(1, self.depth + 1):
            latent_BTD = module(latent_BTD, main.embed(rows.inputs_KBT[k]))
            hidden.append(latent_BTD)
        return Extra(jnp.stack(hidden), None)

    def terms(
        self,
        module: LatentStep,
        hidden_KBTD: jax.Array,
        head_DV: jax.Array,
        rows: Rows,
        scales: Scales,
        z_weight: float,
    ) -> list[Term | HiddenTerm]:
        del module
        config, length = self.mtp.nextlat, hidden_KBTD.shape[2]
        main_BTD = jax.lax.stop_gradient(hidden_KBTD[0])
        depths = range(1, self.depth + 1)
        ahead_NBTD = jnp.stack([jnp.pad(main_BTD[:, k:], ((0, 0), (0, k), (0, 0))) for k in depths])
        is_inside_NT = jnp.stack([jnp.arange(length) < length - k for k in depths])
        weight_NBT = rows.weight_KBT[1:] * is_inside_NT[:, None]
        share = 0.0 if self.mtp.detach_trunk else 1.0
        return [
            Term(
                CrossEntropy(z_weight),
                hidden_KBTD[:1],
                head_DV,
                rows.targets_KBT[:1],
                rows.weight_KBT[:1],
                scales.main[None],
                first_depth=0,
            ),
            Term(
                KLDivergence(),
                hidden_KBTD[1:],
                head_DV,
                rows.targets_KBT[1:],
                weight_NBT,
                config.kl_weight * scales.depth_N,
                name="kl",
                first_depth=1,
                teacher_KBTD=ahead_NBTD,
                head_share_K=jnp.full(self.depth, share),
            ),
            HiddenTerm(
                "latent", _smooth_l1(hidden_KBTD[1:], ahead_NBTD), weight_NBT, config.latent_weight * scales.depth_N
            ),
        ]

    def unstack(self, module: LatentStep, ready: Ready) -> LatentStep:
        return ready(module)

    def draft_hidden(self, main: MainModel) -> jax.Array:
        """h."""
        return main.final_norm(main.hidden)

    def draft(
        self,
        parts: LatentStep,
        main: MainModel,
        text: Text,
        num_speculative_tokens: int,
        caches: Caches,
        propose: Propose,
    ) -> Caches:
        """Roll from the last hidden state known, that of the position before the newest token."""
        latent_B1D, token_B1 = text.hidden_BWD[:, -1:], text.tokens_at(text.last_B[:, None])
        for _ in range(num_speculative_tokens):
            latent_B1D = parts(latent_B1D, main.embed(token_B1))
            token_B1 = propose(latent_B1D)
        return caches


def _smooth_l1(x: jax.Array, target: jax.Array) -> jax.Array:
    """float32[...]: mean over the last dim of d^2 / 2 where |d| < 1, else |d| - 1/2."""
    distance = jnp.abs(x.astype(jnp.float32) - target.astype(jnp.float32))
    return jnp.where(distance < 1, 0.5 * jnp.square(distance), distance - 0.5).mean(axis=-1)
