"""Train a model: python train.py --config=configs/NAME.py --workdir=DIR [--config.section.key=VALUE ...]

Running the same command again continues from the newest checkpoint. Exit codes: 0 done, 1 a failed run, 2 unusable
arguments or config.
"""

import numpy as np

from mtp_jax import cli, config, distributed


def main(argv: list[str]) -> None:
    flags = cli.parser(__doc__)
    flags.add_argument("--config", required=True, help="a Python file with get_config(), as in configs/")
    flags.add_argument("--workdir", required=True, help="where config, metrics and checkpoints go")
    distributed.add_flags(flags)
    args, overrides = cli.parse(flags, argv)
    resolved = config.load_config(args.config, overrides)
    distributed.initialize(args)

    from mtp_jax.training import loop  # jax starts here: a mistake in the arguments is reported before

    report(loop.train(resolved, args.workdir), args.workdir)


def report(run, workdir: str) -> None:
    """The closing table and a sample."""
    import jax

    from mtp_jax.decoding import sampling
    from mtp_jax.evaluation import validation

    training, tokenizer = run.config.training, run.corpus.tokenizer
    is_main = jax.process_index() == 0
    with jax.set_mesh(run.mesh):
        if run.config.data.validation_fraction:
            results = validation.validate(run, training.eval_batches)
            if is_main:
                print(f"\nvalidation, {results[0].num_targets:,} held-out tokens\n{validation.table(results)}")
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        prompt = np.concatenate([bos, tokenizer.encode(training.sample_prompt)]).astype(np.int32)
        if training.sample_tokens and len(prompt):
            params, biases = run.state["params"], run.state["biases"]
            tokens = sampling.sample(run.config, params, biases, prompt, training.sample_tokens, 0.7, run.config.seed)
            if is_main:
                print(f"\nsample, temperature 0.7\n{'-' * 64}\n{tokenizer.decode(tokens)}\n{'-' * 64}")
    if is_main:
        print(f"\n{workdir}: config.json, metrics.jsonl, TensorBoard events, checkpoints/")


if __name__ == "__main__":
    cli.run(main)
