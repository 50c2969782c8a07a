"""Evaluate a trained model: mtp-eval --workdir=DIR --tasks=loss,acceptance [--output=FILE.json] [--limit=N]

In a clone that is not installed: python eval.py --workdir=DIR ...

    loss          per depth on held-out documents: loss, bits per byte, accuracy
    acceptance    per depth: agreement with the main head, and the expected tokens per forward pass
    speculative   plain and self-speculated continuations: measured acceptance, tokens per forward pass, speed-up
    advice        how many tokens to draft at which batch size, from measured acceptance and measured costs
    any other     a benchmark of lm-evaluation-harness by its name: arc_easy, mmlu, gsm8k, humaneval ...; with
                  --data_dir (or MTP_DATA_DIR) those of configs/tasks read local files; --tasks_dir=DIR adds your own

--apply_chat_template makes the prompts of benchmarks chats, with the model's own template.

--output writes the values as JSON, and beside it the same as Markdown and as a plot (.md, .png).
"""

from mtp_jax import cli, signals
from mtp_jax.errors import UserError

VALIDATION_TASKS, DECODE_TASKS = ("loss", "acceptance"), ("speculative", "advice")


def main(argv: list[str]) -> None:
    from mtp_jax import distributed, storage
    from mtp_jax.evaluation import benchmarks, decode_tasks, results

    flags = cli.parser(__doc__, cli.EXIT_CODES)
    flags.add_argument("--workdir", required=True, help="of a run of train.py, or a Hugging Face folder")
    flags.add_argument("--tasks", default="loss,acceptance", help="comma-separated")
    flags.add_argument("--output", help="write the results to this .json file, and beside it as .md and .png")
    flags.add_argument("--limit", type=int, help="validation batches, prompts, or documents of each benchmark")
    flags.add_argument("--check_only", action="store_true", help="check the flags, measure nothing (for tools.sweep)")
    decode_tasks.add_flags(flags)
    benchmarks.add_flags(flags)
    distributed.add_flags(flags)
    args, overrides = cli.parse(flags, argv)
    tasks = list(dict.fromkeys(t for t in args.tasks.split(",") if t))
    if not tasks:
        raise UserError(f"--tasks={args.tasks}: is empty; give loss, acceptance, speculative, advice or benchmarks")
    if overrides:
        raise UserError(f"{overrides[0]}: eval.py takes the config of the workdir")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit={args.limit}: must be at least 1")
    if args.output:
        results.check_output(args.output)
    validated, decoded = ([t for t in tasks if t in known] for known in (VALIDATION_TASKS, DECODE_TASKS))
    decode_tasks.check(args, decoded)
    names = [t for t in tasks if t not in VALIDATION_TASKS + DECODE_TASKS]
    selection = benchmarks.select(args, names) if names else None
    if args.check_only:
        return
    distributed.initialize(args)

    import jax

    texts: list[str] = []
    values: dict[str, object] = {}

    def done(text: str) -> None:
        """Prints a task's table and writes all results so far, so that a later failure loses nothing."""
        texts.append(text)
        if jax.process_index() == 0:
            print(text if len(texts) == 1 else f"\n{text}", flush=True)
            if args.output:
                results.write(storage.path(args.output), args.workdir, texts, values)

    if validated:
        from mtp_jax.evaluation import validation

        text, found = validation.run(args.workdir, validated, args.limit)
        values |= found
        done(text)
    if decoded or selection:
        model = decode_tasks.load_model(args.workdir)
        values |= {} if model.step is None else {"step": model.step}
        for task, (text, found) in decode_tasks.run(args, decoded, model).items() if decoded else ():
            values[task] = found
            done(text)
        if selection:
            text, values["benchmarks"] = benchmarks.run(selection, args, model)
            done(text)


def command() -> None:
    """Runs the command line of this process: mtp-eval, or eval.py of a clone."""
    signals.install()  # before the slow imports
    cli.run(main)


if __name__ == "__main__":
    command()
