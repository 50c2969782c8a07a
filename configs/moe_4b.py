"""Mixture-of-experts benchmark model: 4.6 B parameters, DeepSeek-V3's blocks at a width for training on one large GPU.

    python train.py --config=configs/moe_4b.py --workdir=/tmp/moe_4b

Hardware: one GPU of 140 GB; it takes 83 GiB. Expected: on an H200, 74 k tokens/s with packed documents of 1,024 tokens
on average; 79 k and 66 GiB with bfloat16 moments and logits (--config.optimizer.moment_dtype=bfloat16_stochastic
--config.training.loss_precision=bfloat16), and then 62 k with one sequential MTP layer added
(docs/performance.md).
"""

from mtp_jax.config import default_config


def get_config():
    config = default_config()
    model = config.model
    model.vocab_size = 102_400
    model.num_layers = 8
    model.embed_dim = 2048
    model.num_heads = 16
    model.q_lora_rank = 0
    model.kv_lora_rank = 512
    model.qk_nope_head_dim = 128
    model.qk_rope_head_dim = 64
    model.v_head_dim = 128
    model.ffn_dim = 10_944
    model.num_experts = 64
    model.num_experts_per_token = 6
    model.num_shared_experts = 2
    model.expert_dim = 1408
    model.num_dense_layers = 1
    model.compute_dtype = "bfloat16"
    model.remat = "none"

    config.data.sequence_length = 4096
    config.data.batch_size = 4

    config.optimizer.learning_rate = 3e-4
    config.training.num_steps = 1000
    return config
