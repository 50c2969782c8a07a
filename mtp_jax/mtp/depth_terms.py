"""Loss terms of depths that predict tokens: cross-entropy, or the distance of drafts from the main model's prediction.

The teacher of depth k at position i is the main model at position i + k: both predict token i + 1 + k, and the main
model has read the k tokens in between. It is detached. Total variation, and its end-to-end form over all drafts, are
those of Bebop (2606.12370); their sum with a share of cross-entropy is that of DSpark (2607.05147).

Shape letters: K = 1 + N depths, N extra depths, B rows, T positions, D model, F features of the extra depths' head
(D, and more where a kind adds some), V vocabulary.
"""

import jax
import jax.numpy as jnp

from mtp_jax.config import MTPConfig
from mtp_jax.losses import CrossEntropy, EndToEndTotalVariation, Loss, Mixture, Term, TotalVariation
from mtp_jax.targets import Rows


def has_teacher(mtp: MTPConfig) -> bool:
    """Returns whether `mtp.loss` compares drafts with the main model's predictions."""
    return mtp.loss != "cross_entropy"


def depth_terms(
    mtp: MTPConfig,
    hidden_KBTF: jax.Array,
    head_FV: jax.Array,
    rows: Rows,
    scale_K: jax.Array,
    z_weight: float,
    trained_FV: jax.Array | None = None,
) -> list[Term]:
    """Returns the terms of all depths through one output head.

    Args:
      mtp: `loss`, `cross_entropy_share` and `detach_decoder` are read.
      hidden_KBTF: normed hidden states, depth 0 is the main model.
      head_FV: output head of all depths.
      rows: targets and weights of every depth.
      scale_K: float32, factor of each depth's sum.
      z_weight: weight of the z-loss.
      trained_FV: output head of the extra depths, where the gradients that it receives differ from those of head_FV;
        None: head_FV.
    """
    num_extra = len(hidden_KBTF) - 1
    share = 0.0 if mtp.detach_decoder and trained_FV is None else 1.0
    share_K = jnp.ones(1 + num_extra).at[1:].set(share)
    if not num_extra or (not has_teacher(mtp) and trained_FV is None):
        term = Term(
            CrossEntropy(z_weight),
            hidden_KBTF,
            head_FV,
            rows.targets_KBT,
            rows.weight_KBT,
            scale_K,
            first_depth=0,
            head_share_K=share_K,
        )
        return [term]
    main = Term(
        CrossEntropy(z_weight),
        hidden_KBTF[:1],
        head_FV,
        rows.targets_KBT[:1],
        rows.weight_KBT[:1],
        scale_K[:1],
        first_depth=0,
    )
    loss, teacher_NBTF, weight_NBT = _draft_loss(mtp, z_weight), None, rows.weight_KBT[1:]
    if has_teacher(mtp):
        teacher_NBTF, weight_NBT = main_ahead(hidden_KBTF[0], weight_NBT)
    drafts = Term(
        loss,
        hidden_KBTF[1:],
        head_FV if trained_FV is None else trained_FV,
        rows.targets_KBT[1:],
        weight_NBT,
        scale_K[1:],
        name=mtp.loss if has_teacher(mtp) else "",
        first_depth=1,
        teacher_KBTD=teacher_NBTF,
        head_share_K=share_K[1:],
    )
    return [main, drafts]


def main_ahead(main_BTF: jax.Array, weight_NBT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the hidden states of the teacher and the weights of the positions that have one.

    Args:
      main_BTF: normed hidden states of the main model.
      weight_NBT: float32, weights of depths 1 .. N.

    Returns:
      main_BTF at position i + k for depth k, detached, [N, B, T, F], and the weights, 0 at the last k positions of a
      row, where i + k is outside the row.
    """
    num, _, length = weight_NBT.shape
    main_BTF = jax.lax.stop_gradient(main_BTF)
    depths = range(1, num + 1)
    ahead_NBTF = jnp.stack([jnp.pad(main_BTF[:, k:], ((0, 0), (0, min(k, length)), (0, 0))) for k in depths])
    is_inside_NT = jnp.stack([jnp.arange(length) < length - k for k in depths])
    return ahead_NBTF, weight_NBT * is_inside_NT[:, None]


def _draft_loss(mtp: MTPConfig, z_weight: float) -> Loss:
    if not has_teacher(mtp):
        return CrossEntropy(z_weight)
    distance = EndToEndTotalVariation() if mtp.loss == "end_to_end_tv" else TotalVariation()
    share = mtp.cross_entropy_share
    return Mixture(((share, CrossEntropy()), (1.0 - share, distance))) if share else distance
