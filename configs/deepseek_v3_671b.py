"""DeepSeek-V3 (2412.19437) with its one MTP module: 671 B parameters, 37 B active per token, without the module.

    python train.py --config=configs/deepseek_v3_671b.py --workdir=DIR --config.data.tokenizer=tokenizer.json

The tokenizer is that of the released model; the text is TFDS's c4/en, or the data.source that is set.

Hardware: 256 v5p chips or more (`python -m mtp_jax.tools.plan --topology=v5p:8x8x4 --config=...` shows the memory).
Every number below is from the paper or the released config.json, except mesh and micro-batches, which depend on the
pod. Expected: the paper reports 14.8 T tokens and 2.664 M H800 hours of pretraining; this config has not been run to
its end here.
"""

from mtp_jax.config import default_config


def get_config():
    config = default_config()
    model = config.model
    model.vocab_size = 129_280
    model.num_layers = 61
    model.embed_dim = 7168
    model.num_heads = 128
    model.q_lora_rank = 1536
    model.kv_lora_rank = 512
    model.qk_nope_head_dim = 128
    model.qk_rope_head_dim = 64
    model.v_head_dim = 128
    model.ffn_dim = 18_432
    model.num_experts = 256
    model.num_experts_per_token = 8
    model.num_shared_experts = 1
    model.expert_dim = 2048
    model.num_dense_layers = 3
    model.router.score = "sigmoid"
    model.router.num_groups = 8
    model.router.groups_per_token = 4
    model.router.renormalize = True
    model.routed_scaling_factor = 2.5
    model.router.bias_rate = 1e-3
    model.balance_loss_weight = 1e-4
    model.init_std = 0.006
    model.compute_dtype = "bfloat16"
    model.remat = "full"
    model.moe_dispatch = "ragged"

    config.mtp.kind = "sequential"
    config.mtp.depth = 1
    config.mtp.weight = 0.3
    config.mtp.weight_boundaries = (10_000_000_000_000,)
    config.mtp.weight_values = (0.1,)
    config.mtp.weight_unit = "tokens"

    config.data.source = "c4/en"
    config.data.sequence_length = 4096
    config.data.batch_size = 15_360
    config.data.packing = "contiguous"  # "without cross-sample attention masking"
    config.data.fim_rate = 0.1
    config.data.num_workers = 8

    config.optimizer.learning_rate = 2.2e-4
    config.optimizer.schedule = "deepseek"
    config.optimizer.warmup_steps = 2000
    config.optimizer.moment_dtype = "bfloat16"

    # 14.8 T tokens at the final batch size; gamma is 0 after 14.3 T of them
    config.training.num_steps = 235_000
    model.router.bias_until = 227_000

    config.checkpoint.every = 500
    # 256 chips, 2 rows per chip and micro-batch; 4 (grad_accum_steps = 15) took 80.6 GiB without kernels
    config.training.grad_accum_steps = 30
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.expert = 32
    return config
