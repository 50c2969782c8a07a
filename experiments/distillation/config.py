"""Model of the distillation experiment: a decoder with one sequential MTP module (D = 1), on bytes of Python.

    bash experiments/distillation/run.sh

Hardware: 2 CPU cores, under 10 minutes. Expected: a module that was trained for one draft is accepted less and less
when it drafts three; trained on its own hidden states and on the model's own answers it is accepted more often at the
second and the third draft (FastMTP, 2509.18362), and total variation as the loss helps where texts are sampled
(Bebop, 2606.12370). Obtained: see README.md in this folder.
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
    config.model.ffn_dim = 160

    config.mtp.kind = "sequential"
    config.mtp.depth = 1

    config.data.source = "python_source"
    config.data.validation_fraction = 0.1  # documents of the prompts that are measured on
    config.data.sequence_length = 160
    config.data.batch_size = 8

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.schedule = "wsd"
    config.optimizer.decay_fraction = 0.4
    config.optimizer.warmup_steps = 30

    config.training.num_steps = 400
    config.training.log_every = 50
    config.training.sample_tokens = 0
    config.checkpoint.every = 400
    return config
