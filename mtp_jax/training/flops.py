"""Floating-point operations of a model and peak FLOP/s of devices, from which MFU is computed."""

from mtp_jax.config import Config
from mtp_jax.layers.attention import attention_of
from mtp_jax.layers.spec import layer_specs
from mtp_jax.model import active_size, weights
from mtp_jax.mtp import kind_of


def train_flops_per_token(config: Config) -> float:
    """Returns the floating-point operations of the model per trained token, forward and backward.

        6 * (active matmul weights of the main blocks + those of each MTP depth + (1 + D) d V)
          + 6 * sum over blocks and D of H (d_qk + d_v) * keys seen

    Each weight takes one multiplication and one addition in the forward pass and twice that in the backward pass. The
    output head is applied at every depth; the embedding lookup is free. Attention: 2 H d_qk for the score and 2 H d_v
    for the value of one query and key, times 3 for forward and backward; a query sees T / 2 keys on average, or
    W - W^2 / 2T within a window. Document boundaries, which mask more, are ignored, and recomputation is not counted
    (PaLM, 2204.02311, appendix B).
    """
    model, kind, architecture = config.model, kind_of(config), config.architecture
    assert model.vocab_size is not None, "resolve model.vocab_size from the tokenizer first"
    times = {"trunk": 1, "mtp": kind.times_applied}
    multiplied = kind.head_products * model.embed_dim * model.vocab_size
    for part, info, leaf in weights(architecture):
        if info.is_matrix and "vocab" not in info.axes:
            multiplied += times[part] * active_size(architecture, info, leaf)
    specs = layer_specs(model, kind.num_main_layers) + [kind.layer_spec] * kind.num_blocks
    pairs = sum(spec.attention.pairs_per_query(config.data.sequence_length) for spec in specs)
    return 6.0 * (multiplied + model.num_heads * attention_of(model).multiplied_dims(model) * pairs)


# Dense bfloat16 TFLOP/s of one jax device, by a substring of its `device_kind`; the first match is used.
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
    """Returns bfloat16 FLOP/s of one device of `jax.Device.device_kind`; None for CPUs and unlisted devices."""
    words = f"{device_kind.upper()} "
    for name, tflops in _PEAK_TFLOPS:
        at = words.find(name.upper())
        if at >= 0 and not words[at + len(name)].isalnum():
            return tflops * 1e12
    return None
