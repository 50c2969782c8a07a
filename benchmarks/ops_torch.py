"""PyTorch's part of benchmarks/ops.py, in a separate process; the last line is a JSON object operation -> milliseconds.

python benchmarks/ops_torch.py '[[row, position where a document begins], ...]'
"""

import json
import statistics
import sys
import time

import torch

ROWS, LENGTH, HEADS, QUERY_DIM, VALUE_DIM = 4, 4096, 16, 192, 128
TOKENS, DIM, WIDTH, EXPERTS, CHOSEN, VOCAB = ROWS * LENGTH, 2048, 1408, 64, 6, 102_400


def milliseconds(run, calls=10, repeats=7):
    """Returns the milliseconds of one call, as benchmarks/measuring.py does."""
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


def forward_and_backward(fn, *shapes):
    args = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    with torch.no_grad():
        forward = milliseconds(lambda: fn(*args))
        cotangent = torch.randn_like(fn(*args))
    return {
        "forward_ms": forward,
        "both_ms": milliseconds(lambda: torch.autograd.grad(fn(*args), args, cotangent)),
    }


def attention():
    queries, values = (ROWS, HEADS, LENGTH, QUERY_DIM), (ROWS, HEADS, LENGTH, VALUE_DIM)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        attend = torch.nn.functional.scaled_dot_product_attention
        return forward_and_backward(lambda q, k, v: attend(q, k, v, is_causal=True), queries, queries, values)


def attention_packed(documents):
    """FlexAttention, compiled, with a block mask that skips other documents."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    begins = torch.zeros(ROWS, LENGTH, device="cuda", dtype=torch.int32)
    for row, position in documents:
        begins[row, position] = 1
    segments = 1 + begins.cumsum(1)

    def sees(b, h, q, k):
        return (q >= k) & (segments[b, q] == segments[b, k])

    mask = create_block_mask(sees, ROWS, None, LENGTH, LENGTH)
    attend = torch.compile(flex_attention)
    queries, values = (ROWS, HEADS, LENGTH, QUERY_DIM), (ROWS, HEADS, LENGTH, VALUE_DIM)
    return forward_and_backward(lambda q, k, v: attend(q, k, v, block_mask=mask), queries, queries, values)


def router():
    weight, bias = torch.randn(EXPERTS, DIM, device="cuda") * DIM**-0.5, torch.zeros(EXPERTS, device="cuda")

    @torch.compile
    def gates(x):
        scores = torch.sigmoid(x.float() @ weight.T)
        gates = scores.gather(1, (scores.detach() + bias).topk(CHOSEN).indices)
        return gates / gates.sum(1, keepdim=True)

    return forward_and_backward(gates, (TOKENS, DIM))


def dispatch(chosen):
    """Copies sorted by expert, and combined again by token."""

    @torch.compile
    def sort_by_expert(x):
        order = chosen.argsort(stable=True)
        return x[order // CHOSEN], order

    @torch.compile
    def combine(copies, gates, order):
        weighted = copies * gates.reshape(-1, 1)[order]
        return torch.zeros(TOKENS, DIM, device="cuda", dtype=copies.dtype).index_add(0, order // CHOSEN, weighted)

    def dispatch_and_combine(x, gates):
        copies, order = sort_by_expert(x)
        return combine(copies, gates, order)

    return forward_and_backward(dispatch_and_combine, (TOKENS, DIM), (TOKENS, CHOSEN))


def loss():
    """Cross-entropy of the whole logits, compiled; the head's weights are in float32, as in mtp_jax."""
    head = (0.02 * torch.randn(VOCAB, DIM, device="cuda")).requires_grad_()
    hidden = torch.randn(TOKENS, DIM, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(VOCAB, (TOKENS,), device="cuda")

    @torch.compile
    def total(hidden, head):
        return torch.nn.functional.cross_entropy((hidden @ head.bfloat16().T).float(), targets)

    return {"both_ms": milliseconds(lambda: torch.autograd.grad(total(hidden, head), (hidden, head)), calls=3)}


def main():
    bias = 0.3 * torch.randn(EXPERTS, device="cuda")
    noise = -torch.log(torch.empty(TOKENS, EXPERTS, device="cuda").exponential_())
    chosen = (bias + noise).topk(CHOSEN).indices.reshape(-1)
    ends = torch.bincount(chosen, minlength=EXPERTS).cumsum(0).to(torch.int32)
    found = {
        "grouped": forward_and_backward(
            lambda x, w: torch._grouped_mm(x, w, ends), (TOKENS * CHOSEN, DIM), (EXPERTS, DIM, 2 * WIDTH)
        ),
        "attention": attention(),
        "attention_packed": attention_packed(json.loads(sys.argv[1])),
        "router": router(),
        "dispatch": dispatch(chosen),
        "loss": loss(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
