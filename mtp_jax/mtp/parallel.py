"""Parallel heads (Gloeckle et al. 2024, 2404.19737): h_k = Block_k(z) on a common hidden state z, one unembedding.

With `mtp.parallel.markov_rank` a Markov head corrects each draft by the token before it, see `mtp_jax.mtp.markov`.

Shape letters: B rows, T positions, D model, N extra depths, K drafts, R features of the Markov head.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import Config, ModelConfig, UserError
from mtp_jax.layers.block import Block
from mtp_jax.layers.cache import Slots, slots_at
from mtp_jax.layers.spec import LayerSpec
from mtp_jax.layers.stack import scan_over, stacked
from mtp_jax.losses import HiddenTerm, Term
from mtp_jax.mtp.depth_terms import depth_terms
from mtp_jax.mtp.kind import Caches, Correction, Extra, Kind, MainModel, Propose, Ready, Scales, Text
from mtp_jax.mtp.markov import MarkovHead
from mtp_jax.targets import Rows
from mtp_jax.typing import Cache, JsonObject


class ParallelHeads(nnx.Module):
    """Stacked blocks, one per extra depth, and the Markov head.

    The head of depth 0 is the main model's last block, so z is the penultimate hidden state, and heads can be added to
    a trained next-token model without changing its weights. All heads share the main model's final norm.
    """

    def __init__(self, model: ModelConfig, spec: LayerSpec, depth: int, markov_rank: int, rngs: nnx.Rngs):
        self.block = stacked(functools.partial(Block, model, spec), depth, rngs)
        if markov_rank:
            self.markov = MarkovHead(model, markov_rank, rngs)


class ParallelParts(NamedTuple):
    """Modules for drafting: the blocks of all heads with stacked weights, and the Markov head if there is one."""

    blocks: Block
    markov: MarkovHead | None


class Parallel(Kind):
    """MTP kind "parallel"."""

    name = "parallel"
    stacks_caches = True
    has_draft_loss = True
    optional_weights = ("markov",)

    @property
    def depth(self) -> int:
        return self.mtp.depth

    @property
    def num_main_layers(self) -> int:
        """model.num_layers, minus N with mtp.parameter_matched."""
        return self.model.num_layers - (self.depth if self.mtp.parameter_matched else 0)

    @property
    def num_blocks(self) -> int:
        return self.depth

    @property
    def head_products(self) -> float:
        """One per depth; the features of the Markov head widen those of the extra depths."""
        return super().head_products + self.depth * self.num_features / self.model.embed_dim

    @property
    def default_weight(self) -> float:
        """N, so that after division by sum_k w_k the loss is the plain sum over heads of the paper."""
        return float(self.depth)

    @classmethod
    def heading(cls, settings: Sequence[JsonObject]) -> str:
        matched = {each.get("mtp.parameter_matched") for each in settings}
        if matched == {True}:
            return "parallel heads, parameter-matched: the main model gives up a block for each"
        return f"parallel heads{', on top of the main model' if matched == {False} else ''}"

    def check(self, config: Config) -> None:
        """Checks that the main model keeps at least two blocks: heads start at the input of the last one."""
        super().check(config)
        mtp, model = config.mtp, config.model
        if mtp.shared_depths:
            raise UserError(
                "mtp.shared_depths=true: parallel heads that share weights are one head; use mtp.kind=sequential"
            )
        if self.num_main_layers >= 2:
            dense = model.num_dense_layers if model.num_experts else 0
            if self.num_main_layers < dense:
                raise UserError(
                    f"mtp.depth={mtp.depth}: leaves {self.num_main_layers} of model.num_layers={model.num_layers} to "
                    f"the main model, fewer than model.num_dense_layers={dense}; use mtp.parameter_matched=false"
                )
            return
        if not mtp.parameter_matched:
            raise UserError(f"model.num_layers={model.num_layers}: parallel heads need at least 2")
        deepest = model.num_layers - 2
        shallower = f"a depth of at most {deepest}, " if deepest > 0 else ""
        raise UserError(
            f"mtp.depth={mtp.depth}: parallel heads take {mtp.depth} of model.num_layers={model.num_layers} and leave "
            f"the decoder none; use {shallower}more layers, or mtp.parameter_matched=false"
        )

    def make_module(self, rngs: nnx.Rngs) -> ParallelHeads:
        return ParallelHeads(self.model, self.layer_spec, self.depth, self.num_features, rngs)

    @property
    def num_features(self) -> int:
        """R, the rank of the Markov head; 0 without one."""
        return self.mtp.parallel.markov_rank

    def head(self, module: ParallelHeads, head_DV: jax.Array) -> jax.Array:
        return module.markov.rows(head_DV) if self.num_features else head_DV

    def hidden_states(self, module: ParallelHeads, main: MainModel, rows: Rows) -> Extra:
        """Runs all heads on z; segments of depth k only mark the positions that count."""

        def body(block, branch_BTD, segments_BT):
            h_BTD, stats = block(branch_BTD, rows.positions_BT, segments_BT)
            return branch_BTD, (main.final_norm(h_BTD), stats)

        segments_NBT = None if rows.segments_KBT is None else rows.segments_KBT[1:]
        _, (hidden_NBTD, stats) = scan_over(module.block, body, main.branch, segments_NBT, self.model)
        if self.num_features:
            hidden_NBTD = jnp.concatenate([hidden_NBTD, module.markov.features(rows.inputs_KBT[1:])], axis=-1)
        return Extra(hidden_NBTD, stats)

    def terms(
        self,
        module: ParallelHeads,
        hidden_KBTD: jax.Array,
        head_DV: jax.Array,
        rows: Rows,
        scales: Scales,
        z_weight: float,
    ) -> list[Term | HiddenTerm]:
        if not (self.num_features and self.mtp.detach_decoder):
            return super().terms(module, hidden_KBTD, head_DV, rows, scales, z_weight)
        # The Markov head trains and the main model's does not.
        own_DV = self.head(module, jax.lax.stop_gradient(head_DV[: self.model.embed_dim]))
        scale_K = jnp.concatenate([scales.main[None], scales.depth_N])
        return [*depth_terms(self.mtp, hidden_KBTD, head_DV, rows, scale_K, z_weight, own_DV)]

    @property
    def max_drafts(self) -> int:
        """N: one token per head."""
        return self.depth

    def unstack(self, module: ParallelHeads, ready: Ready) -> ParallelParts:
        """Returns the blocks of all heads as one module with stacked weights, which run in parallel under vmap."""
        return ParallelParts(ready(module.block.folded()).joined(), ready(module.markov) if self.num_features else None)

    def parts_for(self, parts: ParallelParts, num_speculative_tokens: int) -> ParallelParts:
        return parts._replace(blocks=_first(parts.blocks, num_speculative_tokens))

    def empty_caches(
        self, parts: ParallelParts, empty: Callable[[Block], Cache], num_speculative_tokens: int
    ) -> Caches:
        if not num_speculative_tokens:
            return []
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_speculative_tokens, *x.shape)), empty(parts.blocks))

    def draft_hidden(self, main: MainModel) -> jax.Array:
        """Returns z, the penultimate hidden state."""
        return main.branch

    def read_prompt(
        self,
        parts: ParallelParts,
        main: MainModel,
        hidden_BTD: jax.Array,
        tokens_NBT: jax.Array,
        slots: Slots,
        caches: Caches,
    ) -> Caches:
        return _run(parts.blocks, len(tokens_NBT), hidden_BTD, slots, caches)[1]

    def draft(
        self,
        parts: ParallelParts,
        main: MainModel,
        text: Text,
        num_speculative_tokens: int,
        caches: Caches,
        propose: Propose,
    ) -> Caches:
        """Drafts one token per head, all from z."""
        slots = slots_at(text.positions_BW, text.tokens_BS.shape[1])
        h_KB1D, caches = _run(parts.blocks, num_speculative_tokens, text.hidden_BWD, slots, caches)
        propose(jnp.moveaxis(main.final_norm(h_KB1D[:, :, 0]), 0, 1))
        return caches

    def correction(self, parts: ParallelParts, vocabulary: jax.Array | None) -> Correction | None:
        if parts.markov is None:
            return None
        return functools.partial(parts.markov.correction, vocabulary=vocabulary)


def _run(blocks: Block, num: int, z_BTD: jax.Array, slots: Slots, caches: Caches) -> tuple[jax.Array, Caches]:
    """Runs the first `num` heads on the same z; returns the last position's outputs [K, B, 1, D] and the caches."""

    def one(block: Block, cache: Cache) -> tuple[jax.Array, Cache]:
        return block.decode(z_BTD, slots, cache, 1)

    return jax.vmap(one)(_first(blocks, num), caches)


def _first(blocks: Block, num: int) -> Block:
    """Returns the first `num` of stacked blocks."""
    return jax.tree.map(lambda w: w if len(w) == num else w[:num], blocks)
