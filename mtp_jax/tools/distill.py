"""Train MTP modules on a model's own answers, with the model itself frozen, so that more drafts are accepted.

    python -m mtp_jax.tools.distill --model=DIR --prompts=[NAME=]FILE [--prompts=...] --workdir=DIR
        [--num_speculative_tokens=3] [--kind=sequential] [--loss=end_to_end_tv] [--config.section.key=VALUE ...]

1. Measures the drafts of the model, a workdir or a Hugging Face folder, on prompts that are held out.
2. Samples an answer to every other prompt from the model.
3. Trains its MTP modules on the answers: one sequential module for all drafts, on its own hidden states (FastMTP,
   2509.18362), or parallel heads. A model without modules gets new ones. The loss is the cross-entropy of the answers
   (cross_entropy), or the total variation from what the model predicts, of each draft (tv) or of all in turn
   (end_to_end_tv; Bebop, 2606.12370).
4. Measures again, and prints both in one table. The workdir then holds the model with its new modules.

The same command continues an interrupted one. --config.section.key=VALUE changes the training, as in train.py; its mesh
(--config.mesh.fsdp=8) is also that of the answers.
"""

import argparse

from mtp_jax import cli, signals, storage
from mtp_jax.config import UserError

ANSWERS, BEFORE_FILE, RESULT_FILE = "answers", "before.json", "distill.json"


def main(argv: list[str]) -> None:
    from mtp_jax import distributed

    flags = cli.parser(__doc__ or "", cli.EXIT_CODES)
    _add_flags(flags)
    distributed.add_flags(flags)
    args, overrides = cli.parse(flags, argv)
    _check(args)
    distributed.initialize(args)
    run(args, overrides)


def _add_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--model", required=True, help="a workdir of train.py, or a Hugging Face folder")
    flags.add_argument("--workdir", required=True, help="the folder to make: answers, training, result")
    flags.add_argument(
        "--prompts",
        required=True,
        action="append",
        metavar="[NAME=]FILE",
        help="a prompt per line, or .jsonl with prompt or messages; may be given several times, one file per domain",
    )
    flags.add_argument("--held_out", type=int, default=16, help="prompts of each file to measure on, its last ones")
    flags.add_argument("--num_speculative_tokens", type=int, default=3, help="drafts per forward pass; default 3")
    flags.add_argument("--kind", default="", help="sequential or parallel; default: as in the model, or sequential")
    flags.add_argument(
        "--loss",
        default="end_to_end_tv",
        choices=["cross_entropy", "tv", "end_to_end_tv"],
        help="default end_to_end_tv",
    )
    flags.add_argument("--depth_decay", type=float, help="weight of each draft over that before; default 0.6, tv: 1")
    flags.add_argument("--epochs", type=float, default=3.0, help="passes over the answers; default 3")
    flags.add_argument(
        "--draft_vocabulary",
        type=int,
        default=0,
        metavar="N",
        help="draft only the N most frequent tokens of the answers (docs/drafting.md); default 0, all",
    )
    group = flags.add_argument_group("answers")
    group.add_argument("--num_per_prompt", type=int, default=1, help="answers to each prompt; default 1")
    group.add_argument("--max_new_tokens", type=int, default=256, help="of each answer; default 256")
    group.add_argument("--temperature", type=float, default=1.0, help="default 1, the distribution of the model")
    group.add_argument("--batch_size", type=int, default=32, help="answers generated at once; default 32")
    group.add_argument(
        "--answers", help="folder of the answers, to share between runs; default: answers in the workdir"
    )
    group = flags.add_argument_group("measurement")
    group.add_argument("--measured_tokens", type=int, default=128, help="new tokens per held-out prompt; default 128")
    group.add_argument("--measured_temperature", type=float, default=0.0, help="default 0, greedy")
    group.add_argument("--measured_batch_size", type=int, default=1, help="default 1")


def _check(args: argparse.Namespace) -> None:
    """Checks the numbers.

    Raises:
      UserError: one outside its range.
    """
    least = ["held_out", "num_speculative_tokens", "num_per_prompt", "max_new_tokens", "batch_size"]
    for name in (*least, "measured_tokens", "measured_batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)}: must be at least 1")
    if not 0 < args.epochs < 1e6:
        raise UserError(f"--epochs={args.epochs}: must be above 0")
    if args.depth_decay is not None and not 0 < args.depth_decay <= 1000:
        raise UserError(f"--depth_decay={args.depth_decay}: must be above 0")
    if storage.path(args.model, "--model") == storage.path(args.workdir, "--workdir"):
        raise UserError(f"--workdir={args.workdir}: is the model; give another folder")


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    """Runs the four parts; see the module."""
    import functools

    import jax
    from jax.experimental import multihost_utils

    import mtp_jax
    from mtp_jax.config.load import override
    from mtp_jax.language_model import draft_vocabulary, loading
    from mtp_jax.model import validate
    from mtp_jax.tools.distilling import answers, prompts, recipe, table
    from mtp_jax.training import loop

    is_main, folder = jax.process_index() == 0, storage.path(args.workdir, "--workdir")
    answered = storage.path(args.answers, "--answers") if args.answers else folder / ANSWERS
    source, _, ends = loading.read_info(args.model)
    num_devices = jax.device_count()
    decay = _decay(args.loss) if args.depth_decay is None else args.depth_decay
    settings = recipe.Recipe(args.kind, args.num_speculative_tokens, args.loss, decay, args.epochs)

    def training(num_tokens: int):
        config = recipe.training_config(
            settings, source, args.model, answers.pattern(answered), num_tokens, num_devices
        )
        return override(config, overrides)

    # What cannot be trained is refused before anything is generated.
    validate(training(1), num_devices)
    if args.draft_vocabulary:
        size = args.draft_vocabulary
        draft_vocabulary.check_size(size, source.model.vocab_size or 0, ends, "--draft_vocabulary")
    mesh = training(1).mesh if num_devices > 1 else None
    model = mtp_jax.load(args.model, mesh=mesh)
    longest = source.data.sequence_length - args.max_new_tokens
    domains, num_dropped = prompts.read(model, args.prompts, args.held_out, longest)
    if num_dropped and is_main:
        print(f"note: {num_dropped} prompts are longer than {longest} tokens and left out")

    measure = functools.partial(
        table.measure,
        domains=domains,
        num_speculative_tokens=args.num_speculative_tokens,
        batch_size=args.measured_batch_size,
        max_new_tokens=args.measured_tokens,
        temperature=args.measured_temperature,
    )
    is_measured = storage.is_file(folder / BEFORE_FILE)
    multihost_utils.sync_global_devices("every process has seen what is measured already")
    if is_measured:
        before = storage.read_json(folder / BEFORE_FILE, "remove it to measure again")["drafts"]
    else:
        before = measure(model)
        if is_main:
            storage.make_folder(folder)
            table.write(folder / BEFORE_FILE, {"drafts": before})

    num_prompts = sum(len(domain.train) for domain in domains)
    how = answers.Settings(
        model=str(args.model),
        num_prompts=num_prompts,
        num_per_prompt=args.num_per_prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        batch_size=args.batch_size,
        seed=source.seed,
    )
    answers.write(model, domains, answered, how)
    del model  # its weights, before those of the training are allocated
    num_tokens = sum(len(tokens) for tokens, _ in answers.read(answered))
    config = training(num_tokens)
    if is_main:
        print(f"answers  {num_prompts * args.num_per_prompt:,}, of {num_tokens:,} tokens with their prompts")
        print(f"training {recipe.trained_share(config)}", flush=True)
    loop.train(config, str(folder))

    results = {"before": before, "after": measure(mtp_jax.load(folder, mesh=mesh, draft_vocabulary=False))}
    if args.draft_vocabulary:
        if is_main:
            counts_V = answers.counts(answered, source.model.vocab_size or 0)
            draft_vocabulary.from_counts(folder, counts_V, args.draft_vocabulary, ends)
        multihost_utils.sync_global_devices("the draft vocabulary is written")
        results[f"after, {args.draft_vocabulary:,} tokens"] = measure(mtp_jax.load(folder, mesh=mesh))
    if is_main:
        text = table.text(results)
        table.write(folder / RESULT_FILE, {"model": str(args.model), "flags": vars(args), **results})
        print(f"\n{text}\n\n{args.workdir}: the model with its modules, for mtp_jax.load, eval.py and tools.convert")


def _decay(loss: str) -> float:
    """Returns the weights of the papers: 0.6 for cross-entropy (FastMTP), and 1 for total variation (Bebop)."""
    return 0.6 if loss == "cross_entropy" else 1.0


def command() -> None:
    """Runs the command line of this process: mtp-distill."""
    signals.install()  # before the slow imports
    cli.run(main)


if __name__ == "__main__":
    command()
