"""The configuration as frozen dataclasses. Each section belongs to the component of its name."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from mtp_jax.config.fields import setting


@dataclass(frozen=True)
class Llama3Config:
    """Llama 3.1's scaling of rotary positions to longer texts; enabled if factor is above 1."""

    factor: float = setting(1.0, at_least=1, at_most=1e6, was="model.llama3_factor")
    low_frequency: float = setting(1.0, at_least=0, at_most=1e6, was="model.llama3_low_frequency")
    high_frequency: float = setting(4.0, at_least=0, at_most=1e6, was="model.llama3_high_frequency")
    original_length: int = setting(8192, at_least=1, below=2**31, was="model.llama3_original_length")


@dataclass(frozen=True)
class YarnConfig:
    """YaRN (2309.00071), scaling of rotary positions to longer texts; enabled if factor is above 1."""

    factor: float = setting(1.0, at_least=1, at_most=1e6, was="model.yarn_factor")
    original_length: int = setting(4096, at_least=1, below=2**31, was="model.yarn_original_length")
    beta_fast: float = setting(32.0, above=0, at_most=1e6, was="model.yarn_beta_fast")
    beta_slow: float = setting(1.0, above=0, at_most=1e6, was="model.yarn_beta_slow")
    mscale: float = setting(1.0, at_least=0, at_most=1e3, was="model.yarn_mscale")
    # 0: YaRN's own attention factor, 0.1 ln(factor) + 1
    mscale_all_dim: float = setting(0.0, at_least=0, at_most=1e3, was="model.yarn_mscale_all_dim")
    truncate: bool = True  # the ramp begins and ends at whole dims, the next ones outside; False: exactly


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (2104.09864), and their scaling to longer texts than the model was first trained on."""

    theta: float = setting(10_000.0, above=1, at_most=1e12, was="model.rope_theta")
    # pairs (2i, 2i+1) as in DeepSeek; False: (i, i + n/2) as in Llama
    interleaved: bool = setting(True, was="model.rope_interleaved")
    # positions are divided by it (2306.15595)
    linear_factor: float = setting(1.0, at_least=1, at_most=1e6, was="model.rope_linear_factor")
    llama3: Llama3Config = Llama3Config()
    yarn: YarnConfig = YarnConfig()


@dataclass(frozen=True)
class LocalConfig:
    """Layers with sliding-window attention (2004.05150), in a pattern with layers that attend to whole documents."""

    window: int = setting(0, at_least=0, at_most=2**24)  # keys per query, itself included; 0: no layer is local
    pattern: str = "L"  # repeated over the layers: L local, G global; "LLLLLG" is 5 local layers to 1 global one
    rope_theta: float = setting(0.0, at_least=0, at_most=1e12)  # of unscaled positions; 0: model.rope
    num_kv_heads: int = setting(0, at_least=0, at_most=2**16)  # 0: model.num_kv_heads
    sinks: bool = False  # model.sinks of the local layers


@dataclass(frozen=True)
class RouterConfig:
    """Selection of the experts of each token, and the balance of their load."""

    score: Literal["sigmoid", "softmax"] = setting("sigmoid", was="model.router_score")
    num_groups: int = setting(1, at_least=1, at_most=2**16, when="moe", was="model.router_num_groups")
    groups_per_token: int = setting(1, at_least=1, at_most=2**16, when="moe", was="model.router_groups_per_token")
    # V3: sum of the two best; V2: the best
    group_score: Literal["top2_sum", "max"] = setting("top2_sum", was="model.router_group_score")
    renormalize: bool = setting(True, was="model.router_renormalize")
    logit_bias: bool = False  # a trained bias of the scores, in addition to the one that balances the load
    # gamma of the auxiliary-loss-free balancing; 0: off
    bias_rate: float = setting(1e-3, at_least=0, at_most=1e3, may_change="new_run", was="model.router_bias_rate")
    # step after which gamma is 0; 0: never
    bias_until: int = setting(0, at_least=0, below=2**31, may_change="new_run", was="model.router_bias_until")


@dataclass(frozen=True)
class GatedUnitConfig:
    """Gated linear unit of feed-forward layers, g sigmoid(alpha g) (u + offset) of a gate g and u; default SwiGLU."""

    alpha: float = setting(1.0, above=0, at_most=1e3)
    offset: float = setting(0.0, at_least=0, at_most=1e3)
    limit: float = setting(0.0, at_least=0, at_most=1e6)  # upper bound of g and of |u|; 0: none


@dataclass(frozen=True)
class ModelConfig:
    """The main model: DeepSeek-V3's architecture (2412.19437), with every part optional.

    `validate` checks a whole `Config`; this class checks nothing.
    """

    # None: the tokenizer's own, rounded up to a multiple of 8
    vocab_size: int | None = setting(None, at_least=1, at_most=2**24, may_change="new_run")
    # blocks of the main model; parallel heads use some of these (mtp.parameter_matched)
    num_layers: int = setting(4, at_least=1, at_most=2**12, may_change="new_run")
    embed_dim: int = setting(128, at_least=1, at_most=2**20)
    norm_eps: float = setting(1e-6, above=0, at_most=1)
    # epsilon of the norms inside multi-head latent attention, as in DeepSeek's released code
    latent_norm_eps: float = setting(1e-6, above=0, at_most=1)
    tie_embeddings: bool = False
    init_std: float = setting(0.02, at_least=0, at_most=10, may_change="new_run")
    param_dtype: Literal["float32", "bfloat16"] = setting("float32", may_change="new_run")
    compute_dtype: Literal["float32", "bfloat16"] = setting("float32", may_change="new_run")
    # precision of products with weights in layers/linear.py. Of float32 operands, on devices that round them: default
    # lets TPUs (bfloat16) and GPUs (TensorFloat-32) do so, highest does not; grouped experts excluded. fp8: training
    # steps multiply in 8 bits (kernels/fp8.py), experts included. The router and the head are the same in all.
    matmul_precision: Literal["default", "high", "highest", "fp8"] = setting("default", may_change="new_run")
    # what the backward pass recomputes: everything but matmul outputs (dots), everything but the outputs of attention
    # and of the experts' matmuls (kernels), or everything (full)
    remat: Literal["none", "dots", "kernels", "full"] = setting("none", may_change="resume")

    attention: Literal["mla", "gqa"] = "mla"
    num_heads: int = setting(4, at_least=1, at_most=2**16)
    # multi-head latent attention (DeepSeek-V2, 2405.04434, section 2.1)
    q_lora_rank: int = setting(0, at_least=0, at_most=2**20)  # 0: queries are projected directly
    kv_lora_rank: int = setting(64, at_least=1, at_most=2**20, when="mla")
    qk_nope_head_dim: int = setting(32, at_least=1, at_most=2**20, when="mla")
    qk_rope_head_dim: int = setting(16, at_least=1, at_most=2**20, when="mla")
    v_head_dim: int = setting(32, at_least=1, at_most=2**20, when="mla")
    # grouped-query attention
    num_kv_heads: int = setting(4, at_least=1, at_most=2**16, when="gqa")
    head_dim: int = setting(32, at_least=1, at_most=2**20, when="gqa")
    qk_norm: bool = False
    qkv_bias: bool = False
    value_head_dim: int = setting(0, at_least=0, at_most=2**20)  # 0: head_dim
    value_scale: float = setting(1.0, above=0, at_most=1e3)  # multiplies the values
    output_bias: bool = False
    rotary_fraction: float = setting(1.0, at_least=0, at_most=1)  # share of head_dim that is rotated
    rope: RopeConfig = RopeConfig()
    sinks: bool = False  # a learnt score per head for attending to nothing (gpt-oss, 2508.10925)
    local: LocalConfig = LocalConfig()

    # feed-forward: dense SwiGLU, or DeepSeekMoE (2401.06066) from block num_dense_layers on
    ffn_dim: int = setting(512, at_least=1, at_most=2**24, may_change="new_run")
    num_experts: int = setting(0, at_least=0, at_most=2**16)  # 0: every block is dense
    # leading dense blocks of a mixture-of-experts model
    num_dense_layers: int = setting(1, at_least=0, at_most=2**12, may_change="new_run")
    num_experts_per_token: int = setting(2, at_least=1, at_most=2**16, when="moe")
    num_shared_experts: int = setting(1, at_least=0, at_most=2**12)
    expert_dim: int = setting(128, at_least=1, at_most=2**24, when="moe")
    expert_bias: bool = False  # biases of the routed experts' three products
    gated_unit: GatedUnitConfig = GatedUnitConfig()
    router: RouterConfig = RouterConfig()
    routed_scaling_factor: float = setting(1.0, at_least=0, at_most=1e6)
    # alpha of the sequence-wise balance loss
    balance_loss_weight: float = setting(1e-4, at_least=0, at_most=1e6, may_change="new_run")
    moe_dispatch: Literal["auto", "dense", "ragged"] = setting("auto", may_change="resume")

    # Implementations; auto: the fastest one that supports the device, the dtype and the shapes.
    # pallas_hopper and cudnn are for Hopper GPUs, splash and megablox for TPUs. expert_kernel applies where
    # moe_dispatch=ragged.
    attention_kernel: Literal["auto", "xla", "pallas_hopper", "cudnn", "splash"] = setting(
        "auto", may_change="resume", renamed=(("mosaic", "pallas_hopper"),)
    )
    expert_kernel: Literal["auto", "xla", "pallas_hopper", "megablox"] = setting(
        "auto", may_change="resume", renamed=(("mosaic", "pallas_hopper"),)
    )
    # layers unrolled per iteration of the scan; 0: 1, or all where that is fast
    scan_unroll: int = setting(0, at_least=0, at_most=2**12, may_change="resume")


@dataclass(frozen=True)
class ParallelConfig:
    """mtp.kind = parallel: parallel heads (2404.19737)."""

    # rank of the Markov head, which corrects the logits of a draft by the token before it (2607.05147); 0: none
    markov_rank: int = setting(0, at_least=0, at_most=2**14)


@dataclass(frozen=True)
class TokenOrderConfig:
    """mtp.kind = top: token order prediction (2508.19228)."""

    window: int = setting(64, at_least=1, at_most=2**16)  # tokens ahead whose order is predicted; 4096 in the paper


@dataclass(frozen=True)
class NextLatentConfig:
    """mtp.kind = nextlat: next-latent prediction (2511.05963)."""

    width: int = setting(0, at_least=0, at_most=2**20)  # width of the MLP; 0: 2 * model.embed_dim
    latent_weight: float = setting(1.0, at_least=0, at_most=1e6)  # weight of the smooth L1 distance of hidden states
    kl_weight: float = setting(1.0, at_least=0, at_most=1e6)  # weight of the KL divergence of the predicted tokens


@dataclass(frozen=True)
class MTPConfig:
    """Multi-token prediction: the kind of extra heads, their conventions and their loss weights."""

    kind: str = "none"  # a key of mtp_jax.mtp.KINDS
    depth: int = 1  # D extra tokens; ignored when kind is none
    # lambda: L = L_0 + lambda * sum_k w_k L_k / sum_k w_k. None: 0.3 (sequential), or depth (parallel), which gives the
    # plain sum of 2404.19737
    weight: float | None = setting(None, at_least=0, at_most=1e6)
    weight_values: tuple[float, ...] = setting((), at_least=0, at_most=1e6)  # lambda from each boundary on
    weight_boundaries: tuple[int, ...] = setting((), at_least=0, below=2**63)
    weight_unit: Literal["steps", "tokens"] = "steps"
    depth_decay: float = setting(1.0, above=0, at_most=1e3)  # beta: w_k = beta^(k-1)
    # loss of the extra depths: cross-entropy of the text, or total variation from what the main model predicts, of each
    # depth or of all drafts in turn (2606.12370)
    loss: Literal["cross_entropy", "tv", "end_to_end_tv"] = "cross_entropy"
    cross_entropy_share: float = setting(0.0, at_least=0, below=1)  # of cross-entropy in the loss tv or end_to_end_tv
    normalize: Literal["paper", "valid"] = "paper"  # divide L_k by the valid depth-0 targets, or by depth k's own
    curriculum: Literal["none", "forward", "reverse"] = "none"  # active depths 1 -> D or D -> 1, evenly over training
    parameter_matched: bool = True  # parallel heads use blocks of model.num_layers
    shared_depths: bool = False  # one sequential module for all depths
    # keys per query of attention in MTP blocks; 0: the whole document; None: as in the main model's last layer
    window: int | None = setting(None, at_least=0, at_most=2**24)
    dense_ffn: bool = False  # MTP blocks without experts, also in a mixture-of-experts model
    # no MTP gradient reaches the main model
    detach_decoder: bool = setting(False, was="mtp.detach_trunk")
    # only the MTP modules train
    freeze_decoder: bool = setting(False, was="mtp.freeze_trunk")
    # conventions of released checkpoints: those of the family, unless a field below is not empty
    family: Literal["deepseek_v3", "glm4_moe", "mimo", "qwen3_next", "mimo_v2_flash"] = "deepseek_v3"
    concat_order: Literal["", "embedding_first", "hidden_first"] = ""
    # h_0, relative to the main final norm
    decoder_hidden: Literal["", "after_norm", "before_norm"] = setting("", was="mtp.trunk_hidden")
    recycled_hidden: Literal["", "after_norm", "before_norm"] = ""  # h_k, k >= 1, relative to its own output norm
    output_norm: Literal["", "own", "main"] = ""
    # the hidden state that depth k + 1 receives: that of depth k, or of the decoder
    chain: Literal["", "previous", "decoder"] = setting("", renamed=(("trunk", "decoder"),))
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    top: TokenOrderConfig = field(default_factory=TokenOrderConfig)
    nextlat: NextLatentConfig = field(default_factory=NextLatentConfig)


@dataclass(frozen=True)
class SourceConfig:
    """Documents of one origin, and their division into rows."""

    # python_source, text_files, synthetic, hf:NAME (a Hugging Face dataset by name or folder), or the name of a TFDS
    # dataset
    source: str = "python_source"
    # text_files: comma-separated globs of .txt, .md, .py ..., .jsonl, .json, .parquet, .arrow, .arrayrecord, each also
    # compressed (.gz, .zst, .bz2, .xz)
    files: str = ""
    split: str = "train"  # of a TFDS or Hugging Face dataset
    subset: str = ""  # configuration of a Hugging Face dataset
    # form of the records of all files but plain text: text; chat, a list of messages with role and content; prompt, a
    # prompt and its completion; tokens, ids of data.tokenizer
    records: Literal["text", "chat", "prompt", "tokens"] = "text"
    text_field: str = "text"  # names of fields; "a.b" is field b of field a
    messages_field: str = "messages"
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    tokens_field: str = "tokens"
    weights_field: str = ""  # loss weight per token of records=tokens; empty: 1
    # chat and prompt: the tokens whose loss counts, those of the assistant or completion, or all
    loss_on: Literal["assistant", "all"] = "assistant"
    on_bad_record: Literal["stop", "skip"] = "stop"  # a record that cannot be used
    # packed: documents follow each other and attention stays within one; contiguous: they do and it does not; whole:
    # no document is split over two rows, and the rest of a row is padding
    packing: Literal["packed", "contiguous", "whole"] = "packed"
    # plain text files are split at blank lines into documents of about this length
    max_document_chars: int = setting(32_768, at_least=1, below=2**31)
    synthetic_documents: int = setting(2000, at_least=1, at_most=10_000_000)

    @property
    def has_loss_weights(self) -> bool:
        """True if each token has a loss weight of its own; else all of them are 1."""
        if self.records == "tokens":
            return bool(self.weights_field)
        return self.records in ("chat", "prompt") and self.loss_on == "assistant"


@dataclass(frozen=True)
class MixtureConfig(SourceConfig):
    """One of several sources of training documents."""

    name: str = ""  # in metrics and messages
    weight: float = setting(1.0, above=0, at_most=1e9)  # share of the rows, relative to the other sources
    # epochs after which the source leaves the mixture; 0: never
    max_epochs: int = setting(0, at_least=0, below=2**31)


@dataclass(frozen=True)
class ValidationConfig(SourceConfig):
    """A validation set with documents of its own."""

    name: str = ""  # in metrics and messages


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """The documents of a run: one source, or a mixture of several."""

    mixture: tuple[MixtureConfig, ...] = ()  # several sources, in place of the keys above
    validation: tuple[ValidationConfig, ...] = ()  # validation sets besides the held-out share of the sources
    validation_fraction: float = setting(0.02, at_least=0, at_most=1)  # share of the documents, chosen by hash
    tfds_dir: str = ""  # TFDS data_dir; empty: TFDS's own default
    # bytes, the path of a Hugging Face tokenizer.json or its folder, or of a SentencePiece .model
    tokenizer: str = "bytes"
    chat_template: str = ""  # path of a Jinja template; empty: the one in the folder of the tokenizer
    sequence_length: int = setting(256, at_least=1, at_most=2**24)  # T; a row carries T + 1 + D tokens
    batch_size: int = setting(8, at_least=1, at_most=2**24)  # rows per step over all devices
    shuffle: bool = True  # the documents of the stream, and the rows of the batches
    # share of the training documents reordered to prefix, suffix, middle (2207.14255)
    fim_rate: float = setting(0.0, at_least=0, at_most=1)
    cache_dir: str = setting("", may_change="resume")  # empty: $MTP_JAX_CACHE or ~/.cache/mtp_jax
    num_workers: int = setting(0, at_least=0, at_most=512, may_change="resume")  # processes; 0: threads of this one
    prefetch: int = setting(4, at_least=1, at_most=1024, may_change="resume")  # batches read ahead

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The sources of the training documents: the mixture, or the one source."""
        return self.mixture or (self,)


@dataclass(frozen=True)
class MuonConfig:
    """Muon's update of matrices: momentum, orthogonalised by Newton-Schulz iterations."""

    momentum: float = setting(0.95, at_least=0, below=1, was="optimizer.muon_momentum")
    steps: int = setting(5, at_least=1, at_most=100, was="optimizer.muon_steps")  # Newton-Schulz iterations
    # precision of their products of float32 matrices: that of the device (TensorFloat-32 on GPUs), or operands rounded
    # to bfloat16 as in the original implementation
    matmul_precision: Literal["default", "bfloat16"] = setting("default", may_change="resume")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer of optax: AdamW or Muon, its schedule and its gradient clipping."""

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = setting(1e-3, at_least=0, at_most=1e30, may_change="by_name")
    schedule: Literal["constant", "cosine", "wsd", "deepseek"] = setting("cosine", may_change="by_name")
    warmup_steps: int = setting(100, at_least=0, below=2**31, may_change="by_name")
    # of the peak, at the end of cosine and wsd
    final_fraction: float = setting(0.1, at_least=0, at_most=1, may_change="by_name")
    # wsd: share of the steps spent in the final decay
    decay_fraction: float = setting(0.2, at_least=0, at_most=1, may_change="by_name")
    beta1: float = setting(0.9, at_least=0, below=1)
    beta2: float = setting(0.95, at_least=0, below=1)
    eps: float = setting(1e-8, above=0, at_most=1)
    weight_decay: float = setting(0.1, at_least=0, at_most=1e6, may_change="by_name")  # on matrices only
    clip_norm: float = setting(1.0, at_least=0, at_most=1e30, may_change="by_name")  # 0: no clipping
    # of stored moments; bfloat16_stochastic: rounded up or down at random, so that small updates are not lost
    moment_dtype: Literal["float32", "bfloat16", "bfloat16_stochastic"] = "float32"
    muon: MuonConfig = MuonConfig()

    @property
    def stored_dtype(self) -> Literal["float32", "bfloat16"]:
        """The dtype of stored moments."""
        return "float32" if self.moment_dtype == "float32" else "bfloat16"


@dataclass(frozen=True)
class TrainingConfig:
    """The training loop: number of steps, gradient accumulation, logging."""

    num_steps: int = setting(1000, at_least=1, below=2**31, may_change="resume")
    log_every: int = setting(10, at_least=1, below=2**31, may_change="resume")
    # micro-batches per step; the result does not depend on it
    grad_accum_steps: int = setting(1, at_least=1, at_most=2**20, was="training.accumulate_steps")
    # tokens whose float32 logits are in memory at one time; twice as many where logits are stored in bfloat16
    loss_chunk: int = setting(4096, at_least=1, below=2**31, may_change="resume")
    # default: float32 logits. bfloat16: logits of training steps are stored in bfloat16. fp8: and their gradient is
    # multiplied in 8 bits
    loss_precision: Literal["default", "bfloat16", "fp8"] = setting("default", may_change="new_run")
    z_loss_weight: float = setting(0.0, at_least=0, at_most=1e6)
    # steps in a row that may be skipped because their loss or gradients are not finite: weights, optimizer state and
    # router biases stay as they are, and one more ends the run. 0: the first such step ends the run
    skip_nonfinite: int = setting(0, at_least=0, below=2**31, may_change="resume")
    # held-out validation every so many steps; 0: only after the last step
    eval_every: int = setting(0, at_least=0, below=2**31, may_change="resume")
    # batches of each validation, that of the final table included
    eval_batches: int = setting(16, at_least=1, below=2**31, may_change="resume")
    # a main loss above its running median by so many median absolute deviations is reported; 0: none is
    spike_threshold: float = setting(10.0, at_least=0, at_most=1e6, may_change="resume")
    # first and last step to trace with xprof's profiler, as "10:12"; empty: none
    profile: str = setting("", may_change="resume")
    # where metrics go beside metrics.jsonl: tensorboard, wandb
    trackers: tuple[str, ...] = setting(("tensorboard",), may_change="resume")
    sample_prompt: str = setting("def ", may_change="resume")
    sample_tokens: int = setting(200, at_least=0, at_most=2**24, may_change="resume")
    # seconds without a finished step (or 20 times the median step, where that is longer) that end the run; 0: never
    stall_seconds: int = setting(1800, at_least=0, below=2**31, may_change="resume")


@dataclass(frozen=True)
class CheckpointConfig:
    """The checkpoints of orbax: how often they are saved and how many are kept."""

    every: int = setting(500, at_least=1, below=2**31, may_change="resume")
    keep: int = setting(3, at_least=1, below=2**31, may_change="resume")
    async_save: bool = setting(True, may_change="resume")


@dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis; one of them may be -1, all remaining devices."""

    data: int = setting(-1, at_least=-1, at_most=2**20, may_change="resume")
    fsdp: int = setting(1, at_least=-1, at_most=2**20, may_change="resume")
    expert: int = setting(1, at_least=-1, at_most=2**20, may_change="resume")
    context: int = setting(1, at_least=-1, at_most=2**20, may_change="resume")
    tensor: int = setting(1, at_least=-1, at_most=2**20, may_change="resume")


@dataclass(frozen=True)
class Architecture:
    """The part of a Config that determines what the weights compute; hashable, a key of compiled functions."""

    model: ModelConfig
    mtp: MTPConfig


@dataclass(frozen=True)
class Config:
    """The configuration of one run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    mtp: MTPConfig = field(default_factory=MTPConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    seed: int = setting(0, at_least=0, below=2**31)
    init_from: str = ""  # a workdir or Hugging Face folder whose matching weights start this run

    @property
    def architecture(self) -> Architecture:
        """The model and its MTP as everything but a training step computes them, without the rest of the run.

        matmul_precision=fp8 is a precision of training: the weights themselves are not in 8 bits.
        """
        is_fp8 = self.model.matmul_precision == "fp8"
        model = dataclasses.replace(self.model, matmul_precision="default") if is_fp8 else self.model
        return Architecture(model, self.mtp)

    @property
    def training_architecture(self) -> Architecture:
        """The model and its MTP as training steps compute them; the same weights as `architecture`."""
        return Architecture(self.model, self.mtp)


@dataclass(frozen=True)
class Conventions:
    """Conventions of the sequential MTP modules of one family of released checkpoints."""

    concat_order: str = "embedding_first"
    decoder_hidden: str = "after_norm"
    recycled_hidden: str = "before_norm"
    output_norm: str = "own"
    chain: str = "previous"


CONVENTIONS = {
    "deepseek_v3": Conventions(),
    "glm4_moe": Conventions(),
    "mimo": Conventions(concat_order="hidden_first"),
    "mimo_v2_flash": Conventions(chain="decoder"),
    "qwen3_next": Conventions(),
}


def conventions(mtp: MTPConfig) -> Conventions:
    """Returns the family's preset with the explicit overrides of `mtp`."""
    preset = CONVENTIONS[mtp.family]
    names = [f.name for f in dataclasses.fields(Conventions)]
    return dataclasses.replace(preset, **{n: getattr(mtp, n) for n in names if getattr(mtp, n)})
