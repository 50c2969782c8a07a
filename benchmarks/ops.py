"""Operations of a step, each timed separately, with a lower bound and PyTorch's time.

    python benchmarks/ops.py [--only=NAME,...] [--peer=torch]     # grouped, attention, attention_packed, ...
    python benchmarks/ops.py --only=matmul_fp8,rounding,mlp,mlp_fp8,grouped,grouped_fp8      # 8 bits beside bfloat16
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
from mtp_jax.kernels import attention, fp8, log_z  # noqa: E402
from mtp_jax.kernels import grouped_matmul as grouped
from mtp_jax.kernels.device import device  # noqa: E402
from mtp_jax.kernels.grouped_matmul import hopper, hopper_kernels  # noqa: E402
from mtp_jax.kernels.permute import gather  # noqa: E402
from mtp_jax.layers.ffn import SwiGLU  # noqa: E402
from mtp_jax.layers.norm import RMSNorm  # noqa: E402
from mtp_jax.layers.router import Router  # noqa: E402

ROWS, LENGTH, HEADS, QUERY_DIM, VALUE_DIM = 4, 4096, 16, 192, 128
TOKENS, DIM, WIDTH, EXPERTS, CHOSEN, VOCAB = ROWS * LENGTH, 2048, 1408, 64, 6, 102_400
DENSE_WIDTH = 5632  # of configs/dense_1b.py
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


def normal_8bit(seed: int, *shape: int) -> jax.Array:
    """Returns random values rounded to 8 bits with a scale of 1."""
    return normal(seed, *shape).astype(fp8.DTYPE)


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


def bench_grouped_fp8() -> dict:
    """The same in 8 bits, with the passes that round; and the three kernels alone."""
    _, sizes_E = routing()
    x_ND, w_EDF = normal(5, TOKENS * CHOSEN, DIM), normal(6, EXPERTS, DIM, 2 * WIDTH)

    def run(x_ND, w_EDF, sizes_E):
        return grouped.grouped_matmuls(x_ND, [w_EDF], sizes_E, is_fp8=True)[0]

    found = forward_and_backward(run, x_ND, w_EDF, given=(sizes_E,))
    rows_8bit, matrices_8bit = map(jax.jit, (hopper.kernels().rows_8bit, hopper.kernels().matrices_8bit))
    x8_ND, y8_NF = normal_8bit(5, *x_ND.shape), normal_8bit(6, len(x_ND), 2 * WIDTH)
    w8_EFD, w8_EDF = normal_8bit(7, EXPERTS, 2 * WIDTH, DIM), normal_8bit(8, *w_EDF.shape)
    x8_DN, y8_FN = normal_8bit(5, DIM, len(x_ND)), normal_8bit(6, 2 * WIDTH, len(x_ND))
    dense = jax.jit(lambda x, w: dot_8bit(x, w, None))
    return {
        "forward_ms": found[0],
        "both_ms": found[1],
        "kernel_forward_ms": milliseconds(lambda: rows_8bit(x8_ND, w8_EFD, sizes_E)),
        "kernel_rows_ms": milliseconds(lambda: rows_8bit(y8_NF, w8_EDF, sizes_E)),
        "kernel_matrices_ms": milliseconds(lambda: matrices_8bit(x8_DN, y8_FN, sizes_E)),
        "dense_forward_ms": milliseconds(lambda: dense(x8_ND, w8_EFD[0])),
    }


def dot_8bit(a: jax.Array, b: jax.Array, precision: jax.lax.Precision | None) -> jax.Array:
    """Returns a b^T in bfloat16, both contracted over their last dim."""
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision, preferred_element_type=jnp.bfloat16)


def bench_matmul_fp8() -> dict:
    """One matmul of the dense feed-forward in bfloat16 and in 8 bits, with both accumulations of cuBLASLt."""
    x, w = normal(5, TOKENS, DIM), normal(6, DENSE_WIDTH, DIM)
    x8, w8 = x.astype(fp8.DTYPE), w.astype(fp8.DTYPE)
    found = {"bfloat16_ms": (x, w, None), "fast_ms": (x8, w8, None), "exact_ms": (x8, w8, jax.lax.Precision.HIGHEST)}
    dot = jax.jit(dot_8bit, static_argnums=2)
    return {name: milliseconds(functools.partial(dot, *args)) for name, args in found.items()}


def bench_rounding() -> dict:
    """Rounding of activations to 8 bits in both orders, with the maximum before it; and the maximum alone."""
    x = normal(5, TOKENS, DENSE_WIDTH)
    maximum = jax.jit(lambda x: fp8.rounded(x, (1,)).scale)

    @jax.jit
    def chosen(x):
        return fp8.both_orders(x, fp8.rounded(x, (1,)), 1)

    @jax.jit
    def by_xla(x):
        x8 = fp8.rounded(x, (1,))
        return [fp8.ordered(x8.values, order) for order in ((0, 1), (1, 0))], x8.scale

    return {
        "forward_ms": milliseconds(lambda: chosen(x)),
        "xla_ms": milliseconds(lambda: by_xla(x)),
        "maximum_ms": milliseconds(lambda: maximum(x)),
        "floor_ms": 1e3 * (2 * 2 + 2) * x.size / bandwidth(),  # read for the maximum and for rounding; two copies
    }


def bench_mlp(precision: str) -> dict:
    """Dense gated feed-forward with float32 weights and the norm before it."""
    config = ModelConfig(embed_dim=DIM, compute_dtype="bfloat16", matmul_precision=precision)
    norm, unit = RMSNorm(DIM, config), SwiGLU(DENSE_WIDTH, config, nnx.Rngs(0))
    graph, state = nnx.split((norm, unit))

    def run(x_BTD, state):
        norm, unit = nnx.merge(graph, state)
        return x_BTD + unit(norm(x_BTD))

    found = forward_and_backward(run, normal(5, ROWS, LENGTH, DIM), state)
    flops = 3 * 3 * 2 * TOKENS * DIM * DENSE_WIDTH
    return {"forward_ms": found[0], "both_ms": found[1], "bfloat16_floor_ms": 1e3 * flops / rate()}


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


def bench_loss(precision: str) -> dict:
    """The chunked cross-entropy with its gradients in hidden states and head, with training.loss_precision."""
    hidden, head = normal(5, 1, ROWS, LENGTH, DIM), 0.02 * normal(6, DIM, VOCAB).astype(jnp.float32)
    targets = jax.random.randint(jax.random.key(7), (1, ROWS, LENGTH), 0, VOCAB)
    weight, scale = jnp.ones((1, ROWS, LENGTH)), jnp.full((1,), 1 / TOKENS)

    def total(hidden, head):
        term = losses.Term(losses.CrossEntropy(), hidden, head, targets, weight, scale)
        return losses.evaluate([term], precision=precision)[0]

    step = jax.jit(jax.value_and_grad(total, (0, 1)), compiler_options=device().compiler_options)
    found = milliseconds(lambda: step(hidden, head), calls=3)
    return {"both_ms": found, "floor_ms": 1e3 * 6 * TOKENS * DIM * VOCAB / rate()}


def bench_log_z() -> dict:
    """Argmax and log-sum-exp of the logits of 4,096 tokens, in one pass."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        logits = normal(5, 4096, VOCAB).astype(dtype)
        for name in ("by_kernel", "by_reduction"):
            run = jax.jit(
                lambda x, name=name: getattr(log_z, name)(x if name == "by_kernel" else x.astype(jnp.float32))
            )
            found[f"{dtype}_{name}_ms"] = milliseconds(lambda run=run, logits=logits: run(logits))
        found[f"{dtype}_floor_ms"] = 1e3 * logits.nbytes / bandwidth()
    return found


BENCHMARKS = {
    "grouped": bench_grouped,
    "grouped_fp8": bench_grouped_fp8,
    "matmul_fp8": bench_matmul_fp8,
    "rounding": bench_rounding,
    "mlp": functools.partial(bench_mlp, "default"),
    "mlp_fp8": functools.partial(bench_mlp, "fp8"),
    "attention": functools.partial(bench_attention, False),
    "attention_packed": functools.partial(bench_attention, True),
    "attention_window": functools.partial(bench_attention, False, 512),
    "attention_packed_window": functools.partial(bench_attention, True, 512),
    "router": bench_router,
    "dispatch": bench_dispatch,
    "loss": functools.partial(bench_loss, "default"),
    "loss_bfloat16": functools.partial(bench_loss, "bfloat16"),
    "loss_fp8": functools.partial(bench_loss, "fp8"),
    "log_z": bench_log_z,
}
TILES = {"block_n": (128,), "block_k": (64, 128), "stages": (2, 3, 4), "turns": (1, 2, 4, 8, 11)}
TILES_8BIT = TILES | {"block_m": (64, 128), "block_k": (128,)}


def sweep(product: str, output: pathlib.Path) -> None:
    """Times every tile size of one product of the grouped matmul; those that exceed shared memory are skipped."""
    _, sizes_E = routing()
    num_rows, is_8bit = TOKENS * CHOSEN, product.endswith("_8bit")
    draw = normal_8bit if is_8bit else normal
    first, second = {
        "forward": ((num_rows, DIM), (EXPERTS, DIM, 2 * WIDTH)),
        "rows": ((num_rows, 2 * WIDTH), (EXPERTS, DIM, 2 * WIDTH)),
        "forward_8bit": ((num_rows, DIM), (EXPERTS, 2 * WIDTH, DIM)),
        "rows_8bit": ((num_rows, 2 * WIDTH), (EXPERTS, DIM, 2 * WIDTH)),
        "matrices_8bit": ((DIM, num_rows), (2 * WIDTH, num_rows)),
    }[product]
    a, b = draw(5, *first), draw(6, *second)
    every = TILES_8BIT if is_8bit else TILES
    for values in itertools.product(*every.values()):
        tiles = hopper_kernels.Tiles(**dict(zip(every, values, strict=True)))
        stage_bytes = a.dtype.itemsize * tiles.block_k * (tiles.block_m + 2 * tiles.block_n)
        if product == "matrices_8bit":
            stage_bytes = tiles.block_k * (2 * tiles.block_m + tiles.block_n)
        if tiles.stages * stage_bytes + 4 * tiles.block_m * tiles.block_n > SHARED_BYTES:
            continue
        kernel = functools.partial(hopper_kernels.product, is_transposed=product != "forward")
        run = jax.jit(
            functools.partial(hopper_kernels.matrices_8bit if product == "matrices_8bit" else kernel, tiles=tiles)
        )
        found = milliseconds(lambda run=run: run(a, b, sizes_E), calls=5, repeats=3)
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
