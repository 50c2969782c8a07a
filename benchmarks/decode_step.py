"""Milliseconds of one plain or speculative decode step of a config, with random weights.

    python benchmarks/decode_step.py --config=configs/code_400m.py --config.model.vocab_size=50280 \
        --config.mtp.kind=none --batches=1,8,32
    python benchmarks/decode_step.py --config=configs/code_400m.py --config.mtp.kind=parallel --config.mtp.depth=3 \
        --config.mtp.parameter_matched=False --drafts=0,3

Random drafts are rarely accepted, which does not change the time of a step. Appends a line per batch size and number of
drafts to benchmarks/results/decode_step.jsonl: the best of several calls of --steps steps. --profile adds the kernels
of a step by total time. --compile=FILE only compiles the first of the programs, for the GPU that FILE describes (XLA's
xla/backends/gpu/target_config/specs/*.txtpb), and prints its operations; that needs no GPU, but jax's plugin for them.
"""

import argparse
import collections
import os
import pathlib
import re
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
if "--profile" in sys.argv:  # CUDA graphs hide the operations of their kernels
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
IS_COMPILED_ONLY = any(flag.startswith("--compile") for flag in sys.argv)
if IS_COMPILED_ONLY:
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_gpu_autotune_level=0"}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.measuring import ROOT, append, kernels  # noqa: E402
from mtp_jax import model, sharding  # noqa: E402
from mtp_jax.config import Architecture, Config, load_config  # noqa: E402
from mtp_jax.data import tokenizer  # noqa: E402
from mtp_jax.decoding import generation  # noqa: E402
from mtp_jax.decoding.generator import Generator  # noqa: E402
from mtp_jax.decoding.inference_model import unstack  # noqa: E402
from mtp_jax.decoding.samplers import GREEDY  # noqa: E402
from mtp_jax.training.run import with_vocabulary  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "decode_step.jsonl"
PROMPT = range(1, 21)
CALLS = 4
WHILE_BODY = re.compile(r"while\(.*?body=%?([\w.-]+)")
CAPABILITY = re.compile(r"major: (\d+)\s*(?:minor: (\d+))?")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--config", required=True)
    flags.add_argument("--batches", default="1", help="batch sizes")
    flags.add_argument("--drafts", default="0", help="numbers of drafts per step; 0: plain decoding")
    flags.add_argument("--steps", type=int, default=64)
    flags.add_argument("--profile", action="store_true")
    flags.add_argument("--compile", type=pathlib.Path, metavar="FILE")
    flags.add_argument("--output", type=pathlib.Path, default=RESULTS)
    args, overrides = flags.parse_known_args()
    config = load_config(args.config, overrides)
    if config.model.vocab_size is None:
        config = with_vocabulary(config, tokenizer.load(config.data.tokenizer).vocab_size)
    cases = [(batch, drafts) for batch in numbers(args.batches) for drafts in numbers(args.drafts)]
    if args.compile:
        for line in compiled_kernels(config.architecture, *cases[0], args.compile.read_text()):
            print(line)
        return
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        decoder = Generator(config, *model.init(config.architecture, config.seed), mesh)
    for batch, drafts in cases:
        line = {
            "benchmark": "decode_step",
            "config": pathlib.Path(args.config).stem,
            "overrides": overrides,
            "batch_size": batch,
            "drafts": drafts,
            "step_ms": round(step_seconds(decoder, batch, drafts, args.steps) * 1e3, 4),
        }
        if args.profile:
            line["kernels_us"] = profile(decoder, batch, drafts, args.steps)
        append(args.output, line)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def started(decoder: Generator, batch: int, drafts: int, steps: int) -> generation.State:
    num_tokens = steps * (1 + drafts)
    state = decoder.start([list(PROMPT)] * batch, num_tokens, num_speculative_tokens=drafts)
    return jax.block_until_ready(state)


def step_seconds(decoder: Generator, batch: int, drafts: int, steps: int) -> float:
    """Returns the seconds of one step, the best of `CALLS` calls after one that compiles."""
    found = []
    for _ in range(1 + CALLS):
        state = started(decoder, batch, drafts, steps)
        began = time.perf_counter()
        state = jax.block_until_ready(decoder.write(state, steps, sampler=GREEDY))
        found.append((time.perf_counter() - began) / int(np.asarray(state.counts.num_steps_B).max()))
    return min(found[1:])


def profile(decoder: Generator, batch: int, drafts: int, steps: int) -> dict[str, list[float]]:
    """Returns microseconds per step and number per step of the kernels of a step, by name, the largest first."""
    state = started(decoder, batch, drafts, steps)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            state = jax.block_until_ready(decoder.write(state, steps, sampler=GREEDY))
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    num_steps = int(np.asarray(state.counts.num_steps_B).max())
    total: collections.Counter[str] = collections.Counter()
    times: collections.Counter[str] = collections.Counter()
    for event in kernels(data, 0):
        name = f"{re.sub(r'[._0-9]+$', '', str(dict(event.stats).get('hlo_op', '')))} {event.name}"
        total[name] += event.duration_ns
        times[name] += 1
    return {
        name: [round(ns / num_steps / 1e3, 2), round(times[name] / num_steps, 2)] for name, ns in total.most_common(40)
    }


def compiled_kernels(architecture: Architecture, batch: int, drafts: int, target: str) -> list[str]:
    """Returns the operations of one step of the program compiled for the GPU that `target` describes."""
    from jax.experimental import topologies

    from mtp_jax.kernels.device import pretend

    topology = topologies.get_topology_desc("", "cuda", topology="1x1x1", target_config=target)
    mesh = sharding.make_mesh(Config().mesh, list(topology.devices))
    capability = ".".join(CAPABILITY.search(target).groups(default="0"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def placed(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree)

    def state(network, tokens_BS, length_B):
        return generation.begin(architecture, drafts, network, tokens_BS, length_B, length_B, 0, length_B)

    with pretend("gpu", capability), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        params, biases = jax.eval_shape(lambda: model.init(architecture, 0))
        network = jax.eval_shape(lambda *weights: unstack(architecture, *weights), params, biases)
        int32 = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, 512), (batch,), (1,), ())]
        args = network, int32[2], jax.eval_shape(state, network, *int32[:2]), int32[3]
        program = generation.generate.trace(architecture, GREEDY, *placed(args)).lower().compile().as_text()
    body = program.index("%" + WHILE_BODY.search(program)[1] + " (")
    lines = program[body : program.index("\n}", body)].split("\n")[1:]
    skipped = re.compile(r" (parameter|get-tuple-element|bitcast|constant|tuple)\(")
    return [line.split(", metadata")[0].strip()[:160] for line in lines if not skipped.search(line)]


if __name__ == "__main__":
    main()
