"""train.py on the GPUs of one machine: one process, a process per GPU, and a run that loses a process and resumes.

    python benchmarks/processes.py --num_gpus=2 --workdir=DIR [--config=FILE] [--config.section.key=VALUE ...]

Trains the same config three times: with all GPUs in one process, with a process per GPU, and with a process per GPU of
which the last is killed (SIGKILL) after --kill_at steps; when the others have ended, one process resumes the run on
half of the GPUs. Appends a line to --output with the rates, the seconds that the survivors took to end, and the largest
relative difference of a step's loss from the first run. Fails if a step is missing or repeated. JAX_PLATFORMS=cpu uses
CPU devices instead. The mesh is fsdp over all devices unless the command line sets another one.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "scaling.jsonl"


def start(arguments: list[str], gpus: list[int], flags: list[str], log: pathlib.Path) -> subprocess.Popen:
    """Starts train.py on the given GPUs; its output is appended to `log`."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
    if env.get("JAX_PLATFORMS") == "cpu":
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={len(gpus)}"
    command = [sys.executable, str(ROOT / "train.py"), *arguments, *flags]
    with log.open("a") as file:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)


def start_each(arguments: list[str], gpus: list[int], heartbeat: int, folder: pathlib.Path) -> list[subprocess.Popen]:
    """Starts a process per GPU."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    peers = [f"--coordinator=localhost:{port}", f"--num_processes={len(gpus)}", f"--heartbeat_seconds={heartbeat}"]
    return [
        start(arguments, [gpu], [*peers, f"--process_id={index}"], folder / f"process_{index}.log")
        for index, gpu in enumerate(gpus)
    ]


def wait(processes: list[subprocess.Popen], seconds: float) -> list[int]:
    """Returns the exit codes; kills what still runs after `seconds`."""
    until = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    return [process.wait() for process in processes]


def metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the complete lines of a run's metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def rate(rows: list[dict[str, Any]]) -> float:
    """Returns the median tokens/s of the second half of a run."""
    return round(statistics.median(row["tokens_per_second"] for row in rows[len(rows) // 2 :]), 1)


def check_steps(rows: list[dict[str, Any]], num_steps: int, name: str) -> None:
    """Ends this process if a step is missing or repeated."""
    if [row["step"] for row in rows] != list(range(1, num_steps + 1)):
        sys.exit(f"{name}: steps {[row['step'] for row in rows]}, not 1 .. {num_steps}")


def difference(rows: list[dict[str, Any]], expected: list[dict[str, Any]]) -> float:
    """Returns the largest relative difference of a step's loss."""
    return max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(rows, expected, strict=True))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--config", default="configs/tiny.py")
    flags.add_argument("--workdir", type=pathlib.Path, required=True, help="emptied first")
    flags.add_argument("--num_gpus", type=int, required=True)
    flags.add_argument("--steps", type=int, default=200)
    flags.add_argument("--kill_at", type=int, default=120)
    flags.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    flags.add_argument("--heartbeat_seconds", type=int, default=10)
    flags.add_argument("--seconds", type=float, default=120, help="time limit of a run")
    flags.add_argument("--output", type=pathlib.Path, default=RESULTS)
    args, overrides = flags.parse_known_args()
    if args.num_gpus < 2 or args.num_gpus % 2:
        flags.error(f"--num_gpus={args.num_gpus}: must be even")
    if not args.every < args.kill_at < args.steps:
        flags.error(f"--kill_at={args.kill_at}: must lie between --every={args.every} and --steps={args.steps}")
    line = {"benchmark": "processes", "config": pathlib.Path(args.config).stem, "overrides": overrides}
    line |= {"num_gpus": args.num_gpus, "steps": args.steps} | run(args, overrides)
    from benchmarks.measuring import write_line

    write_line(args.output, line)
    print(json.dumps(line))


def run(args: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Runs the three trainings and returns their figures."""
    shutil.rmtree(args.workdir, ignore_errors=True)
    args.workdir.mkdir(parents=True)
    gpus = list(range(args.num_gpus))
    common = [
        f"--config={args.config}",
        "--config.mesh.data=1",
        "--config.mesh.fsdp=-1",
        "--config.training.log_every=1",
    ]
    common += [f"--config.training.num_steps={args.steps}", f"--config.checkpoint.every={args.every}"]
    common += ["--config.training.sample_tokens=0", *overrides]

    def folder(name: str) -> tuple[pathlib.Path, list[str]]:
        path = args.workdir / name
        path.mkdir()
        return path, [*common, f"--workdir={path / 'run'}"]

    one, arguments = folder("one_process")
    ended(wait([start(arguments, gpus, [], one / "process.log")], args.seconds), one)
    each, arguments = folder("process_per_gpu")
    ended(wait(start_each(arguments, gpus, args.heartbeat_seconds, each), args.seconds), each)
    expected, found = metrics(one / "run"), metrics(each / "run")
    check_steps(expected, args.steps, "one process")
    check_steps(found, args.steps, "a process per GPU")

    lost, arguments = folder("killed")
    processes = start_each(arguments, gpus, args.heartbeat_seconds, lost)
    until = time.monotonic() + args.seconds
    while (metrics(lost / "run") or [{"step": 0}])[-1]["step"] < args.kill_at:
        if time.monotonic() > until or any(process.poll() is not None for process in processes):
            ended([1, *wait(processes, 0.1)], lost)
        time.sleep(0.05)
    processes[-1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    codes = wait(processes, args.seconds)
    ended_after = time.monotonic() - began
    if 0 in codes:
        sys.exit(f"{lost}: exit codes {codes} after a process was killed; the others must fail")
    reached = metrics(lost / "run")[-1]["step"]
    began = time.monotonic()
    ended(wait([start(arguments, gpus[: args.num_gpus // 2], [], lost / "resumed.log")], args.seconds), lost)
    resumed = metrics(lost / "run")
    check_steps(resumed, args.steps, "the resumed run")
    return {
        "tokens_per_second": {"one_process": rate(expected), "process_per_gpu": rate(found), "half": rate(resumed)},
        "loss_difference": {"process_per_gpu": difference(found, expected), "resumed": difference(resumed, expected)},
        "killed_at": reached,
        "survivors_ended_after_seconds": round(ended_after, 1),
        "resumed_run_seconds": round(time.monotonic() - began, 1),
        "exit_codes": codes,
    }


def ended(codes: list[int], folder: pathlib.Path) -> None:
    """Ends this process if a run failed, with the last line of each log."""
    if any(codes):
        tails = [f"{log.name}: {(log.read_text().strip().splitlines() or [''])[-1]}" for log in folder.glob("*.log")]
        sys.exit(f"{folder.name}: exit codes {codes}; {'; '.join(tails)}")


if __name__ == "__main__":
    main()
