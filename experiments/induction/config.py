"""Induction: the second token of a name that a story has mentioned before (see stories.py).

    bash experiments/induction/run.sh

Hardware: 2 CPU cores, 6 runs of about 4 core-minutes. Expected (Gloeckle et al., 2404.19737, section 4.1): with n = 2
small models are right far more often than with n = 1. Obtained: see README.md in this folder. SIZE=gpu: the sizes of
the paper, and the overrides in run.sh.
"""

from mtp_jax.config import default_config


def get_config():
    config = default_config()
    config.model.attention = "gqa"
    config.model.num_layers = 4
    config.model.embed_dim = 64
    config.model.num_heads = 4
    config.model.num_kv_heads = 4
    config.model.head_dim = 16
    config.model.ffn_dim = 192

    config.data.source = "text_files"
    config.data.files = "runs/experiments/induction/data/train.jsonl"
    config.data.tokenizer = "runs/experiments/induction/data/tokenizer.json"
    config.data.sequence_length = 128
    config.data.batch_size = 8

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 20
    config.optimizer.weight_decay = 0.0

    config.mtp.parameter_matched = False  # n = 1 and n = 2 have the same main model of four blocks

    config.training.num_steps = 900
    config.training.log_every = 10
    config.training.sample_tokens = 0
    config.checkpoint.every = 900
    return config
