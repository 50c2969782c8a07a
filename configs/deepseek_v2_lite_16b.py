"""DeepSeek-V2-Lite (2405.04434, appendix B): 15.7 B parameters, 2.4 B active per token; here with one MTP module.

    python train.py --config=configs/deepseek_v2_lite_16b.py --workdir=DIR --config.data.tokenizer=tokenizer.json

The tokenizer is that of the released model; the text is TFDS's c4/en, or the data.source that is set.

Hardware: 16 or more chips of 95 GB. Expected: the report trains 5.7 T tokens; this config has not been run to its end
here. `--config.mtp.kind=none` is the model as released.
"""

from mtp_jax.config import default_config


def get_config():
    config = default_config()
    model = config.model
    model.vocab_size = 102_400
    model.num_layers = 27
    model.embed_dim = 2048
    model.num_heads = 16
    model.q_lora_rank = 0
    model.kv_lora_rank = 512
    model.qk_nope_head_dim = 128
    model.qk_rope_head_dim = 64
    model.v_head_dim = 128
    model.ffn_dim = 10_944
    model.num_experts = 64
    model.num_experts_per_token = 6
    model.num_shared_experts = 2
    model.expert_dim = 1408
    model.num_dense_layers = 1
    model.router.score = "softmax"
    model.router.renormalize = False
    model.router.bias_rate = 0.0  # balanced by losses only
    model.balance_loss_weight = 1e-3
    model.init_std = 0.006
    model.compute_dtype = "bfloat16"
    model.remat = "full"
    model.moe_dispatch = "ragged"

    config.mtp.kind = "sequential"
    config.mtp.depth = 1

    config.data.source = "c4/en"
    config.data.sequence_length = 4096
    config.data.batch_size = 4608
    config.data.num_workers = 8

    config.optimizer.learning_rate = 4.2e-4
    config.optimizer.warmup_steps = 2000

    config.training.num_steps = 300_000
    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config
