"""Floating-point operations of a config and what chips can do: the parts of MFU."""

from mtp_jax.config import Config
from mtp_jax.model import active_size, weights
from mtp_jax.mtp import kind_of


def train_flops_per_token(config: Config) -> float:
    """Floating-point operations that the model asks for in the forward and backward pass, a trained token.

        6 * (active matmul weights of the main blocks + those of each MTP depth + (1 + D) d V)
          + 3 * (blocks + D) * H (d_qk + d_v) T

    A weight takes a multiplication and an addition forward and twice that backward. The output head is used at every
    depth, the embedding lookup is free. Attention: 2 T H d_qk for the scores and 2 T H d_v for the values of one token,
    half of it masked by causality, times 3 for forward and backward; document boundaries, which mask more, do not
    count. Recomputation is not what the model asks for and does not count either (PaLM, 2204.02311, appendix B).
    """
    model, kind, architecture = config.model, kind_of(config), config.architecture
    assert model.vocab_size is not None, "resolve model.vocab_size from the tokenizer first"
    times = {"trunk": 1, "mtp": kind.times_applied}
    multiplied = kind.head_products * model.embed_dim * model.vocab_size
    for part, info, leaf in weights(architecture):
        if info.is_matrix and "vocab" not in info.axes:
            multiplied += times[part] * active_size(architecture, info, leaf)
    if model.attention == "mla":
        dims = model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
    else:
        dims = 2 * model.head_dim
    attention = (kind.num_main_layers + kind.num_blocks) * model.num_heads * dims * config.data.sequence_length
    return 6.0 * multiplied + 3.0 * attention


# Dense bfloat16 TFLOP/s of one jax device, by a part of its `device_kind`; the first match counts.
# TPUs: "peak compute per chip" of docs.cloud.google.com/tpu/docs/<version>. A device is a chip, except for v2, v3 and
# 7x, where it is one of a chip's two cores (7x: "dual-chiplet architecture" on its page).
# NVIDIA: the data sheets, most of which print the figure with sparsity, twice this one.
_PEAK_TFLOPS = (
    ("TPU v2", 45 / 2),
    ("TPU v3", 123 / 2),
    ("TPU v4", 275),
    ("TPU v5 lite", 197),  # v5e
    ("TPU v5e", 197),
    ("TPU v5p", 459),
    ("TPU v5", 459),  # v5p
    ("TPU v6", 918),  # v6e
    ("TPU7x", 2307 / 2),
    ("TPU v7x", 2307 / 2),
    ("GB300", 2500),
    ("GB200", 2500),
    ("B300", 2250),
    ("B200", 2250),
    ("GH200", 989.4),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("H100 PCIe", 756.5),
    ("H100 NVL", 835.5),
    ("H100", 989.4),
    ("H800", 989.4),
    ("A100", 312),
    ("A800", 312),
    ("L40S", 362),
    ("L4", 121),
    ("A10", 125),
)


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 FLOP/s of one device of `jax.Device.device_kind`; None for CPUs and what the table does not know."""
    words = f"{device_kind.upper()} "
    for name, tflops in _PEAK_TFLOPS:
        at = words.find(name.upper())
        if at >= 0 and not words[at + len(name)].isalnum():
            return tflops * 1e12
    return None
