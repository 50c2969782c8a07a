"""Polynomial arithmetic: the coefficients of an expression's value (see expressions.py).

    bash experiments/polynomials/run.sh

Hardware: 2 CPU cores, 6 runs of 2 minutes. Expected (Gloeckle et al., 2404.19737, section 4.2): multi-token
prediction is right more often at every number of operations, also at more than in training. Obtained: see README.md in
this folder. SIZE=gpu: the ring of the paper, and the overrides in run.sh.
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
    config.model.rope.theta = 100.0

    config.data.source = "text_files"
    config.data.files = "runs/experiments/polynomials/data/train.jsonl"
    config.data.records = "prompt"  # the loss covers the result alone
    config.data.packing = "whole"
    config.data.sequence_length = 48  # an expression of five operations, its result, bos and eos are at most 22 tokens
    config.data.batch_size = 16
    config.data.validation_fraction = 0.01

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule = "wsd"
    config.optimizer.decay_fraction = 0.4
    config.optimizer.warmup_steps = 20
    config.optimizer.beta2 = 0.98
    config.optimizer.weight_decay = 0.0

    config.mtp.parameter_matched = False  # every kind has the same main model of four blocks

    config.training.num_steps = 1200
    config.training.log_every = 50
    config.training.sample_tokens = 0
    config.checkpoint.every = 1200
    return config
