"""Search over n = 1 + depth (Gloeckle et al., 2404.19737, table 1) in miniature, on bytes of Python.

    bash experiments/code_search/run.sh

Hardware: 2 CPU cores, about 20 minutes for 14 runs. Expected: sequential modules at lambda 0.3 leave the main loss
unchanged; with parameter-matched parallel heads it rises with n, as in the paper's table for 0.3 B models; more tokens
per forward pass for larger n. Obtained: see README.md in this folder.
"""

from mtp_jax.config import default_config


def get_config():
    config = default_config()
    config.model.attention = "gqa"
    config.model.num_layers = 10  # parameter-matched parallel heads replace up to 7 of them
    config.model.embed_dim = 64
    config.model.num_heads = 4
    config.model.num_kv_heads = 4
    config.model.head_dim = 16
    config.model.ffn_dim = 160

    config.data.source = "python_source"
    config.data.sequence_length = 128
    config.data.batch_size = 8

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.schedule = "wsd"
    config.optimizer.decay_fraction = 0.4
    config.optimizer.warmup_steps = 30

    config.training.num_steps = 400
    config.training.log_every = 20
    config.training.sample_tokens = 0
    config.checkpoint.every = 400
    return config
