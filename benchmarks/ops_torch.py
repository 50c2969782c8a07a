"""PyTorch's side of benchmarks/ops.py, in a process of its own: one JSON object, operation -> milliseconds, last."""

import json
import statistics
import time

import torch

ROWS, LENGTH, HEADS, QUERY_DIM, VALUE_DIM = 4, 4096, 16, 192, 128
TOKENS, DIM, WIDTH, EXPERTS, CHOSEN = ROWS * LENGTH, 2048, 1408, 64, 6


def milliseconds(run, calls=10, repeats=7):
    """As in benchmarks/measuring.py."""
    run(), run()
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - started) / calls)
    return statistics.median(found)


def both_ways(fn, *shapes):
    args = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    with torch.no_grad():
        forward = milliseconds(lambda: fn(*args))
        cotangent = torch.randn_like(fn(*args))
    return {
        "forward_ms": forward,
        "both_ms": milliseconds(lambda: torch.autograd.grad(fn(*args), args, cotangent)),
    }


def main():
    bias = 0.3 * torch.randn(EXPERTS, device="cuda")
    noise = -torch.log(torch.empty(TOKENS, EXPERTS, device="cuda").exponential_())
    chosen = (bias + noise).topk(CHOSEN).indices.reshape(-1)
    ends = torch.bincount(chosen, minlength=EXPERTS).cumsum(0).to(torch.int32)
    found = {
        "grouped": both_ways(
            lambda x, w: torch._grouped_mm(x, w, ends), (TOKENS * CHOSEN, DIM), (EXPERTS, DIM, 2 * WIDTH)
        )
    }
    queries, values = (ROWS, HEADS, LENGTH, QUERY_DIM), (ROWS, HEADS, LENGTH, VALUE_DIM)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        attend = torch.nn.functional.scaled_dot_product_attention
        found["attention"] = both_ways(lambda q, k, v: attend(q, k, v, is_causal=True), queries, queries, values)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
