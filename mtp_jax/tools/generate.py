"""Generate text with a trained model, and show which tokens were accepted drafts.

    python -m mtp_jax.tools.generate --model=DIR "def fib("
    python -m mtp_jax.tools.generate --model=DIR --chat "Name a prime." --temperature=0.7

DIR is a workdir of train.py or a Hugging Face folder. The text appears as it is generated. Accepted drafts, which took
no forward pass of the model of their own, are underlined in a terminal; --mark=brackets puts them in [ ] instead.
"""

import argparse
import sys
import time

from mtp_jax import cli, signals, storage
from mtp_jax.config import UserError

UNDERLINE, BRACKETS, NOTHING = ("\033[4m", "\033[24m"), ("[", "]"), ("", "")


def main(argv: list[str]) -> None:
    flags = cli.parser(__doc__ or "", cli.EXIT_CODES)
    flags.add_argument("--model", "--workdir", required=True, help="a workdir of train.py, or a Hugging Face folder")
    flags.add_argument("prompt", help="the text to continue; -: standard input")
    flags.add_argument("--chat", action="store_true", help="answer the prompt, by the model's chat template")
    flags.add_argument("--max_new_tokens", type=int, default=256, help="default 256")
    flags.add_argument(
        "--num_speculative_tokens", type=int, help="drafts per forward pass, 0: none; default: as trained"
    )
    flags.add_argument("--temperature", type=float, default=0.0, help="default 0, which is greedy")
    flags.add_argument("--top_k", type=int, help="sample from so many of the likeliest tokens")
    flags.add_argument("--top_p", type=float, help="sample from the likeliest tokens that have this mass")
    flags.add_argument("--seed", type=int, default=0, help="of the samples; default 0")
    flags.add_argument("--mark", choices=["underline", "brackets", "nothing"], help="default: underline in a terminal")
    args, overrides = cli.parse(flags, argv)
    if overrides:
        raise UserError(f"{overrides[0]}: generate takes the config of the model")
    storage.path(args.model, "--model")
    run(args, sys.stdin.read() if args.prompt == "-" else args.prompt)


def run(args: argparse.Namespace, prompt: str) -> None:
    """Prints the text of a prompt, and a line on the forward passes that it took."""
    import mtp_jax
    from mtp_jax.language_model import streaming

    model = mtp_jax.load(args.model)
    ids = model.chat_ids([{"role": "user", "content": prompt}]) if args.chat else model.prompt_ids(prompt)[0]
    pieces = streaming.stream(
        model,
        ids,
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        num_speculative_tokens=args.num_speculative_tokens,
        seed=args.seed,
    )
    opens, closes = _marks(args.mark)
    print("" if args.chat else prompt, end="", flush=True)
    num_tokens = num_drafted = num_steps = 0
    started = time.monotonic()
    for n, piece in enumerate(pieces):
        if n == 0:
            started, first = time.monotonic(), piece.num_tokens  # without compilation
        marked = piece.is_drafted and piece.text
        print(f"{opens}{piece.text}{closes}" if marked else piece.text, end="", flush=True)
        num_tokens, num_steps = num_tokens + piece.num_tokens, num_steps + piece.ends_step
        num_drafted += piece.num_tokens * piece.is_drafted
    seconds = time.monotonic() - started
    rate = f", {(num_tokens - first) / seconds:,.0f} tokens/s" if num_tokens > first and seconds else ""
    print(
        f"\n\n{num_tokens} tokens in {num_steps} forward passes ({num_tokens / max(1, num_steps):.2f} each), "
        f"{num_drafted} of them accepted drafts{rate}"
    )


def _marks(name: str | None) -> tuple[str, str]:
    if name is None:
        name = "underline" if sys.stdout.isatty() else "nothing"
    return {"underline": UNDERLINE, "brackets": BRACKETS, "nothing": NOTHING}[name]


def command() -> None:
    """Runs the command line of this process: mtp-generate."""
    signals.install()  # before the slow imports
    cli.run(main)


if __name__ == "__main__":
    command()
