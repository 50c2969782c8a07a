"""Interface of an MTP kind: everything that multi-token prediction adds to a next-token model.

Modules outside this package use this interface and do not refer to a kind by name. To add a kind, subclass `Kind` in a
new file and list it in `mtp_jax.mtp.KINDS` (docs/extending.md).

Shape letters: B rows, T positions, N extra depths (`Kind.depth`), K = 1 + N depths with the main model, D model, V
vocabulary, S slots of a cache, W positions of the drafting window, n drafts proposed at once, R rank of a correction.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import MAX_DEPTH, Architecture, Config, UserError
from mtp_jax.layers.block import Block
from mtp_jax.layers.cache import Slots
from mtp_jax.layers.norm import RMSNorm
from mtp_jax.layers.router import RouterStats
from mtp_jax.layers.spec import LayerSpec, layer_specs, with_window
from mtp_jax.losses import HiddenTerm, Term
from mtp_jax.mtp.depth_terms import depth_terms, has_teacher
from mtp_jax.targets import Rows
from mtp_jax.typing import Cache, JsonObject, PyTree

Caches = PyTree  # KV caches of a kind's drafting modules
Ready = Callable[[Any], Any]  # a module -> the same module with its weights cast and placed for inference
Correction = Callable[[jax.Array], jax.Array]  # token before a draft int32[B] -> what is added to its logits [B, V']
Propose = Callable[[jax.Array], jax.Array]  # normed hidden states [B, n, D] of the next n drafts -> drafts int32[B, n]


class DecoderInputs(NamedTuple):
    """Inputs of the decoder's blocks: embeddings [B, T, D], positions int[B, T], segment ids int[B, T] or None."""

    h_BTD: jax.Array
    positions_BT: jax.Array
    segments_BT: jax.Array | None


class MainModel(NamedTuple):
    """Parts of the main model that an MTP kind uses.

    hidden: [B, T, D], output of the last block, before the final norm. branch: [B, T, D], the penultimate hidden state,
    which is the input of that block.
    final_norm: final norm of the main model. embed: int[B, T] -> embeddings [B, T, D], by the main model's table.
    """

    hidden: jax.Array
    branch: jax.Array
    final_norm: RMSNorm
    embed: Callable[[jax.Array], jax.Array]


class Extra(NamedTuple):
    """Output of the extra depths.

    hidden: [N, B, T, D], normed, as the shared head reads it. stats: router statistics of the kind's blocks, stacked
    over depths; None without experts.
    """

    hidden: jax.Array
    stats: RouterStats | None


class Scales(NamedTuple):
    """Factors of the sums of the loss terms, computed before the forward pass.

    main: float32, 1 / number of valid depth-0 targets of the global batch. depth_N: float32[N], lambda times the
    depth's weight over its divisor; 0 for depths that a curriculum disables. weight: float32, lambda.
    """

    main: jax.Array
    depth_N: jax.Array
    weight: jax.Array


class Text(NamedTuple):
    """Inputs of drafting.

    tokens_BS: int32, known up to and including position `last_B`. hidden_BWD: `Kind.draft_hidden` at the positions
    last - W .. last - 1; undefined at negative positions.
    """

    tokens_BS: jax.Array
    last_B: jax.Array
    hidden_BWD: jax.Array

    @property
    def positions_BW(self) -> jax.Array:
        """Returns the positions of hidden_BWD, int32[B, W]; negative before the start of a row."""
        window = self.hidden_BWD.shape[1]
        return self.last_B[:, None] - window + jnp.arange(window)

    def tokens_at(self, positions_BW: jax.Array) -> jax.Array:
        """Returns the tokens at the given positions, int32[B, W]; undefined outside the text."""
        return jnp.take_along_axis(self.tokens_BS, jnp.clip(positions_BW, 0, self.tokens_BS.shape[1] - 1), axis=1)


class Kind:
    """A kind of multi-token prediction. Defaults are those of a model that only predicts the next token.

    Attributes:
      name: value of `mtp.kind`.
      is_baseline: whether this is the next-token model that others are compared with.
      has_conventions: whether released checkpoints of the kind differ in the conventions of the config.
      stacks_caches: whether `empty_caches` are stacked along a leading dim of depths.
      has_draft_loss: whether the kind reads `mtp.loss`.
      released_path: path below "mtp" of the stacked modules stored in released layouts; None if no layout stores them.
      optional_weights: names below "mtp" of weights that a model without them may be extended by (`init_from`).
    """

    name: str
    is_baseline = False
    has_conventions = False
    stacks_caches = False
    has_draft_loss = False
    released_path: tuple[str, ...] | None = None
    optional_weights: tuple[str, ...] = ()

    def __init__(self, architecture: Architecture):
        self.architecture = architecture
        self.model, self.mtp = architecture.model, architecture.mtp

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.architecture == other.architecture

    def __hash__(self) -> int:
        return hash(self.architecture)

    # Properties of the kind.

    @property
    def depth(self) -> int:
        """N, the number of tokens predicted at each position in addition to the next one."""
        return 0

    @property
    def lookahead(self) -> int:
        """Number of tokens that a row needs beyond its positions and the next token."""
        return self.depth

    @property
    def num_main_layers(self) -> int:
        """Number of blocks of the main model."""
        return self.model.num_layers

    @property
    def num_blocks(self) -> int:
        """Number of transformer blocks applied to a token in addition to those of the main model."""
        return 0

    @property
    def layer_spec(self) -> LayerSpec:
        """Specification of the kind's blocks: the main model's last layer, with `mtp.window` and `mtp.dense_ffn`."""
        spec = layer_specs(self.model, self.model.num_layers)[-1]
        if self.mtp.dense_ffn:
            spec = replace(spec, is_moe=False)
        return spec if self.mtp.window is None else with_window(spec, self.model, self.mtp.window)

    @property
    def times_applied(self) -> int:
        """Number of times that each of the kind's weights is applied to a token."""
        return 1

    @property
    def head_products(self) -> float:
        """Number of output heads applied to a token, forward and backward; a forward pass alone counts 1/3."""
        return 1 + self.depth * (1 + 1 / 3 if has_teacher(self.mtp) else 1)

    @property
    def default_weight(self) -> float:
        """lambda if `mtp.weight` is not set."""
        return 1.0

    def describe(self) -> str:
        """Returns a short description for the first lines of a run."""
        return f"{self.name} MTP, depth {self.depth}"

    @classmethod
    def reads(cls, key: str) -> bool:
        """Returns whether the kind reads `mtp.<key>`; for reports and sweeps."""
        del key
        return True

    @classmethod
    def heading(cls, settings: Sequence[JsonObject]) -> str:
        """Returns the description in the title of a table of runs with these settings (`section.key` -> value)."""
        del settings
        return f"{cls.name}, on top of the main model"

    def check(self, config: Config) -> None:
        """Checks that the kind supports the settings.

        Raises:
          UserError: on the first problem, naming field, value and remedy.
        """
        check_weights(config)
        check_loss(config, self.has_draft_loss)

    def check_export(self) -> None:
        """Raises UserError if no released layout stores the kind's weights."""
        if self.released_path is None:
            raise UserError(
                f"mtp.kind={self.name!r}: no released layout holds its weights; export the main model alone, with "
                "--depth=0 of mtp_jax.tools.convert export"
            )

    # Training and evaluation.

    def make_module(self, rngs: nnx.Rngs) -> nnx.Module | None:
        """Returns a module with the kind's parameters, or None if it has none."""
        del rngs
        return None

    def decoder_inputs(self, module: Any, inputs: DecoderInputs) -> DecoderInputs:
        """Returns the inputs of the decoder, for example to replace embeddings at masked positions.

        Called whenever the decoder runs. In decoding `module` is the result of `unstack`, and the inputs are the new
        tokens only, at `positions_BT`.
        """
        del module
        return inputs

    @property
    def num_features(self) -> int:
        """Number of features of `hidden_states` beyond the D of the decoder, for which `head` has rows."""
        return 0

    def head(self, module: Any, head_DV: jax.Array) -> jax.Array:
        """Returns the output head of all depths: that of the main model, with `num_features` more rows.

        The features of the main model are 0, so that its logits do not change.
        """
        del module
        return head_DV

    def hidden_states(self, module: Any, main: MainModel, rows: Rows) -> Extra:
        """Returns the hidden states of depths 1 .. N, followed by the `num_features` features.

        Args:
          module: from `make_module`.
          main: outputs of the main model.
          rows: depth k reads `inputs_KBT[k]`. Segment 0 at depth k marks a position that does not count: no
            position that counts attends to it, and no router counts it.
        """
        del module, rows
        return Extra(jnp.zeros((0, *main.hidden.shape), main.hidden.dtype), None)

    def terms(
        self, module: Any, hidden_KBTD: jax.Array, head_DV: jax.Array, rows: Rows, scales: Scales, z_weight: float
    ) -> list[Term | HiddenTerm]:
        """Returns the terms of the loss; by default those of `depth_terms`, through the shared head.

        Args:
          module: from `make_module`.
          hidden_KBTD: hidden states of the main model, then those of `hidden_states`.
          head_DV: the shared output head, as `head` returns it.
          rows: targets and weights of every depth.
          scales: factors of the terms.
          z_weight: weight of the z-loss.
        """
        del module
        scale_K = jnp.concatenate([scales.main[None], scales.depth_N])
        return [*depth_terms(self.mtp, hidden_KBTD, head_DV, rows, scale_K, z_weight)]

    # Decoding.

    @property
    def max_drafts(self) -> int | None:
        """Maximum number of tokens drafted per forward pass; None: no limit."""
        return 0

    def unstack(self, module: Any, ready: Ready) -> PyTree:
        """Returns the kind's modules in the form that drafting uses, as a pytree."""
        del module, ready
        return ()

    def parts_for(self, parts: PyTree, num_speculative_tokens: int) -> PyTree:
        """Returns what drafting that many tokens reads of `parts`.

        It is called once before the loop over steps, in which a part of an array would be copied at every step.
        """
        del num_speculative_tokens
        return parts

    def empty_caches(self, parts: PyTree, empty: Callable[[Block], Cache], num_speculative_tokens: int) -> Caches:
        """Returns caches for drafting with `parts` from `unstack`; `empty(block)` returns the cache of one block."""
        del parts, empty, num_speculative_tokens
        return []

    def draft_hidden(self, main: MainModel) -> jax.Array:
        """Returns the hidden states of the main model that drafting starts from, [B, T, D]."""
        return main.hidden

    def read_prompt(
        self, parts: PyTree, main: MainModel, hidden_BTD: jax.Array, tokens_NBT: jax.Array, slots: Slots, caches: Caches
    ) -> Caches:
        """Prefills the caches with a chunk of prompt tokens.

        Args:
          parts: from `unstack`.
          main: outputs of the main model for the chunk.
          hidden_BTD: `draft_hidden` at the positions of the chunk.
          tokens_NBT: tokens at i + k, for depths k = 1, 2, ...
          slots: positions and cache slots of the chunk.
          caches: caches to extend.

        Returns:
          the caches with the entries of the chunk.
        """
        del parts, main, hidden_BTD, tokens_NBT, slots
        return caches

    def draft(
        self, parts: PyTree, main: MainModel, text: Text, num_speculative_tokens: int, caches: Caches, propose: Propose
    ) -> Caches:
        """Drafts the `num_speculative_tokens` tokens after position `text.last_B`.

        Args:
          parts: from `unstack`.
          main: the main model; only `embed` and `final_norm` are current, hidden states are those of `text`.
          text: tokens and hidden states so far.
          caches: caches to extend.
          propose: draws the next drafts from hidden states; must be called until all drafts are proposed.

        Returns:
          the caches with the entries of this step.
        """
        raise NotImplementedError(f"{self.name} does not draft")

    def correction(self, parts: PyTree, vocabulary: jax.Array | None) -> Correction | None:
        """Returns how the logits of a draft depend on the token before it beyond its hidden state; None: not at all.

        Args:
          parts: from `unstack`.
          vocabulary: int32[V'], ids of the tokens that may be drafted; None: all.
        """
        del parts, vocabulary
        return None


def check_loss(config: Config, has_draft_loss: bool) -> None:
    """Checks `mtp.loss`.

    Raises:
      UserError: a loss that the kind does not read, or a share of a loss that is cross-entropy alone.
    """
    mtp = config.mtp
    if has_teacher(mtp) and not has_draft_loss:
        raise UserError(f"mtp.loss={mtp.loss}: of no effect with mtp.kind={mtp.kind}; use cross_entropy")
    if mtp.cross_entropy_share and not has_teacher(mtp):
        raise UserError(
            f"mtp.cross_entropy_share={mtp.cross_entropy_share}: of no effect with mtp.loss=cross_entropy; use 0"
        )


def check_weights(config: Config) -> None:
    """Checks depth and loss weights.

    Raises:
      UserError: on the first problem, naming field, value and remedy.
    """
    mtp = config.mtp
    if not 1 <= mtp.depth <= MAX_DEPTH:
        raise UserError(f"mtp.depth={mtp.depth}: must lie between 1 and {MAX_DEPTH}; for no MTP set mtp.kind=none")
    if len(mtp.weight_values) != len(mtp.weight_boundaries):
        raise UserError(
            f"mtp.weight_values={mtp.weight_values}: needs one value per boundary, "
            f"mtp.weight_boundaries={mtp.weight_boundaries}"
        )
    if mtp.weight_unit == "steps" and max(mtp.weight_boundaries, default=0) >= 2**31:
        raise UserError(
            f"mtp.weight_boundaries={mtp.weight_boundaries}: steps must stay below 2^31; use weight_unit=tokens"
        )
    if list(mtp.weight_boundaries) != sorted(set(mtp.weight_boundaries)):
        raise UserError(f"mtp.weight_boundaries={mtp.weight_boundaries}: must increase")
