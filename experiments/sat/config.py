"""3-SAT over n: an assignment that satisfies a formula of 6 variables and 25 clauses (see formulas.py).

    bash experiments/sat/run.sh

Hardware: 2 CPU cores, 9 runs of at most 4 core-minutes. Expected (How Transformers Learn to Plan via Multi-Token
Prediction, 2604.11912): the share of satisfied formulas rises with n, from 10 % at n = 1 to 88 % at n = 7. Obtained:
see README.md in this folder. SIZE=gpu: larger formulas, and the overrides in run.sh.
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
    config.model.ffn_dim = 128
    config.model.rope.theta = 100.0

    config.data.source = "text_files"
    config.data.files = "runs/experiments/sat/data/train.jsonl"
    config.data.tokenizer = "runs/experiments/sat/data/tokenizer.json"
    config.data.records = "prompt"  # the loss covers the assignment alone
    config.data.packing = "whole"
    config.data.sequence_length = 33  # 25 clauses, =, 6 literals, bos and eos are 34 tokens: every row is one formula
    config.data.batch_size = 32
    config.data.validation_fraction = 0.01

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 5e-3
    config.optimizer.schedule = "wsd"
    config.optimizer.decay_fraction = 0.4
    config.optimizer.warmup_steps = 20
    config.optimizer.beta2 = 0.98
    config.optimizer.weight_decay = 0.0

    config.mtp.parameter_matched = False  # every kind has the same main model of three blocks

    config.training.num_steps = 1000
    config.training.log_every = 50
    config.training.sample_tokens = 0
    config.checkpoint.every = 1000
    return config
