"""Star graph G(2,3): a path whose second node cannot be guessed from its first (see graphs.py).

    bash experiments/star_graph/run.sh

Hardware: 2 CPU cores, about 5 minutes for 15 runs. Expected (Bachmann and Nagarajan, 2403.06963): next-token models
stay near 50 %, multi-token models find the path, at a step that depends on the seed. Obtained: see README.md in this
folder.
"""

from mtp_jax.config import default_config


def get_config():
    config = default_config()
    config.model.attention = "gqa"
    config.model.num_layers = 3
    config.model.embed_dim = 64
    config.model.num_heads = 2
    config.model.num_kv_heads = 2
    config.model.head_dim = 32
    config.model.ffn_dim = 64
    config.model.rope.theta = 100.0

    config.data.source = "text_files"
    config.data.files = "runs/experiments/star_graph/data/train.jsonl"
    config.data.records = "prompt"  # the loss covers the path alone
    config.data.packing = "whole"
    config.data.sequence_length = 19  # a graph, its path, bos and eos are 20 tokens: every row is one graph
    config.data.batch_size = 32
    config.data.validation_fraction = 0.01

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 20
    config.optimizer.beta2 = 0.98
    config.optimizer.weight_decay = 0.0

    config.mtp.parameter_matched = False  # every kind has the same main model of three blocks

    config.training.num_steps = 1000
    config.training.log_every = 100
    config.training.sample_tokens = 0
    config.checkpoint.every = 1000
    return config
