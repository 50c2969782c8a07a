"""Test model: divisible by any mesh of 8 devices, with every feature of the quickstart in miniature.

    python train.py --config=configs/tiny.py --workdir=/tmp/tiny

Hardware: one CPU core; a step takes well under a second. Expected: the loss falls from 7.3 to below 5 in 20 steps.
"""

from mtp_jax.config import default_config


def get_config():
    config = default_config()
    config.model.num_layers = 4
    config.model.embed_dim = 64
    config.model.num_heads = 4
    config.model.q_lora_rank = 32
    config.model.kv_lora_rank = 32
    config.model.qk_nope_head_dim = 16
    config.model.qk_rope_head_dim = 8
    config.model.v_head_dim = 16
    config.model.ffn_dim = 128
    config.model.num_experts = 8
    config.model.num_experts_per_token = 2
    config.model.num_shared_experts = 1
    config.model.expert_dim = 32
    config.model.router.num_groups = 4
    config.model.router.groups_per_token = 2
    config.model.router.bias_rate = 1e-2

    config.mtp.kind = "sequential"
    config.mtp.depth = 2

    config.data.source = "python_source"
    config.data.packing = "packed"
    config.data.sequence_length = 64
    config.data.batch_size = 8

    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 5

    config.training.num_steps = 20
    config.training.log_every = 1
    config.training.eval_batches = 2
    config.training.sample_tokens = 32
    config.checkpoint.every = 10
    return config
