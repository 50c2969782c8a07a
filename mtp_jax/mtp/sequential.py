"""Sequential modules (DeepSeek-V3, 2412.19437, eqs. 21-25), with the conventions of released checkpoints.

    h_k = Block_k( M_k [ norm_e(Emb(x_{i+k})) ; norm_h(h_{k-1}) ] ),   p_k = softmax(Head(norm_k(h_k)))

Drafting runs the same chain as training: depth k at position i reads the hidden state of depth k - 1 at i and the token
at i + k, and attends to its own cache entries 0 .. i. Every step recomputes the entries that were computed from drafts,
with the accepted tokens and the newest drafts, by running a window of the last positions through every depth.

Shape letters: B rows, T positions, W positions of the window, D model, N extra depths.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import Architecture, conventions
from mtp_jax.layers.block import Block
from mtp_jax.layers.cache import Slots, slots_at
from mtp_jax.layers.linear import linear
from mtp_jax.layers.norm import RMSNorm
from mtp_jax.layers.param import matrix
from mtp_jax.layers.router import RouterStats
from mtp_jax.layers.spec import LayerSpec
from mtp_jax.layers.stack import scan_over, stacked, unstacked
from mtp_jax.mtp.kind import Extra, Kind, MainModel, Propose, Ready, Text
from mtp_jax.targets import Rows
from mtp_jax.typing import Cache, JsonObject


class SequentialModule(nnx.Module):
    """Module of one depth: two input norms, the projection, a transformer block, and optionally an output norm."""

    def __init__(self, architecture: Architecture, spec: LayerSpec, rngs: nnx.Rngs):
        model, convention = architecture.model, conventions(architecture.mtp)
        self.recomputes_nothing = model.remat == "none"
        self.is_embedding_first = convention.concat_order == "embedding_first"
        self.embed_norm = RMSNorm(model.embed_dim, model)
        self.hidden_norm = RMSNorm(model.embed_dim, model)
        self.projection = matrix(rngs, (2 * model.embed_dim, model.embed_dim), ("embed", None), 1, model)
        self.block = Block(model, spec, rngs)
        if convention.output_norm == "own":
            self.output_norm = RMSNorm(model.embed_dim, model)

    def __call__(
        self, embedding_BTD: jax.Array, hidden_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None
    ) -> tuple[jax.Array, RouterStats | None]:
        """Returns h_k [B, T, D] before the output norm, and the router's statistics."""
        # Recomputed: the input of the projection has 2 D dims and depends only on activations that are saved anyway.
        join = jax.checkpoint(self._join) if self.recomputes_nothing else self._join
        return self.block(join(embedding_BTD, hidden_BTD), positions_BT, segments_BT)

    def decode(
        self, embedding_BTD: jax.Array, hidden_BTD: jax.Array, slots: Slots, cache: Cache, num_wanted: int | None = None
    ) -> tuple[jax.Array, Cache]:
        """Returns h_k of new tokens and this depth's cache with their entries; see `Block.decode`."""
        return self.block.decode(self._join(embedding_BTD, hidden_BTD), slots, cache, num_wanted)

    def _join(self, embedding_BTD: jax.Array, hidden_BTD: jax.Array) -> jax.Array:
        halves = [self.embed_norm(embedding_BTD), self.hidden_norm(hidden_BTD)]
        joined = jnp.concatenate(halves if self.is_embedding_first else halves[::-1], axis=-1)
        return linear(joined, self.projection)


class SequentialModules(nnx.Module):
    """Stacked modules of depths 1 .. N, or a single one with mtp.shared_depths."""

    def __init__(self, architecture: Architecture, spec: LayerSpec, num_modules: int, rngs: nnx.Rngs):
        self.module = stacked(functools.partial(SequentialModule, architecture, spec), num_modules, rngs)


class Sequential(Kind):
    """MTP kind "sequential"."""

    name = "sequential"
    default_weight = 0.3  # DeepSeek-V3
    max_drafts = None  # drafts beyond the trained depth reuse the last module
    released_path = ("module",)
    has_conventions = True
    has_draft_loss = True

    @classmethod
    def heading(cls, settings: Sequence[JsonObject]) -> str:
        return "sequential modules, on top of the main model"

    def __init__(self, architecture: Architecture):
        super().__init__(architecture)
        self.conventions = conventions(self.mtp)
        self.is_shared = self.mtp.shared_depths

    @property
    def depth(self) -> int:
        return self.mtp.depth

    @property
    def num_blocks(self) -> int:
        return self.depth

    @property
    def times_applied(self) -> int:
        """N if one module is shared by all depths, else 1."""
        return self.depth if self.is_shared else 1

    def make_module(self, rngs: nnx.Rngs) -> SequentialModules:
        return SequentialModules(self.architecture, self.layer_spec, 1 if self.is_shared else self.depth, rngs)

    def hidden_states(self, module: SequentialModules, main: MainModel, rows: Rows) -> Extra:
        """Runs the chain of depths; positions whose token i + k is in another document are padding at depth k."""
        h_0 = self.draft_hidden(main)

        def body(module, previous_BTD, scanned):
            inputs_BT, segments_BT = scanned
            h_BTD, stats = module(main.embed(inputs_BT), previous_BTD, rows.positions_BT, segments_BT)
            normed_BTD, onward_BTD = self._outputs(module, h_BTD, h_0, main)
            return onward_BTD, (normed_BTD, stats)

        xs = rows.inputs_KBT[1:], None if rows.segments_KBT is None else rows.segments_KBT[1:]
        _, (hidden_NBTD, stats) = scan_over(module.module, body, h_0, xs, self.model, is_shared=self.is_shared)
        return Extra(hidden_NBTD, stats)

    def unstack(self, module: SequentialModules, ready: Ready) -> list[SequentialModule]:
        """Returns one module per depth, or a single shared one."""

        def prepared(one: SequentialModule) -> SequentialModule:
            one.block = one.block.folded()
            one = ready(one)
            one.block = one.block.joined()
            return one

        return [prepared(one) for one in unstacked(module.module)]

    def empty_caches(
        self, parts: list[SequentialModule], empty: Callable[[Block], Cache], num_speculative_tokens: int
    ) -> list[Cache]:
        """Returns one cache per trained depth in use; drafts beyond the trained depth share the last one."""
        return [empty(parts[0].block) for _ in range(min(num_speculative_tokens, self.depth))]

    def draft_hidden(self, main: MainModel) -> jax.Array:
        """Returns h_0, the first hidden state of the chain."""
        return main.final_norm(main.hidden) if self.conventions.decoder_hidden == "after_norm" else main.hidden

    def read_prompt(
        self,
        parts: list[SequentialModule],
        main: MainModel,
        hidden_BTD: jax.Array,
        tokens_NBT: jax.Array,
        slots: Slots,
        caches: list[Cache],
    ) -> list[Cache]:
        written = []
        onward_BTD = hidden_BTD
        for k, cache in enumerate(caches):
            num_wanted = None if k + 1 < len(caches) else 1  # the outputs of the last depth are not used
            module = parts[min(k, len(parts) - 1)]
            h_BTD, cache = module.decode(main.embed(tokens_NBT[k]), onward_BTD, slots, cache, num_wanted)
            _, onward_BTD = self._outputs(module, h_BTD, hidden_BTD, main)
            written.append(cache)
        return written

    def draft(
        self,
        parts: list[SequentialModule],
        main: MainModel,
        text: Text,
        num_speculative_tokens: int,
        caches: list[Cache],
        propose: Propose,
    ) -> list[Cache]:
        """Runs the depths in turn, each on the previous draft, then the last depth again for each remaining draft."""
        num_slots, caches = text.tokens_BS.shape[1], list(caches)
        slots = slots_at(text.positions_BW, num_slots)
        drafts: list[jax.Array] = []
        onward_BTD, again_BTD = text.hidden_BWD, text.hidden_BWD
        # Depth 1 was trained on the hidden state of the decoder, later depths on that of the previous depth.
        starts_normed = self.conventions.decoder_hidden == "after_norm"
        for k in range(num_speculative_tokens):
            depth = min(k, len(caches) - 1)
            if k < len(caches):
                inputs_BT = _text_with_drafts(text, text.positions_BW + k + 1, drafts)
            else:
                # One position later, on the newest draft: this depth's hidden state replaces the input that it has at
                # that position in training. Both predict the same token.
                positions_B1 = jnp.maximum(text.positions_BW[:, -1:] + k - depth, 0)
                slots, inputs_BT = slots_at(positions_B1, num_slots), drafts[-1]
                onward_BTD = again_BTD[:, -1:]
            module = parts[min(depth, len(parts) - 1)]
            num_wanted = None if k + 1 < len(caches) else 1  # None: all, which the next trained depth reads
            h_BTD, caches[depth] = module.decode(main.embed(inputs_BT), onward_BTD, slots, caches[depth], num_wanted)
            normed_BTD, onward_BTD = self._outputs(module, h_BTD, text.hidden_BWD, main)
            again_BTD = onward_BTD if depth else (normed_BTD if starts_normed else h_BTD)
            drafts.append(propose(normed_BTD[:, -1:]))
        return caches

    def _outputs(
        self, module: SequentialModule, h_BTD: jax.Array, h_0_BTD: jax.Array, main: MainModel
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the inputs of the output head and of the next depth, given the output of a module."""
        convention = self.conventions
        normed_BTD = (module.output_norm if convention.output_norm == "own" else main.final_norm)(h_BTD)
        onward_BTD = normed_BTD if convention.recycled_hidden == "after_norm" else h_BTD
        return normed_BTD, h_0_BTD if convention.chain == "decoder" else onward_BTD


def _text_with_drafts(text: Text, at_BW: jax.Array, drafts: list[jax.Array]) -> jax.Array:
    """Returns the tokens at the given positions, int32[B, W], the last ones replaced by drafts (int32[B, 1] each)."""
    known_BW = text.tokens_at(at_BW)
    if not drafts:
        return known_BW
    return jnp.concatenate([known_BW[:, : -len(drafts)], *drafts], axis=1)
