"""The one attention operation: causal, within a document, grouped heads, unequal key and value sizes.

Shape letters: B rows, T queries, S keys, H query heads, G key heads (H = G * M), Q query/key dim, V value dim.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.config import UserError
from mtp_jax.kernels.device import device
from mtp_jax.layers import attention_cudnn, attention_splash
from mtp_jax.layers.dispatch import note

ATTENTION = "attention"  # its output, to policies of recomputation
# A device's queries are attended in equal blocks of at most this many, each recomputed in the backward pass; of fewer
# where a block's float32 scores would take more than these bytes (128 heads, 4 rows of 4096: 8 MiB a query).
QUERY_BLOCK = 512
SCORE_BYTES = 1 << 30
MOSAIC_BLOCK, MOSAIC_DIMS = 128, 320  # positions that our kernels take together; dims that registers hold


def attend(
    q_BTHQ: jax.Array,
    k_BSGQ: jax.Array,
    v_BSGV: jax.Array,
    segments_BS: jax.Array | None,
    scale: float,
    first: jax.Array | int = 0,
    kernel: str = "auto",
) -> jax.Array:
    """softmax(scale * q k^T + mask) v, where query i sees key j iff j <= i and both have the same segment id.

    A document is a run of equal ids, and so is padding (0): its positions see only padding, and every query sees
    itself, so no row of the softmax is empty. Scores and softmax are float32.

    Args:
      segments_BS: int; None: every row is one document.
      first: the queries are the positions first .. first + T - 1 of the S; 0 unless the row is cut.
      kernel: "xla" (below), a name of `KERNELS`, or "auto": the first of them that can.

    Returns:
      [B, T, H, V] in the dtype of v.

    Raises:
      UserError: the kernel asked for cannot be.
    """
    inputs = q_BTHQ, k_BSGQ, v_BSGV, segments_BS, first
    reasons = {name: why_not(*inputs) for name, (why_not, _) in KERNELS.items() if kernel in (name, "auto")}
    if reasons.get(kernel):
        raise UserError(f"model.attention_kernel={kernel}: {reasons[kernel]}; use model.attention_kernel=auto")
    for name, reason in reasons.items():
        if not reason:
            return KERNELS[name][1](*inputs, scale)
    if kernel == "auto" and device().family != "cpu":
        own = {name: why for name, why in reasons.items() if (name == "splash") == (device().family == "tpu")}
        note("attention by XLA, slow here: " + "; ".join(f"not {name}, {why}" for name, why in own.items()))
    return _plain(*inputs, scale)


def _why_not_mosaic(q_BTHQ, k_BSGQ, v_BSGV, segments_BS, first) -> str:
    """Why our kernels (layers/attention_hopper) cannot take this attention; empty where they can."""
    lengths = (q_BTHQ.shape[1], k_BSGQ.shape[1])
    dims = q_BTHQ.shape[3], v_BSGV.shape[3]
    if reason := device().lacks_hopper():
        return reason
    if 12080 <= _cuda_version() < 12091:  # as jax's own causal kernel says, jax.experimental.pallas.ops.gpu
        return f"CUDA 12.8 to 12.9.0 compiles its masks wrongly, and this is {_cuda_version()}"
    if q_BTHQ.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 and float16, and this is {q_BTHQ.dtype}"
    if any(length % MOSAIC_BLOCK for length in lengths):
        return f"it takes lengths that are multiples of {MOSAIC_BLOCK}, and these are {lengths}"
    if any(dim % 64 for dim in dims) or dims[1] > dims[0] or sum(dims) > MOSAIC_DIMS:
        return f"head dims are multiples of 64, values' no larger, together at most {MOSAIC_DIMS}; these are {dims}"
    return ""


def _cuda_version() -> int:
    """12080 for CUDA 12.8; 0 where there is none."""
    from jax._src.lib import cuda_versions  # jax has no public way to it

    return cuda_versions.cuda_runtime_get_version() if cuda_versions else 0


def _mosaic(q_BTHQ, k_BSGQ, v_BSGV, segments_BS, first, scale):
    from mtp_jax.layers import attention_hopper  # needs what only a jax with CUDA has

    if segments_BS is None:
        segments_BS = jnp.zeros(k_BSGQ.shape[:2], jnp.int32)
    seen = attention_hopper.ranges(segments_BS, first, q_BTHQ.shape[1])
    return attention_hopper.attend(q_BTHQ, k_BSGQ, v_BSGV, seen, scale, attention_hopper.Tiles())


# In order of preference, each with the rule that says why it cannot take an attention.
KERNELS = {
    "mosaic": (_why_not_mosaic, _mosaic),
    "cudnn": (attention_cudnn.why_not, attention_cudnn.attend),
    "splash": (attention_splash.why_not, attention_splash.attend),
}


def _plain(q_BTHQ, k_BSGQ, v_BSGV, segments_BS, first, scale):
    """Attention by XLA, on every platform."""
    length = q_BTHQ.shape[1]
    last_T = first + jnp.arange(length)
    index_S = jnp.arange(k_BSGQ.shape[1])
    last_BT = jnp.broadcast_to(last_T, (q_BTHQ.shape[0], length))
    if segments_BS is None:
        return _attend(q_BTHQ, k_BSGQ, v_BSGV, scale, lambda last_BT: index_S <= last_BT[..., None], last_BT)
    segments_BT = jax.lax.dynamic_slice_in_dim(segments_BS, first, length, axis=1)

    def sees(last_BT, segments_BT):
        causal_BTS = index_S <= last_BT[..., None]
        return causal_BTS & (segments_BT[:, :, None] == segments_BS[:, None, :])

    return _attend(q_BTHQ, k_BSGQ, v_BSGV, scale, sees, last_BT, segments_BT)


def attend_cached(
    q_BTHQ: jax.Array, k_BSGQ: jax.Array, v_BSGV: jax.Array, last_BT: jax.Array, scale: float
) -> jax.Array:
    """softmax(scale * q k^T + mask) v over the entries of a cache, where a query sees slots 0 .. last of its own.

    Returns:
      [B, T, H, V] in the dtype of v.
    """
    index_S = jnp.arange(k_BSGQ.shape[1])
    return _attend(q_BTHQ, k_BSGQ, v_BSGV, scale, lambda last_BT: index_S <= last_BT[..., None], last_BT)


def _attend(
    q_BTHQ: jax.Array,
    k_BSGQ: jax.Array,
    v_BSGV: jax.Array,
    scale: float,
    sees: Callable[..., jax.Array],
    *places_BT: jax.Array,
) -> jax.Array:
    """Attention in blocks of queries; `sees` of a block's places gives the keys it sees, bool[B, T, S]."""
    length, num_heads, num_groups = q_BTHQ.shape[1], q_BTHQ.shape[2], k_BSGQ.shape[2]
    q_BTGMQ = q_BTHQ.reshape(*q_BTHQ.shape[:2], num_groups, num_heads // num_groups, q_BTHQ.shape[-1])

    def block(q_BTGMQ, *places_BT):
        scores_BGMTS = jnp.einsum("btgmq,bsgq->bgmts", q_BTGMQ, k_BSGQ, preferred_element_type=jnp.float32) * scale
        mask_BTS = sees(*places_BT)
        probs = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], scores_BGMTS, -jnp.inf), axis=-1)
        return jnp.einsum("bgmts,bsgv->btgmv", probs.astype(v_BSGV.dtype), v_BSGV)

    num_blocks = _num_blocks(q_BTHQ.shape[0], length, num_heads, k_BSGQ.shape[1])
    if num_blocks == 1:
        out = block(q_BTGMQ, *places_BT)
    else:

        def split(x):
            return jnp.moveaxis(x.reshape(x.shape[0], num_blocks, length // num_blocks, *x.shape[2:]), 1, 0)

        cut = tuple(split(x) for x in (q_BTGMQ, *places_BT))
        out = jax.lax.map(lambda args: jax.checkpoint(block)(*args), cut)
        out = jnp.moveaxis(out, 0, 1).reshape(*q_BTGMQ.shape[:-1], v_BSGV.shape[-1])
    return checkpoint_name(out.reshape(*q_BTHQ.shape[:3], v_BSGV.shape[-1]), ATTENTION)


def _num_blocks(num_rows: int, length: int, num_heads: int, num_keys: int) -> int:
    """The fewest equal blocks of a row's queries that keep to both limits."""
    most = max(1, min(QUERY_BLOCK, SCORE_BYTES // (4 * num_rows * num_heads * num_keys)))
    return next(n for n in range(1, length + 1) if length % n == 0 and length // n <= most)
