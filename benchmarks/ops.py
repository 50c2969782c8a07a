"""Operations of a step, each timed separately, with a lower bound and PyTorch's time.

    python benchmarks/ops.py [--only=NAME,...] [--peer=torch]     # grouped, attention, attention_packed, ...
    python benchmarks/ops.py --sweep=forward,rows      # tiles of the grouped matmul's kernels; minutes

Appends a line per result to benchmarks/results/h200.jsonl: milliseconds forward, and forward and backward; `floor_ms`,
the time of the same multiplications at the rate of one large dense matmul measured in the same call (grouped: of the
same size, forward and both gradients), or without multiplications, the time of the bytes that must be read and written
at the rate of one large copy; PyTorch's figure with --peer=torch, which runs benchmarks/ops_torch.py in a separate
process. Sizes are those of configs/moe_4b.py at 4 x 4096 tokens per step.
"""

import argparse
import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

from benchmarks.measuring import RESULTS, ROOT, append, milliseconds  # noqa: E402
from mtp_jax import losses  # noqa: E402
from mtp_jax.config import ModelConfig  # noqa: E402
from mtp_jax.kernels import attention  # noqa: E402
from mtp_jax.kernels import grouped_matmul as grouped
from mtp_jax.kernels.grouped_matmul import hopper_kernels  # noqa: E402
from mtp_jax.kernels.permute import gather  # noqa: E402
from mtp_jax.layers.router import Router  # noqa: E402

ROWS, LENGTH, HEADS, QUERY_DIM, VALUE_DIM = 4, 4096, 16, 192, 128
TOKENS, DIM, WIDTH, EXPERTS, CHOSEN, VOCAB = ROWS * LENGTH, 2048, 1408, 64, 6, 102_400
SHARED_BYTES = 227 << 10  # shared memory per thread block on Hopper
DOCUMENT = 1024  # tokens, on average, of packed rows


def normal(seed: int, *shape: int) -> jax.Array:
    """Returns random bfloat16 values on the device."""
    return jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16))(jax.random.key(seed))


def forward_and_backward(fn, *args, given=()):
    """Returns (milliseconds forward, forward and backward) of fn(*args, *given), differentiated in args."""
    forward = jax.jit(fn)
    out = jax.eval_shape(fn, *args, *given)
    cotangent = normal(9, *out.shape).astype(out.dtype)

    @jax.jit
    def backward(cotangent, args, given):
        out, pull = jax.vjp(lambda *args: fn(*args, *given), *args)
        return out, pull(cotangent)

    return milliseconds(lambda: forward(*args, *given)), milliseconds(lambda: backward(cotangent, args, given))


def routing() -> tuple[jax.Array, jax.Array]:
    """Returns the experts of every token's copies int32[N], uneven as after some training, and copies per expert
    int32[E]."""
    bias_E = 0.3 * jax.random.normal(jax.random.key(1), (EXPERTS,))
    noise_ME = jax.random.gumbel(jax.random.key(2), (TOKENS, EXPERTS))
    expert_N = jax.lax.top_k(bias_E + noise_ME, CHOSEN)[1].reshape(-1)
    return expert_N, jnp.bincount(expert_N, length=EXPERTS).astype(jnp.int32)


def rate() -> float:
    """bfloat16 FLOP/s of a large matmul: the denominator of `floor_ms`."""
    a, b = normal(3, 8192, 8192), normal(4, 8192, 8192)
    return 2 * 8192**3 / (1e-3 * milliseconds(functools.partial(jax.jit(jnp.matmul), a, b), calls=30))


def bandwidth() -> float:
    """Bytes per second, read and written, of a large copy."""
    x = normal(3, 1 << 30)
    return 2 * x.nbytes / (1e-3 * milliseconds(functools.partial(jax.jit(lambda x: -x), x), calls=30))


def bench_grouped() -> dict:
    """Gate and up projection of all experts in one."""
    _, sizes_E = routing()
    x_ND, w_EDF = normal(5, TOKENS * CHOSEN, DIM), normal(6, EXPERTS, DIM, 2 * WIDTH)
    dense = forward_and_backward(jnp.matmul, x_ND, w_EDF[0] + 0)
    found = forward_and_backward(grouped.grouped_matmul, x_ND, w_EDF, given=(sizes_E,))
    return {"forward_ms": found[0], "both_ms": found[1], "dense_forward_ms": dense[0], "floor_ms": dense[1]}


def segments() -> jax.Array:
    """Returns segment ids int32[B, T] of packed rows whose documents have `DOCUMENT` tokens on average."""
    begins_BT = jax.random.bernoulli(jax.random.key(7), 1 / DOCUMENT, (ROWS, LENGTH))
    return 1 + jnp.cumsum(begins_BT, axis=1, dtype=jnp.int32)


def bench_attention(is_packed: bool, window: int = 0) -> dict:
    """Causal attention with DeepSeek's head dims, over whole rows, over packed documents and within a window."""
    q, k = (normal(seed, ROWS, LENGTH, HEADS, QUERY_DIM) for seed in (5, 6))
    v = normal(7, ROWS, LENGTH, HEADS, VALUE_DIM)
    near = window or LENGTH
    seen = ROWS * (near * (near + 1) / 2 + (LENGTH - near) * near)  # pairs of a query and a key
    if is_packed:
        same = segments()[:, :, None] == segments()[:, None, :]
        seen = float((jnp.tril(same) & ~jnp.tril(same, -near)).sum())
    flops = 2 * seen * HEADS * (4 * QUERY_DIM + 3 * VALUE_DIM)  # two matmuls forward, and five of them backward
    given = (attention.Mask(segments() if is_packed else None, window=window),)
    found = forward_and_backward(lambda *args: attention.attend(*args, QUERY_DIM**-0.5), q, k, v, given=given)
    return {"forward_ms": found[0], "both_ms": found[1], "floor_ms": 1e3 * flops / rate()}


def bench_router() -> dict:
    """Scores of every expert in float32, the K best of each token, their gates and the statistics of the balance."""
    config = ModelConfig(
        **{"embed_dim": DIM, "num_experts": EXPERTS, "num_experts_per_token": CHOSEN, "compute_dtype": "bfloat16"}
    )
    graph, state = nnx.split(Router(config, nnx.Rngs(0)))
    x_BTD, valid_BT = normal(5, ROWS, LENGTH, DIM), jnp.ones((ROWS, LENGTH), bool)

    def gates(x_BTD, state):
        return nnx.merge(graph, state)(x_BTD, valid_BT)[0]

    found = forward_and_backward(lambda x_BTD: gates(x_BTD, state), x_BTD)
    bytes_moved = 2 * TOKENS * DIM * (1 + 2) + 4 * TOKENS * EXPERTS * 2  # hidden states twice, their gradient; scores
    return {"forward_ms": found[0], "both_ms": found[1], "floor_ms": 1e3 * bytes_moved / bandwidth()}


def bench_dispatch() -> dict:
    """Sorting copies by expert, dispatching tokens to them and combining them again, with gradients."""
    expert_N, _ = routing()
    x_MD, gates_MK = normal(5, TOKENS, DIM), normal(6, TOKENS, CHOSEN)

    def dispatch_and_combine(x_MD, gates_MK, expert_N):
        # Without the barrier the compiler fuses the two and writes no copies.
        copies_ND, _, order = gather.dispatch(x_MD, expert_N, EXPERTS, CHOSEN)
        return gather.combine(jax.lax.optimization_barrier(copies_ND), gates_MK, order)

    found = forward_and_backward(dispatch_and_combine, x_MD, gates_MK, given=(expert_N,))
    # Forward: read tokens, write copies, read and combine them; backward: the same, and copies once more for the gates.
    bytes_moved = 2 * DIM * TOKENS * (2 * (1 + 2 * CHOSEN + 1) + CHOSEN)
    return {"forward_ms": found[0], "both_ms": found[1], "floor_ms": 1e3 * bytes_moved / bandwidth()}


def bench_loss() -> dict:
    """The chunked cross-entropy with its gradients in hidden states and head."""
    hidden, head = normal(5, 1, ROWS, LENGTH, DIM), 0.02 * normal(6, DIM, VOCAB).astype(jnp.float32)
    targets = jax.random.randint(jax.random.key(7), (1, ROWS, LENGTH), 0, VOCAB)
    weight, scale = jnp.ones((1, ROWS, LENGTH)), jnp.full((1,), 1 / TOKENS)

    def total(hidden, head):
        term = losses.Term(losses.CrossEntropy(), hidden, head, targets, weight, scale)
        return losses.evaluate([term])[0]

    step = jax.jit(jax.value_and_grad(total, (0, 1)))
    found = milliseconds(lambda: step(hidden, head), calls=3)
    return {"both_ms": found, "floor_ms": 1e3 * 6 * TOKENS * DIM * VOCAB / rate()}


BENCHMARKS = {
    "grouped": bench_grouped,
    "attention": functools.partial(bench_attention, False),
    "attention_packed": functools.partial(bench_attention, True),
    "attention_window": functools.partial(bench_attention, False, 512),
    "attention_packed_window": functools.partial(bench_attention, True, 512),
    "router": bench_router,
    "dispatch": bench_dispatch,
    "loss": bench_loss,
}
TILES = {"block_n": (128,), "block_k": (64, 128), "stages": (2, 3, 4), "turns": (1, 2, 4, 8, 11)}


def sweep(product: str, output: pathlib.Path) -> None:
    """Times every tile size of one product of the grouped matmul; those that exceed shared memory are skipped."""
    _, sizes_E = routing()
    x_ND, y_NF = normal(5, TOKENS * CHOSEN, DIM), normal(6, TOKENS * CHOSEN, 2 * WIDTH)
    w_EDF = normal(7, EXPERTS, DIM, 2 * WIDTH)
    first = {"forward": x_ND, "rows": y_NF}[product]
    for values in itertools.product(*TILES.values()):
        tiles = hopper_kernels.Tiles(**dict(zip(TILES, values, strict=True)))
        stage_bytes = 2 * tiles.block_k * (tiles.block_m + 2 * tiles.block_n)
        if tiles.stages * stage_bytes + 4 * tiles.block_m * tiles.block_n > SHARED_BYTES:
            continue
        run = jax.jit(functools.partial(hopper_kernels.product, tiles=tiles, is_transposed=product == "rows"))
        found = milliseconds(lambda run=run: run(first, w_EDF, sizes_E), calls=5, repeats=3)
        append(output, {"benchmark": f"sweep_{product}", "tiles": tiles._asdict(), "ms": found})


def peers() -> dict[str, dict]:
    """Returns PyTorch's figures from a separate process, on the same documents: the blocks to skip depend on them."""
    begins = jnp.argwhere(jnp.diff(segments(), prepend=1, axis=1)).tolist()
    command = [sys.executable, str(ROOT / "benchmarks" / "ops_torch.py"), json.dumps(begins)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--only", default=",".join(BENCHMARKS))
    flags.add_argument("--sweep", default="", help="products of the grouped matmul whose tiles to try")
    flags.add_argument("--peer", choices=["none", "torch"], default="none")
    flags.add_argument("--output", type=pathlib.Path, default=RESULTS)
    args = flags.parse_args()
    for product in filter(None, args.sweep.split(",")):
        sweep(product, args.output)
    if args.sweep:
        return
    beside = peers() if args.peer == "torch" else {}
    for name in args.only.split(","):
        append(args.output, {"benchmark": f"op_{name}", **BENCHMARKS[name](), "peer": beside.get(name)})


if __name__ == "__main__":
    main()
