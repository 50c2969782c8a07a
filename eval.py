"""Measure a trained model: python eval.py --workdir=DIR --tasks=loss,acceptance [--output=FILE.json] [--limit=N]

    loss          per depth on held-out documents: loss, bits per byte, accuracy
    acceptance    per depth: agreement with the main head, and the tokens per forward pass to expect from it
    speculative   plain and self-speculated continuations: measured acceptance, tokens per forward pass, speed-up
    advice        how many tokens to draft at which batch size, from measured acceptance and measured costs

Exit codes: 0 done, 1 a failed run, 2 unusable arguments.
"""

import json
import pathlib

from mtp_jax import cli, distributed
from mtp_jax.config import UserError

VALIDATION_TASKS, DECODE_TASKS = ("loss", "acceptance"), ("speculative", "advice")
TASKS = VALIDATION_TASKS + DECODE_TASKS


def main(argv: list[str]) -> None:
    from mtp_jax.evaluation import decode_tasks

    flags = cli.parser(__doc__)
    flags.add_argument("--workdir", required=True, help="of a run of train.py")
    flags.add_argument("--tasks", default="loss,acceptance", help=f"comma-separated: {', '.join(TASKS)}")
    flags.add_argument("--output", help="also write the results to this JSON file")
    flags.add_argument("--limit", type=int, help="validation batches (default training.eval_batches), or prompts")
    flags.add_argument("--check_only", action="store_true", help="check the flags, measure nothing (for tools.sweep)")
    decode_tasks.add_flags(flags)
    distributed.add_flags(flags)
    args, overrides = cli.parse(flags, argv)
    tasks = [t for t in args.tasks.split(",") if t]
    unknown = [t for t in tasks if t not in TASKS]
    if unknown or not tasks:
        raise UserError(f"--tasks={args.tasks}: no task {(unknown or [''])[0]!r}; there are {', '.join(TASKS)}")
    if overrides:
        raise UserError(f"{overrides[0]}: eval.py takes the config of the workdir")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit={args.limit}: must be at least 1")
    if args.output and not pathlib.Path(args.output).absolute().parent.is_dir():
        raise UserError(f"--output={args.output}: its folder does not exist; make it first")
    decode_tasks.check(args)
    if args.check_only:
        return
    distributed.initialize(args)

    import jax

    texts: list[str] = []
    values: dict[str, object] = {}
    if set(tasks) & set(VALIDATION_TASKS):
        from mtp_jax.evaluation import validation

        text, values = validation.run(args.workdir, tasks, args.limit)
        texts.append(text)
    if set(tasks) & set(DECODE_TASKS):
        for task, (text, found) in decode_tasks.run(args, tasks).items():
            texts.append(text)
            values[task] = found
    if jax.process_index() != 0:
        return
    print("\n\n".join(texts))
    if args.output:
        pathlib.Path(args.output).write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
