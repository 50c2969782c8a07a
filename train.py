"""Train a model: python train.py --config=configs/NAME.py --workdir=DIR [--config.section.key=VALUE ...]

Running the same command again continues from the newest checkpoint; --resume_step and --change choose another one, or
other settings. SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C save the state at the end of the current step and end the run; a
second one ends it at once.
"""

from mtp_jax import cli, signals


def main(argv: list[str]) -> None:
    from mtp_jax import config, distributed

    flags = cli.parser(__doc__, cli.EXIT_CODES)
    flags.add_argument("--config", required=True, help="a Python file with get_config(), as in configs/")
    flags.add_argument("--workdir", required=True, help="where config, metrics and checkpoints go")
    flags.add_argument(
        "--resume_step", type=int, metavar="N", help="continue from this checkpoint, not the newest; 0: start over"
    )
    flags.add_argument(
        "--change",
        action="append",
        default=[],
        metavar="KEY",
        help="a setting that a continued run may change, such as optimizer.learning_rate; may be given several times",
    )
    distributed.add_flags(flags)
    args, overrides = cli.parse(flags, argv)
    resolved = config.load_config(args.config, overrides)
    distributed.initialize(args)

    from mtp_jax.training import loop  # imports jax: errors in the arguments are reported before

    resume = loop.Resume(args.resume_step, tuple(args.change))
    report(loop.train(resolved, args.workdir, resume, loop.process_start()), args.workdir)


def report(run, workdir: str) -> None:
    """Prints the final validation table and a sample."""
    import jax

    from mtp_jax.evaluation import validation

    is_main = jax.process_index() == 0
    if run.corpus.validation_sets:
        with jax.set_mesh(run.mesh):
            results = validation.validate(run, run.state, run.config.training.eval_batches)
        if is_main:
            print(f"\n{validation.tables(results, 'validation')}")
    sample(run, is_main)
    if is_main:
        print(f"\n{workdir}: config.json, metrics.jsonl, TensorBoard events, checkpoints/")


def sample(run, is_main: bool) -> None:
    """Prints a text of training.sample_tokens tokens, drafted by the extra depths if there are any."""
    import numpy as np

    from mtp_jax.decoding import generator, samplers
    from mtp_jax.mtp import kind_of

    config, tokenizer = run.config, run.corpus.tokenizer
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    prompt = np.concatenate([bos, tokenizer.encode(config.training.sample_prompt)]).astype(np.int32)
    prompt = prompt[: config.data.sequence_length // 2]  # the rest of the context is for the sample
    if not config.training.sample_tokens or not len(prompt):
        return
    kind = kind_of(config)
    num_speculative_tokens = min(kind.depth, kind.max_drafts) if kind.max_drafts is not None else kind.depth
    writer = generator.Generator(config, run.state["params"], run.state["biases"], run.mesh)
    out = writer.generate(
        [prompt],
        config.training.sample_tokens,
        sampler=samplers.make_sampler(0.7),
        num_speculative_tokens=num_speculative_tokens,
        seed=config.seed,
        stop_tokens=[] if tokenizer.eos_id is None else [tokenizer.eos_id],
    )
    if is_main:
        passes = f", {out.tokens_per_forward:.2f} tokens per forward pass" if num_speculative_tokens else ""
        text = tokenizer.decode(np.concatenate([prompt, out.tokens[0]]))
        print(f"\nsample, temperature 0.7{passes}\n{'-' * 64}\n{text}\n{'-' * 64}")


if __name__ == "__main__":
    signals.install()  # before the slow imports
    cli.run(main)
