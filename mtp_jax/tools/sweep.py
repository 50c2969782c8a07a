"""Trains and evaluates every combination of some settings, each run in a separate process and folder.

    python -m mtp_jax.tools.sweep --config=configs/NAME.py --workdir=DIR \\
        --over='mtp.kind,mtp.depth=(none,1),(parallel,3),(sequential,1)' --over='seed=0,1' \\
        [--tasks=loss,acceptance,speculative] [--eval.limit=8] [--config.section.key=VALUE ...]

--over is KEY=VALUE,VALUE..., or KEY,KEY=(VALUE,VALUE),(VALUE,VALUE)... for keys that vary together; the runs are the
product of all --over flags. --config.* applies to every run, --eval.NAME=VALUE is --NAME=VALUE of eval.py. A run is
trained in DIR/NAME, with NAME as kind=parallel,depth=3,seed=0, and writes log.txt, eval.json and eval_log.txt there.

The same command again does what is missing: it skips runs that are done and continues those that were interrupted.
Several sweeps may run in one DIR at the same time; a run that one of them has locked is not started by another. For
tables: python -m mtp_jax.tools.report --sweep=DIR. Exit codes: 0 all runs done, 1 some runs failed (the others were
run) or the sweep was stopped, 2 unusable arguments, found before the first run starts.
"""

import argparse
import os
import pathlib
import re
from dataclasses import replace

from mtp_jax import cli, storage
from mtp_jax.config import UserError, shipped
from mtp_jax.model import validate
from mtp_jax.tools.sweeping import children, run_folder
from mtp_jax.tools.sweeping.grid import SweepRun, expand
from mtp_jax.tools.sweeping.runner import Commands, Runner
from mtp_jax.training.workdir import CONFIG_FILE, changes, read_config

OF_THE_SWEEP = ("workdir", "output", "tasks", "check_only")  # flags of eval.py that the sweep sets


def main(argv: list[str]) -> None:
    args, fixed, eval_flags = _parse(argv)
    if storage.is_url(args.workdir):
        raise UserError(
            f"--workdir={args.workdir}: a sweep appends to the logs of its runs, which object stores cannot do; give a "
            "local folder"
        )
    storage.path(args.workdir, "--workdir")  # raises UserError if it is no path
    root = pathlib.Path(args.workdir)
    runs = expand(args.config, fixed, args.over)
    own = runs[args.share[0] :: args.share[1]]
    _check(args, root, runs, eval_flags)
    commands = Commands(args.config, root, args.tasks, eval_flags)
    here = f", {len(own)} of them here" if len(own) < len(runs) else ""
    print(f"{len(runs)} run{'s' if len(runs) > 1 else ''}{here}, in {root}", flush=True)
    if args.dry_run:
        for run in own:
            print(f"  {run.name}{'  (done)' if commands.is_complete(run) else ''}")
        return
    run_folder.prepare(root, runs)
    Runner(commands, own, children.shares_of_cores(args.jobs)).run()


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """Returns (flags, --config.* overrides, flags of eval.py)."""
    flags = cli.parser(__doc__)
    shipped.add_flag(flags)
    flags.add_argument("--workdir", required=True, help="the runs' folders go into this one")
    flags.add_argument("--over", action="append", required=True, help="settings to go through; see above")
    flags.add_argument("--tasks", default="loss,acceptance", help="of eval.py; speculative only where there are depths")
    flags.add_argument("--jobs", type=int, default=1, help="runs at a time, each on its share of the CPU's cores")
    flags.add_argument("--share", help="I/N, from 0: every N-th run only; default: of a SLURM array, its task's share")
    flags.add_argument("--dry_run", action="store_true", help="check everything and list the runs")
    args, overrides = cli.parse(flags, [a for a in argv if not a.startswith("--eval.")])
    for name in ("config", "workdir"):
        if not getattr(args, name):
            raise UserError(f"--{name}=: is empty")
    if args.jobs < 1:
        raise UserError(f"--jobs={args.jobs}: must be at least 1")
    args.share = _share(args.share)
    tasks = [task for task in args.tasks.split(",") if task]
    if not tasks:
        raise UserError(f"--tasks={args.tasks}: names no task of eval.py")
    args.tasks = tasks
    eval_flags = [f"--{a.removeprefix('--eval.')}" for a in argv if a.startswith("--eval.")]
    for flag in eval_flags:
        if flag.removeprefix("--").partition("=")[0] in OF_THE_SWEEP:
            raise UserError(f"--eval.{flag.removeprefix('--')}: is not for eval.py alone; the sweep sets it")
    return args, overrides, eval_flags


def _share(text: str | None) -> tuple[int, int]:
    """Parses I/N into (I, N); the default is the share of the SLURM array's task, else (0, 1)."""
    env, source = os.environ, f"--share={text}"
    if text is None and "SLURM_ARRAY_TASK_ID" in env:
        first, step = (int(env.get(f"SLURM_ARRAY_TASK_{name}", d)) for name, d in (("MIN", 0), ("STEP", 1)))
        number = (int(env["SLURM_ARRAY_TASK_ID"]) - first) // step
        text, source = f"{number}/{env.get('SLURM_ARRAY_TASK_COUNT', '')}", "the SLURM array has gaps"
    found = re.fullmatch(r"(\d+)/(\d+)", text or "0/1")
    share = (int(found[1]), int(found[2])) if found else (0, 0)
    if share[0] >= share[1]:
        raise UserError(f"{source}: --share must be I/N with I from 0 to N - 1, as in --share=0/4")
    return share


def _check(args: argparse.Namespace, root: pathlib.Path, runs: list[SweepRun], eval_flags: list[str]) -> None:
    """Refuses a sweep that would fail later; the cheapest checks come first.

    Raises:
      UserError: the arguments or the config of a run are unusable.
      CheckFailed: a check cannot be made.
    """
    if os.path.exists(root) and not os.path.isdir(root):
        raise UserError(f"--workdir={root}: is a file; give a folder")
    for run in runs:
        try:
            os.lstat(root / run.name)
        except FileNotFoundError:
            pass
        except OSError as error:  # a name that is too long, a file in place of a parent
            raise UserError(f"--workdir={root}: cannot be used ({error.strerror}); give another folder") from error
    children.shares_of_cores(args.jobs)
    for run in runs:
        _check_folder(root / run.name, run)
    platform, num_devices = children.devices()
    if args.jobs > 1 and platform != "cpu":
        raise UserError(
            f"--jobs={args.jobs}: a run takes every device it sees ({num_devices} x {platform}); start N sweeps "
            "instead, each with --share=I/N and devices of its own (on NVIDIA: CUDA_VISIBLE_DEVICES=I)"
        )
    for run in runs:
        try:
            validate(run.config, num_devices)
        except UserError as error:
            raise UserError(f"{error} (in {run.name})") from error
    children.check_evaluation([f"--tasks={','.join(args.tasks)}", *eval_flags], root)


def _check_folder(path: pathlib.Path, run: SweepRun) -> None:
    """Checks that an existing folder belongs to this run."""
    run_folder.read_record(path)  # raises UserError if it cannot be read
    if not storage.is_file(path / CONFIG_FILE):
        return
    config = run.config
    if config.model.vocab_size is None:  # the run has set the tokenizer's
        config = replace(config, model=replace(config.model, vocab_size=read_config(path).model.vocab_size))
    changes(config, path)


def command() -> None:
    """Runs the command line of this process: mtp-sweep."""
    cli.run(main)


if __name__ == "__main__":
    command()
