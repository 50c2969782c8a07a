"""Agreement of each depth with the main head over training, parallel heads beside sequential modules, bytes of Python.

    bash experiments/acceptance_over_training/run.sh

Hardware: 2 CPU cores, 9 runs of about two core-minutes. Expected (2508.19228, table 6; DeepSeek-V3, 2412.19437, table
4): sequential modules agree more often than parallel heads, at every depth, and leave the main loss as it is. Obtained:
see README.md in this folder. SIZE=gpu: the overrides in run.sh.
"""

from mtp_jax.config import default_config


def get_config():
    config = default_config()
    config.model.attention = "gqa"
    config.model.num_layers = 6
    config.model.embed_dim = 64
    config.model.num_heads = 4
    config.model.num_kv_heads = 4
    config.model.head_dim = 16
    config.model.ffn_dim = 160

    config.data.source = "python_source"
    config.data.sequence_length = 128
    config.data.batch_size = 4

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.schedule = "wsd"
    config.optimizer.decay_fraction = 0.4
    config.optimizer.warmup_steps = 30

    config.mtp.depth = 3
    config.mtp.parameter_matched = False  # every kind has the same main model of six blocks

    config.training.num_steps = 500
    config.training.log_every = 5
    config.training.sample_tokens = 0
    config.checkpoint.every = 500
    return config
