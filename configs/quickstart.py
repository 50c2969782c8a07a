"""A miniature DeepSeek-V3 on the Python standard library's own source, byte by byte."""

from mtp_jax.config import default_config


def get_config():
    config = default_config()
    config.model.num_layers = 5
    config.model.embed_dim = 192
    config.model.num_heads = 4
    config.model.q_lora_rank = 96
    config.model.kv_lora_rank = 64
    config.model.qk_nope_head_dim = 32
    config.model.qk_rope_head_dim = 16
    config.model.v_head_dim = 32
    config.model.ffn_dim = 512
    config.model.num_experts = 4
    config.model.num_experts_per_token = 2
    config.model.num_shared_experts = 1
    config.model.expert_dim = 192

    config.mtp.kind = "sequential"
    config.mtp.depth = 2

    config.data.source = "python_source"
    config.data.sequence_length = 256
    config.data.batch_size = 16

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = 20
    config.optimizer.schedule = "wsd"

    config.training.num_steps = 400
    config.training.log_every = 10
    config.training.eval_batches = 16
    config.checkpoint.every = 200
    return config
