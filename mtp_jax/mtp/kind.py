"""The interface of an MTP kind: one object that owns all that multi-token prediction adds to a next-token model.

Everything outside this package asks the object and knows no kind by name. To add a kind, subclass `Kind` in a new file
and list it in `mtp_jax.mtp.KINDS` (docs/extending.md).

Shape letters: B rows, T positions, N extra depths (`Kind.depth`), K = 1 + N depths with the main model, D model, V
vocabulary, S slots of a cache, W positions of the drafting window, n drafts proposed at once.
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
from mtp_jax.losses import CrossEntropy, HiddenTerm, Term
from mtp_jax.targets import Rows
from mtp_jax.typing import Cache, JsonObject, PyTree

Caches = PyTree  # of a kind's own: what its drafting keeps of the tokens read
Ready = Callable[[Any], Any]  # a module -> the same module with its weights cast and placed for inference
Propose = Callable[[jax.Array], jax.Array]  # normed hidden states [B, n, D] of the next n drafts -> int32[B, n], drawn


class DecoderInputs(NamedTuple):
    """What the decoder's blocks read: embeddings [B, T, D], positions int[B, T], segment ids int[B, T] or None."""

    h_BTD: jax.Array
    positions_BT: jax.Array
    segments_BT: jax.Array | None


class MainModel(NamedTuple):
    """What a kind sees of the main model.

    hidden, branch: [B, T, D], the last block's output before the final norm, and that block's input.
    final_norm: the main model's. embed: int[B, T] -> embeddings [B, T, D], by the main model's own table.
    """

    hidden: jax.Array
    branch: jax.Array
    final_norm: RMSNorm
    embed: Callable[[jax.Array], jax.Array]


class Extra(NamedTuple):
    """hidden: [N, B, T, D], normed: ready for the shared head. stats: of the kind's blocks, stacked, or None."""

    hidden: jax.Array
    stats: RouterStats | None


class Scales(NamedTuple):
    """What multiplies the sums of the loss terms, known before the forward pass.

    main: float32, one over the number of valid depth-0 targets of the global batch. depth_N: float32[N], lambda and the
    depth's weight over its divisor; 0 for depths a curriculum has switched off. weight: float32, lambda.
    """

    main: jax.Array
    depth_N: jax.Array
    weight: jax.Array


class Text(NamedTuple):
    """What drafting reads. tokens_BS: int32, known up to position `last_B`. hidden_BWD: `Kind.draft_hidden` at the
    positions last - W .. last - 1; those before the row may be anything."""

    tokens_BS: jax.Array
    last_B: jax.Array
    hidden_BWD: jax.Array

    @property
    def positions_BW(self) -> jax.Array:
        """int32[B, W], the positions of hidden_BWD; negative before the row."""
        window = self.hidden_BWD.shape[1]
        return self.last_B[:, None] - window + jnp.arange(window)

    def tokens_at(self, positions_BW: jax.Array) -> jax.Array:
        """int32[B, W], the tokens at these positions; where the text does not reach, anything."""
        return jnp.take_along_axis(self.tokens_BS, jnp.clip(positions_BW, 0, self.tokens_BS.shape[1] - 1), axis=1)


class Kind:
    """Multi-token prediction of one kind. The defaults are those of a model that predicts the next token only.

    Attributes:
      name: of `mtp.kind`.
      is_baseline: whether this is the next-token model that others are compared with.
      has_conventions: whether released checkpoints of the kind differ by the conventions of the config.
      stacks_caches: whether `empty_caches` are stacked along a leading dim of depths.
      released_path: where, below "mtp", the stacked modules lie that released layouts store; None where none do.
    """

    name: str
    is_baseline = False
    has_conventions = False
    stacks_caches = False
    released_path: tuple[str, ...] | None = None

    def __init__(self, architecture: Architecture):
        self.architecture = architecture
        self.model, self.mtp = architecture.model, architecture.mtp

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.architecture == other.architecture

    def __hash__(self) -> int:
        return hash(self.architecture)

    # What the kind is.

    @property
    def depth(self) -> int:
        """N: tokens predicted at each position beside the next one."""
        return 0

    @property
    def lookahead(self) -> int:
        """Tokens that a row needs beyond its positions and the next token."""
        return self.depth

    @property
    def num_main_layers(self) -> int:
        """Blocks on the path to the next token."""
        return self.model.num_layers

    @property
    def num_blocks(self) -> int:
        """Transformer blocks that a token passes beside the main ones."""
        return 0

    @property
    def layer_spec(self) -> LayerSpec:
        """The kind's blocks: like the main model's last layer, but for `mtp.window` and `mtp.dense_ffn`."""
        spec = layer_specs(self.model, self.model.num_layers)[-1]
        if self.mtp.dense_ffn:
            spec = replace(spec, is_moe=False)
        return spec if self.mtp.window is None else with_window(spec, self.model, self.mtp.window)

    @property
    def times_applied(self) -> int:
        """How often a token is multiplied with each of the kind's weights."""
        return 1

    @property
    def head_products(self) -> float:
        """Output heads that a token passes forward and backward; a forward pass alone counts 1 / 3."""
        return 1 + self.depth

    @property
    def default_weight(self) -> float:
        """lambda where `mtp.weight` is not set."""
        return 1.0

    def describe(self) -> str:
        """The kind in a few words, for the first lines of a run."""
        return f"{self.name} MTP, depth {self.depth}"

    @classmethod
    def reads(cls, key: str) -> bool:
        """Whether the kind reads `mtp.<key>`; for reports and sweeps."""
        del key
        return True

    @classmethod
    def heading(cls, settings: Sequence[JsonObject]) -> str:
        """The kind in the title of a table of runs with these settings (`section.key` -> value)."""
        del settings
        return f"{cls.name}, on top of the main model"

    def check(self, config: Config) -> None:
        """Refuse settings that the kind cannot use.

        Raises:
          UserError: on the first problem, naming field, value and remedy.
        """
        check_weights(config)

    def check_export(self) -> None:
        """Raises UserError where no released layout holds the kind's weights."""
        if self.released_path is None:
            raise UserError(
                f"mtp.kind={self.name!r}: no released layout holds its weights; export the main model alone, with "
                "--depth=0 of mtp_jax.tools.convert export"
            )

    # Training and evaluation.

    def make_module(self, rngs: nnx.Rngs) -> nnx.Module | None:
        """The kind's parameters, or None where it has none."""
        del rngs
        return None

    def decoder_inputs(self, module: Any, inputs: DecoderInputs) -> DecoderInputs:
        """What the decoder reads in place of the embedded tokens; for masked positions, say.

        Called wherever the decoder runs. In decoding `module` is what `unstack` returned, and the sequence is only the
        new tokens, so `positions_BT` is what tells them apart.
        """
        del module
        return inputs

    def hidden_states(self, module: Any, main: MainModel, rows: Rows) -> Extra:
        """Hidden states of depths 1 .. N.

        Args:
          module: of `make_module`.
          rows: depth k reads `inputs_KBT[k]`; segment 0 at depth k marks a position that does not count there: nobody
            attends to it and no router counts it.
        """
        del module, rows
        return Extra(jnp.zeros((0, *main.hidden.shape), main.hidden.dtype), None)

    def terms(
        self, module: Any, hidden_KBTD: jax.Array, head_DV: jax.Array, rows: Rows, scales: Scales, z_weight: float
    ) -> list[Term | HiddenTerm]:
        """The loss as data; by default the cross-entropy of every depth through the shared head.

        Args:
          hidden_KBTD: the main model's hidden states and those of `hidden_states`.
          z_weight: of the z-loss.
        """
        del module
        scale_K = jnp.concatenate([scales.main[None], scales.depth_N])
        share_K = jnp.ones(len(hidden_KBTD)).at[1:].set(0.0 if self.mtp.detach_trunk else 1.0)
        return [
            Term(
                CrossEntropy(z_weight),
                hidden_KBTD,
                head_DV,
                rows.targets_KBT,
                rows.weight_KBT,
                scale_K,
                first_depth=0,
                head_share_K=share_K,
            )
        ]

    # Decoding.

    @property
    def max_drafts(self) -> int | None:
        """Tokens that can be drafted per forward pass; None: any number."""
        return 0

    def unstack(self, module: Any, ready: Ready) -> PyTree:
        """The kind's modules as drafting runs them, a pytree."""
        del module, ready
        return ()

    def empty_caches(self, parts: PyTree, empty: Callable[[Block], Cache], num_speculative_tokens: int) -> Caches:
        """Caches for drafting with `parts`, of `unstack`; `empty(block)` makes that of one block."""
        del parts, empty, num_speculative_tokens
        return []

    def draft_hidden(self, main: MainModel) -> jax.Array:
        """[B, T, D] of the main model that drafting starts from."""
        return main.hidden

    def read_prompt(
        self, parts: PyTree, main: MainModel, hidden_BTD: jax.Array, tokens_NBT: jax.Array, slots: Slots, caches: Caches
    ) -> Caches:
        """The caches with the entries of a run of prompt tokens.

        Args:
          parts: of `unstack`.
          hidden_BTD: `draft_hidden` at the run's positions.
          tokens_NBT: for depth k = 1 .. the tokens at i + k.
        """
        del parts, main, hidden_BTD, tokens_NBT, slots
        return caches

    def draft(
        self, parts: PyTree, main: MainModel, text: Text, num_speculative_tokens: int, caches: Caches, propose: Propose
    ) -> Caches:
        """Propose `num_speculative_tokens` tokens after position `text.last_B`.

        Args:
          main: its `embed` and `final_norm`; the hidden states are those of the text.
          propose: draws the next drafts from hidden states; to be called until `num_speculative_tokens` are proposed.
        """
        raise NotImplementedError(f"{self.name} does not draft")


def check_weights(config: Config) -> None:
    """Refuse a depth or loss weights that cannot be used.

    Raises:
      UserError: on the first problem.
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
