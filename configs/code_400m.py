"""A 400 M parameter byte-level model of Python code, for measuring self-speculation (benchmarks/decode.py).

    python train.py --config=configs/code_400m.py --workdir=runs/code_400m
    python train.py --config=configs/code_400m.py --workdir=runs/code_400m_heads \
        --config.mtp.kind=parallel --config.mtp.depth=3

Hardware: one GPU of 80 GB or more. Expected: 1.1 bits per byte of the main head after 700 steps, 0.33 s each on an H100
before 2026-11-30 (docs/log.md has what has changed); for decoding see benchmarks/results/decode.jsonl.
"""

from mtp_jax.config import default_config


def get_config():
    config = default_config()
    model = config.model
    model.num_layers = 24
    model.embed_dim = 1024
    model.num_heads = 16
    model.kv_lora_rank = 256
    model.qk_nope_head_dim = 64
    model.qk_rope_head_dim = 32
    model.v_head_dim = 64
    model.ffn_dim = 4096
    model.compute_dtype = "bfloat16"
    model.scan_unroll = 24  # a loop over the layers copies their saved activations: 20 % of a step on a GPU

    config.mtp.kind = "sequential"
    config.mtp.depth = 1

    config.data.source = "python_source"
    config.data.sequence_length = 512
    config.data.batch_size = 32

    config.optimizer.name = "muon"
    config.optimizer.muon.matmul_precision = "bfloat16"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.schedule = "wsd"
    config.optimizer.decay_fraction = 0.4
    config.optimizer.warmup_steps = 50

    config.training.num_steps = 1000
    config.training.log_every = 20
    config.training.sample_prompt = 'def read_lines(path):\n    """Return the lines of a file."""\n'
    config.checkpoint.every = 1000
    config.checkpoint.keep = 1
    return config
