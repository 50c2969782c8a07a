"""The same questions answered by generation and by likelihood, without and with multi-token prediction.

Questions of four families, see questions.py.

    bash experiments/generative_against_likelihood/run.sh

Hardware: 2 CPU cores, 9 runs of at most 4.2 core-minutes. Expected (DeepSeek-V3, 2412.19437, table 4; Gloeckle et al.,
2404.19737): gains on generative tasks, and multiple-choice scores that gain less or fall. Obtained: see README.md in
this folder. SIZE=gpu: harder questions, and the overrides in run.sh.
"""

from mtp_jax.config import default_config

DATA = "runs/experiments/generative_against_likelihood/data"


def get_config():
    config = default_config()
    config.model.attention = "gqa"
    config.model.num_layers = 4
    config.model.embed_dim = 64
    config.model.num_heads = 4
    config.model.num_kv_heads = 4
    config.model.head_dim = 16
    config.model.ffn_dim = 192
    config.model.rope.theta = 1000.0

    shared = {"source": "text_files", "packing": "whole"}
    config.data.mixture = (
        {"name": "questions", "files": f"{DATA}/train.jsonl", "records": "prompt", "weight": 2.0, **shared},
        {"name": "facts", "files": f"{DATA}/facts.jsonl", "records": "text", "weight": 1.0, **shared},
    )
    config.data.tokenizer = f"{DATA}/tokenizer.json"
    config.data.sequence_length = 64
    config.data.batch_size = 16
    config.data.validation_fraction = 0.01

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 5e-3
    config.optimizer.schedule = "wsd"
    config.optimizer.decay_fraction = 0.4
    config.optimizer.warmup_steps = 20
    config.optimizer.weight_decay = 0.0

    config.mtp.parameter_matched = False  # every kind has the same main model

    config.training.num_steps = 800
    config.training.log_every = 50
    config.training.sample_tokens = 0
    config.checkpoint.every = 800
    return config
