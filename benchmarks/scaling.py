"""Training steps on several GPUs of one machine: rate, MFU, memory, communication and losses of each mesh.

    python benchmarks/scaling.py --configs=moe_4b --meshes=data=1,data=2,fsdp=2,expert=2,fsdp=2+expert=2 \\
        --rows_per_gpu=4 [--rows=8] [--mtp=none,sequential] [--flags=default,overlap] [--config.section.key=VALUE ...]
    python benchmarks/scaling.py --plot=docs/images/scaling.png      # or --table

A mesh is one case, its axes joined by "+"; it takes as many GPUs as its product. --rows_per_gpu is weak scaling (the
batch grows with the GPUs), --rows strong scaling (rows of the whole batch); both may have several values. Every case
runs in a process of its own with a time limit, on GPUs that no other case uses, so small cases run at the same time.

A line per case is appended to --output as soon as the case ends, a failed one with its error. Rows are packed random
documents, the same for every mesh. With --reference each batch also runs on one GPU, in as many micro-batches as the
largest mesh has GPUs; `loss_difference` of --table is the largest relative difference from it, or from the case on one
GPU, over all steps. Profiles are taken after the timed steps. For them CUDA graphs are off, in the timed steps too.
"""

import argparse
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "scaling.jsonl"

# Compiler flags by name; the jaxlibs of jax 0.10.2 and 0.11.2 accept them. An unknown flag ends the process. With jax
# 0.11.2 --xla_gpu_enable_latency_hiding_scheduler=true alone compiles the same program as no flag.
_HIDING = "--xla_gpu_enable_latency_hiding_scheduler=true"
_ESTIMATED = "--xla_gpu_enable_analytical_sol_latency_estimator=true"  # from a model of the GPU and its links
_PARALLEL = "--xla_gpu_experimental_parallel_collective_overlap_limit=2"
_COMBINED = (
    "--xla_gpu_all_gather_combine_threshold_bytes=134217728",
    "--xla_gpu_reduce_scatter_combine_threshold_bytes=67108864",
    "--xla_gpu_all_reduce_combine_threshold_bytes=134217728",
)
_PIPELINED = (
    "--xla_gpu_enable_pipelined_all_gather=true",
    "--xla_gpu_enable_pipelined_reduce_scatter=true",
    "--xla_gpu_enable_pipelined_all_reduce=true",
    "--xla_gpu_enable_while_loop_double_buffering=true",  # loops only; without recomputation layers are unrolled
)
FLAGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "overlap": (_HIDING, _ESTIMATED, _PARALLEL),
    "estimated": (_HIDING, _ESTIMATED),
    "parallel": (_HIDING, _PARALLEL),
    "combined": (_HIDING, *_COMBINED),
    "launch": (_HIDING, *_PIPELINED, *_COMBINED),  # launch/xla_flags.sh
    "priority": (_HIDING, "--xla_gpu_enable_highest_priority_async_stream=true"),  # collectives before other kernels
}


@dataclass(frozen=True)
class Case:
    """One measurement. rows: of the global batch. micro_batches: greater than 1 for a reference on one GPU."""

    config: str
    mesh: str
    rows: int
    mtp: str
    flags: str
    overrides: tuple[str, ...] = ()
    micro_batches: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        return {axis: int(size) for axis, _, size in (part.partition("=") for part in self.mesh.split("+"))}

    @property
    def num_gpus(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def arguments(self) -> list[str]:
        """Overrides of the config."""
        found = [f"--config.mesh.{axis}={size}" for axis, size in ({"data": 1} | self.sizes).items()]
        found += [
            f"--config.data.batch_size={self.rows}",
            "--config.data.packing=packed",
            f"--config.mtp.kind={self.mtp}",
        ]
        found += ["--config.mtp.depth=1"] if self.mtp != "none" else []
        return [*found, f"--config.training.grad_accum_steps={self.micro_batches}", *self.overrides]


def cases(args: argparse.Namespace, overrides: list[str]) -> list[Case]:
    """Returns the cases of the command line, the reference runs last."""
    found = []
    for config, mtp, flags, mesh in itertools.product(args.configs, args.mtp, args.flags, args.meshes):
        case = Case(config, mesh, 0, mtp, flags, tuple(overrides))
        rows = [n * case.num_gpus for n in args.rows_per_gpu] + args.rows
        found += [replace(case, rows=n) for n in dict.fromkeys(rows)]
    alone = {(c.config, c.mtp, c.rows) for c in found if c.num_gpus == 1}
    largest = max(case.num_gpus for case in found)
    wanted = [replace(c, mesh="data=1", flags="default", micro_batches=largest) for c in found]
    more = [c for c in dict.fromkeys(wanted) if (c.config, c.mtp, c.rows) not in alone and c.rows % largest == 0]
    return found + (more if args.reference else [])


def run_all(found: list[Case], args: argparse.Namespace) -> int:
    """Runs the cases in order, each as soon as enough GPUs are free; returns the number that failed."""
    free, running, waiting, failed = list(args.gpus), [], list(found), 0
    while waiting or running:
        while waiting and waiting[0].num_gpus <= len(free):
            case = waiting.pop(0)
            gpus, free = free[: case.num_gpus], free[case.num_gpus :]
            log = tempfile.TemporaryFile("w+")  # noqa: SIM115
            process = subprocess.Popen(
                child_command(case, args), env=environment(case, gpus, args), stdout=log, stderr=log
            )
            running.append((case, gpus, process, log, time.monotonic()))
        for entry in list(running):
            case, gpus, process, log, started = entry
            seconds = time.monotonic() - started
            if process.poll() is None and seconds < args.seconds:
                continue
            if process.poll() is None:
                process.kill()
                process.wait()
                error = f"stopped after {args.seconds} s"
            else:
                error = "" if process.returncode == 0 else f"exit code {process.returncode}: {last_line(log)}"
            if error:
                from benchmarks.measuring import write_line

                failed += 1
                write_line(
                    args.output, {"benchmark": "scaling", **asdict(case), "num_gpus": case.num_gpus, "error": error}
                )
            print(
                f"{case.config} {case.mesh} rows={case.rows} mtp={case.mtp} flags={case.flags}: "
                f"{error or 'done'}, {seconds:.0f} s",
                flush=True,
            )
            log.close()
            running.remove(entry)
            free = sorted(free + gpus)
        time.sleep(0.2)
    return failed


def last_line(log: Any) -> str:
    """Returns the line of a child's output that states the error: the first out-of-memory one, else the last."""
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    full = [line for line in lines if "RESOURCE_EXHAUSTED" in line or "out of memory" in line.lower()]
    return (full or lines[-1:] or ["no output"])[0][:300]


def child_command(case: Case, args: argparse.Namespace) -> list[str]:
    """Returns the command line that measures one case."""
    options = {"output": str(args.output), "steps": args.steps, "warm": args.warm, "profile": args.profile}
    return [sys.executable, __file__, "--child", json.dumps({"case": asdict(case), **options})]


def environment(case: Case, gpus: list[int], args: argparse.Namespace) -> dict[str, str]:
    """Returns a child's environment: this one, with its GPUs and compiler flags."""
    out = dict(os.environ)
    out["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    out.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # NCCL's buffers are outside
    flags = [out.get("XLA_FLAGS", ""), *FLAGS[case.flags]]
    flags += ["--xla_gpu_enable_command_buffer="] if args.profile else []
    if out.get("JAX_PLATFORMS") == "cpu":
        flags.append(f"--xla_force_host_platform_device_count={len(gpus)}")
    return out | {"XLA_FLAGS": " ".join(flags)}


def run_child(given: dict[str, Any]) -> None:
    """Measures one case on all visible devices and appends its line."""
    case = Case(**given["case"] | {"overrides": tuple(given["case"]["overrides"])})
    import jax

    from benchmarks.measuring import append, measure
    from mtp_jax.config import load_config
    from mtp_jax.data import tokenizer
    from mtp_jax.model import validate
    from mtp_jax.training.run import with_vocabulary

    path = case.config if case.config.endswith(".py") else str(ROOT / "configs" / f"{case.config}.py")
    config = load_config(path, case.arguments)
    config = with_vocabulary(config, tokenizer.load(config.data.tokenizer).vocab_size)
    validate(config, jax.device_count())
    found = measure(config, given["steps"], given["profile"], given["warm"])
    rate = round(found["tokens_per_second"] / case.num_gpus, 1)
    line = {"benchmark": "scaling", **asdict(case), "num_gpus": case.num_gpus, "tokens_per_second_per_gpu": rate}
    append(pathlib.Path(given["output"]), line | found)


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of a results file; later lines of the same case replace earlier ones."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    keys = list(Case.__dataclass_fields__)
    return list({json.dumps([line[key] for key in keys]): line for line in lines}.values())


def loss_difference(line: dict[str, Any], lines: Iterable[dict[str, Any]]) -> float | None:
    """Returns the largest relative difference of a step's loss from one GPU with the same batches; None without it."""
    same = ("config", "mtp", "rows", "overrides")
    for other in lines:
        if other["num_gpus"] == 1 and other is not line and not other.get("error"):
            if all(other[key] == line[key] for key in same):
                pairs = zip(line["losses"], other["losses"], strict=False)
                return max(abs(a - b) / abs(b) for a, b in pairs)
    return None


def table(lines: list[dict[str, Any]]) -> str:
    """Returns the results as a Markdown table; times in milliseconds per step."""
    columns = ("config", "MTP", "mesh", "GPUs", "rows", "flags", "tokens/s per GPU", "MFU", "GiB", "step")
    columns += ("in collectives", "exposed", "loss difference")
    out = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for line in lines:
        if line["micro_batches"] > 1:
            continue
        first = [line["config"], line["mtp"], line["mesh"], line["num_gpus"], line["rows"], line["flags"]]
        if line.get("error"):
            rest = [line["error"][:60]] + [""] * (len(columns) - 7)
        else:
            names = ("tokens_per_second_per_gpu", "mfu", "peak_gib", "step_ms", "communication_ms", "exposed_ms")
            difference = loss_difference(line, lines)
            rest = ["" if line.get(name) is None else line[name] for name in names]
            rest.append("" if difference is None else f"{difference:.1e}")
        out.append("| " + " | ".join(str(value) for value in first + rest) + " |")
    return "\n".join(out)


def plot(lines: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draws tokens/s per GPU over the number of GPUs, a line per model, mesh axes and way of scaling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for label, points in sorted(curves(lines).items()):
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.set(xlabel="GPUs", ylabel="tokens/s per GPU", ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def curves(lines: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Returns (GPUs, best tokens/s per GPU over flags) of each curve, the point of one GPU on each."""
    best: dict[str, dict[int, float]] = {}
    measured = [line for line in lines if not line.get("error") and line["micro_batches"] == 1]
    for line in measured:
        axes = "+".join(part.partition("=")[0] for part in line["mesh"].split("+"))
        scalings = {f"{line['rows'] // line['num_gpus']} rows per GPU", f"{line['rows']} rows"}
        for scaling in scalings if line["num_gpus"] > 1 else ():
            points = best.setdefault(f"{line['config']}, MTP {line['mtp']}, {axes}, {scaling}", {})
            n, rate = line["num_gpus"], line["tokens_per_second_per_gpu"]
            points[n] = max(rate, points.get(n, 0))
            for one in measured:
                is_same = (one["config"], one["mtp"], one["num_gpus"]) == (line["config"], line["mtp"], 1)
                if is_same and scaling in (f"{one['rows']} rows per GPU", f"{one['rows']} rows"):
                    points[1] = max(one["tokens_per_second_per_gpu"], points.get(1, 0))
    return {label: list(points.items()) for label, points in best.items() if len(points) > 1}


def _list(kind: type) -> Any:
    return lambda text: [kind(part) for part in text.split(",") if part]


def visible_gpus() -> Iterator[int]:
    """Yields the numbers of this machine's GPUs that CUDA_VISIBLE_DEVICES permits."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given:
        yield from map(int, given.split(","))
        return
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        listed = ""
    yield from range(sum(line.startswith("GPU ") for line in listed.splitlines()))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        run_child(json.loads(sys.argv[2]))
        return
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--configs", type=_list(str), default=["moe_4b"])
    flags.add_argument("--meshes", type=_list(str), default=["data=1"])
    flags.add_argument("--rows_per_gpu", type=_list(int), default=[])
    flags.add_argument("--rows", type=_list(int), default=[])
    flags.add_argument("--mtp", type=_list(str), default=["none"])
    flags.add_argument("--flags", type=_list(str), default=["default"], help=", ".join(FLAGS))
    flags.add_argument("--steps", type=int, default=10, help="timed steps")
    flags.add_argument("--warm", type=int, default=10, help="steps before them")
    flags.add_argument("--no_profile", dest="profile", action="store_false")
    flags.add_argument("--reference", action="store_true", help="each batch on one GPU too, in micro-batches")
    flags.add_argument("--seconds", type=float, default=180, help="time limit of a case")
    flags.add_argument("--gpus", type=_list(int), default=list(visible_gpus()), help="numbers; default: all")
    flags.add_argument("--output", type=pathlib.Path, default=RESULTS)
    flags.add_argument("--table", action="store_true", help="print the results so far; measure nothing")
    flags.add_argument("--plot", type=pathlib.Path, help="draw the results so far; measure nothing")
    args, overrides = flags.parse_known_args()
    if args.table or args.plot:
        lines = read(args.output)
        print(table(lines))
        if args.plot:
            plot(lines, args.plot)
        return
    unknown = [name for name in args.flags if name not in FLAGS]
    if unknown:
        flags.error(f"--flags={','.join(unknown)}: no such set; there are {', '.join(FLAGS)}")
    if not args.rows_per_gpu and not args.rows:
        flags.error("--rows_per_gpu or --rows is required")
    found = cases(args, overrides)
    largest = max(case.num_gpus for case in found)
    if largest > len(args.gpus):
        flags.error(f"--meshes: one takes {largest} GPUs, there are {len(args.gpus)}; list others with --gpus")
    failed = run_all(found, args)
    print(table(read(args.output)))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
