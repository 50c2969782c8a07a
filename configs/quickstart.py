"""Quickstart: a miniature DeepSeek-V3 with two sequential MTP depths, on the source of the Python standard library.

    make train
    python train.py --config=configs/quickstart.py --workdir=runs/quickstart

Hardware: 2 CPU cores, about 5 minutes including the installation. Expected: validation bits per byte of the main head
below 2.0, and more than 2 expected tokens per forward pass with drafts of both depths. `--config.mtp.kind=none` or
`parallel` trains on the same batches.
"""

from mtp_jax.config import default_config


def get_config():
    config = default_config()
    config.model.num_layers = 4
    config.model.embed_dim = 128
    config.model.num_heads = 4
    config.model.q_lora_rank = 64
    config.model.kv_lora_rank = 64
    config.model.qk_nope_head_dim = 32
    config.model.qk_rope_head_dim = 16
    config.model.v_head_dim = 32
    config.model.ffn_dim = 384
    config.model.num_experts = 8
    config.model.num_experts_per_token = 2
    config.model.num_shared_experts = 1
    config.model.expert_dim = 64
    config.model.num_dense_layers = 1
    config.model.router.bias_rate = 1e-2  # the paper's 1e-3 balances over many thousand steps, not over 600

    config.mtp.kind = "sequential"
    config.mtp.depth = 2

    config.data.source = "python_source"
    config.data.sequence_length = 256
    config.data.batch_size = 8

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 5e-3
    config.optimizer.schedule = "wsd"
    config.optimizer.decay_fraction = 0.4
    config.optimizer.warmup_steps = 20

    config.training.num_steps = 600
    config.training.log_every = 20
    config.training.eval_batches = 32
    config.training.sample_prompt = 'def read_lines(path):\n    """Return the lines of a file."""\n'
    config.checkpoint.every = 200
    return config
