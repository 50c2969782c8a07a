"""Training step of transformers' DeepSeek-V3 on one device, in a separate process, for benchmarks/train_step.py.

    python benchmarks/train_step_hf.py '{"rows": 4, "length": 4096, "model": {config.json}}'

Weights in bfloat16 with fp32 masters in the optimizer (grouped matmuls take no fp32 weights, and autocast does not cast
them), grouped matmuls for the experts, cuDNN attention, torch.compile, fused AdamW, gradients clipped as in mtp_jax.
Random tokens, next-token loss, no MTP. The last line is a JSON object.
"""

import json
import sys
import time

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

NUM_STEPS = 10


def build(values, device):
    """Returns the model in bfloat16, fp32 copies of its weights, and AdamW over the copies."""
    config = transformers.DeepseekV3Config(**{k: v for k, v in values.items() if k not in ("architectures", "dtype")})
    # The model's own class, with a grouped matmul for its experts, if any.
    experts = {"experts_implementation": "grouped_mm"} if values.get("n_routed_experts") else {}
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", **experts)
    masters = [p.detach().float().clone() for p in model.parameters()]
    return model.bfloat16().train(), masters, torch.optim.AdamW(masters, lr=3e-4, fused=device == "cuda")


def make_step(model, masters, optimizer, vocab, shape, device):
    """Returns a function () -> loss: one step on new random tokens."""
    weights = list(model.parameters())

    def loss_of(tokens):
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    compiled = torch.compile(loss_of) if device == "cuda" else loss_of

    def step():
        tokens = torch.randint(vocab, shape, device=device)
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            loss = compiled(tokens)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for weight, master in zip(weights, masters, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def main():
    asked = json.loads(sys.argv[1])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (asked["rows"], asked["length"])
    step = make_step(*build(asked["model"], device), asked["model"]["vocab_size"], shape, device)
    losses = [step().item() for _ in range(3)]
    started = time.perf_counter()
    for _ in range(NUM_STEPS):
        loss = step()
    losses.append(loss.item())
    seconds = (time.perf_counter() - started) / NUM_STEPS
    found = {
        "peer": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "tokens_per_second": shape[0] * shape[1] / seconds,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
        "losses": losses,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
