"""Post-training on chats: Qwen3-0.6B, and an MTP layer that is new, learn the answers of conversations.

    python train.py --config=configs/chat.py --workdir=runs/chat --config.init_from=DIR --config.data.tokenizer=DIR \
        --config.data.files='chats/*.jsonl'

DIR is the Hugging Face folder of the model; each line of the files has the messages of a conversation. docs/data.md,
"Fine-tuning on chats", describes the same for other models.

Hardware: one GPU of 80 GB. Expected: the first loss_main is that of the released model on the answers; loss_mtp_1
begins near that of a uniform guess, 11.9. `--config.mtp.freeze_decoder=true` trains the MTP layer alone.
"""

from mtp_jax.config import default_config


def get_config():
    config = default_config()
    model = config.model  # as in the folder's config.json
    model.vocab_size = 151_936
    model.num_layers = 28
    model.embed_dim = 1024
    model.tie_embeddings = True
    model.attention = "gqa"
    model.num_heads = 16
    model.num_kv_heads = 8
    model.head_dim = 128
    model.qk_norm = True
    model.rope.theta = 1e6
    model.rope.interleaved = False
    model.ffn_dim = 3072
    model.compute_dtype = "bfloat16"
    model.remat = "dots"

    config.mtp.kind = "sequential"
    config.mtp.depth = 1

    config.data.source = "text_files"
    config.data.records = "chat"
    config.data.loss_on = "assistant"
    config.data.packing = "whole"
    config.data.sequence_length = 2048
    config.data.batch_size = 16

    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 50
    config.optimizer.weight_decay = 0.0
    config.training.num_steps = 1000
    config.training.grad_accum_steps = 4
    config.training.eval_every = 100
    config.training.sample_tokens = 0  # mtp_jax.load(workdir).chat(...) generates answers
    config.checkpoint.every = 500
    return config
