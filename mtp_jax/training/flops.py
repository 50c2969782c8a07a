"""Parameters and floating-point operations of a config by arithmetic, and what chips can do: the parts of MFU."""

from dataclasses import dataclass

from mtp_jax.config import Config, ModelConfig, conventions


@dataclass(frozen=True)
class ParameterCounts:
    """Weights of the main model, and of the MTP modules or heads that come on top of it.

    Embedding and output head count once each (once together when tied). `active` leaves out the routed experts that a
    token does not use. Router biases, which no gradient moves, are not counted.
    """

    total: int
    active: int
    mtp_total: int
    mtp_active: int


@dataclass(frozen=True)
class _Weights:
    """Numbers of one block's or module's weights: in matmuls, those of them that a token uses, and in vectors."""

    matmul: int
    active: int
    vectors: int

    @property
    def total(self) -> int:
        return self.matmul + self.vectors

    @property
    def total_active(self) -> int:
        return self.active + self.vectors


def parameter_counts(config: Config) -> ParameterCounts:
    """Weights of `config`, whose model.vocab_size must be resolved.

    As DeepSeek counts them: V3 has total 671 B, active 37 B; its MTP module of 11.5 B comes on top.
    """
    model = config.model
    vocab = _vocab_size(model) * model.embed_dim * (1 if model.tie_embeddings else 2)
    blocks = _main_blocks(config)
    outside = vocab + model.embed_dim  # and the final norm
    copies = 1 if config.mtp.shared_depths else config.depth
    extra = _extra(config)
    return ParameterCounts(
        total=outside + sum(b.total for b in blocks),
        active=outside + sum(b.total_active for b in blocks),
        mtp_total=copies * extra.total,
        mtp_active=copies * extra.total_active,
    )


def train_flops_per_token(config: Config) -> float:
    """Floating-point operations that the model asks for in the forward and backward pass, a trained token.

        6 * (active matmul weights of the main blocks + those of each MTP depth + (1 + D) d V)
          + 3 * (blocks + D) * H (d_qk + d_v) T

    A weight takes a multiplication and an addition forward and twice that backward. The output head is used at every
    depth, the embedding lookup is free. Attention: 2 T H d_qk for the scores and 2 T H d_v for the values of one token,
    half of it masked by causality, times 3 for forward and backward; document boundaries, which mask more, do not
    count. Recomputation is not what the model asks for and does not count either (PaLM, 2204.02311, appendix B).
    """
    model, depth = config.model, config.depth
    blocks = _main_blocks(config)
    weights = sum(b.active for b in blocks) + depth * _extra(config).active
    weights += (1 + depth) * model.embed_dim * _vocab_size(model)
    if model.attention == "mla":
        dims = model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
    else:
        dims = 2 * model.head_dim
    attention = (len(blocks) + depth) * model.num_heads * dims * config.data.sequence_length
    return 6.0 * weights + 3.0 * attention


def _vocab_size(model: ModelConfig) -> int:
    assert model.vocab_size is not None, "resolve model.vocab_size from the tokenizer first"
    return model.vocab_size


def _main_blocks(config: Config) -> list[_Weights]:
    num_dense = config.model.num_dense_layers if config.model.num_experts else config.num_main_layers
    return [_block(config.model, is_moe=i >= num_dense) for i in range(config.num_main_layers)]


def _extra(config: Config) -> _Weights:
    """What one MTP depth adds: a parallel head is a block, a sequential module also has norms and a projection."""
    model, d = config.model, config.model.embed_dim
    block = _block(model, bool(model.num_experts) and config.num_main_layers > model.num_dense_layers)
    if config.mtp.kind != "sequential":
        return block
    norms = 3 if conventions(config.mtp).output_norm == "own" else 2
    return _Weights(block.matmul + 2 * d * d, block.active + 2 * d * d, block.vectors + norms * d)


def _block(model: ModelConfig, is_moe: bool) -> _Weights:
    """Attention, feed-forward, and the norm before each."""
    d = model.embed_dim
    attention, vectors = _mla(model) if model.attention == "mla" else _gqa(model)
    vectors += 2 * d
    if not is_moe:
        matmul = attention + 3 * d * model.ffn_dim
        return _Weights(matmul, matmul, vectors)
    expert = 3 * d * model.expert_dim
    always = attention + d * model.num_experts + model.num_shared_experts * expert
    return _Weights(always + model.num_experts * expert, always + model.num_experts_per_token * expert, vectors)


def _mla(m: ModelConfig) -> tuple[int, int]:
    """(matmul weights, vector weights) of multi-head latent attention."""
    d, heads, query = m.embed_dim, m.num_heads, m.qk_nope_head_dim + m.qk_rope_head_dim
    to_query = d * m.q_lora_rank + m.q_lora_rank * heads * query if m.q_lora_rank else d * heads * query
    to_latent = d * (m.kv_lora_rank + m.qk_rope_head_dim)
    from_latent = m.kv_lora_rank * heads * (m.qk_nope_head_dim + m.v_head_dim)
    return to_query + to_latent + from_latent + heads * m.v_head_dim * d, m.q_lora_rank + m.kv_lora_rank


def _gqa(m: ModelConfig) -> tuple[int, int]:
    """(matmul weights, vector weights) of grouped-query attention."""
    to_qkv = (m.num_heads + 2 * m.num_kv_heads) * m.head_dim
    vectors = (2 * m.head_dim if m.qk_norm else 0) + (to_qkv if m.qkv_bias else 0)
    return m.embed_dim * to_qkv + m.num_heads * m.head_dim * m.embed_dim, vectors


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
