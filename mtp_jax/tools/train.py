"""Train a model: mtp-train --config=NAME --workdir=DIR [--config.section.key=VALUE ...]

In a clone that is not installed: python train.py --config=configs/NAME.py --workdir=DIR ...

Running the same command again continues from the newest checkpoint; --resume_step and --change choose another one, or
other settings. SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C save the state at the end of the current step and end the run; a
second one ends it at once.
"""

import os
from typing import Any

from mtp_jax import cli, signals

SETTINGS = """\
settings that matter most, as --config.KEY=VALUE:
  mtp.kind                      none, sequential, parallel, nextlat or top
  mtp.depth                     number of extra tokens that each position predicts
  mtp.weight                    weight of their loss (lambda)
  mtp.loss                      cross_entropy, tv or end_to_end_tv
  data.source                   python_source, text_files, hf:NAME, or a TFDS dataset
  data.files                    globs of files, for data.source=text_files
  data.tokenizer                bytes, or the path of a tokenizer
  data.sequence_length          tokens per row
  data.batch_size               rows per step, over all devices
  data.packing                  packed, contiguous or whole
  model.num_layers              blocks of the main model
  model.embed_dim               features of a hidden state
  model.num_experts             0: dense
  model.compute_dtype           float32 or bfloat16
  model.remat                   none, dots, kernels or full: less memory, more time
  optimizer.name                adamw or muon
  optimizer.learning_rate       peak of the schedule
  optimizer.schedule            constant, cosine, wsd or deepseek
  training.num_steps            steps of the whole run
  training.log_every            steps from one line of metrics to the next
  training.eval_every           steps from one validation to the next; 0: at the end
  training.grad_accum_steps     micro-batches per step
  checkpoint.every              steps from one checkpoint to the next
  checkpoint.keep               number of checkpoints that are kept
  mesh.data, mesh.fsdp, mesh.expert, mesh.context, mesh.tensor
                                devices along each axis; one may be -1, the rest
  seed                          of weights and data
  init_from                     a workdir or Hugging Face folder to start from
all keys, with defaults and bounds: {schema}
by task: docs/training.md and docs/data.md of the project

"""


def main(argv: list[str]) -> None:
    from mtp_jax import config, distributed

    schema = os.path.join(os.path.dirname(config.__file__), "schema.py")
    flags = cli.parser(__doc__, SETTINGS.format(schema=schema) + cli.EXIT_CODES)
    config.shipped.add_flag(flags)
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
        print("\n".join(["next:", *next_commands(run.config, workdir)]))


def next_commands(config: Any, workdir: str) -> list[str]:
    """Returns command lines for a trained model, in the form that this command was given: mtp-NAME, or python -m."""
    import shlex
    import sys

    from mtp_jax.mtp import kind_of

    tasks = "loss,acceptance,speculative" if kind_of(config).max_drafts != 0 else "loss"
    is_script = os.path.basename(sys.argv[0]).startswith("mtp-")
    python = sys.executable.removeprefix(f"{os.getcwd()}{os.sep}")  # .venv/bin/python in a clone
    prefix = "mtp-" if is_script else f"{shlex.quote(python)} -m mtp_jax.tools."
    lines = [f"eval --tasks={tasks}", "generate 'def fib('", "report"]
    return [f"  {prefix}{line} --workdir={shlex.quote(workdir)}" for line in lines]


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


def command() -> None:
    """Runs the command line of this process: mtp-train, or train.py of a clone."""
    signals.install()  # before the slow imports
    cli.run(main)


if __name__ == "__main__":
    command()
