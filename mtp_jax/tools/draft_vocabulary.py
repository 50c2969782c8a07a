"""Choice of a draft vocabulary: the most frequent tokens of texts, to which drafts are restricted.

    python -m mtp_jax.tools.draft_vocabulary --model=DIR --files='GLOB' --size=N [--config.data.KEY=VALUE ...]
    python -m mtp_jax.tools.draft_vocabulary --model=DIR --size=0      # drafts of the whole vocabulary again

DIR is a workdir or a Hugging Face folder. The tokens of the texts are counted with the model's own tokenizer; of chats
and prompts, those of the answers. draft_vocabulary.json is written to hf/ of a workdir, or to the Hugging Face folder.
mtp_jax.load and eval.py then draft from it: drafts are cheaper and may be accepted less often; texts do not change.

--files sets data.files of train.py. Other keys of the source have the same names as there:
--config.data.records=chat, --config.data.text_field=content, or --config.data.source=hf:NAME instead of --files.
Exit codes: 0 done, 1 failed, 2 unusable arguments or files.
"""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from mtp_jax import cli
from mtp_jax.config import Config, DataConfig, UserError
from mtp_jax.config.load import override
from mtp_jax.mtp import kind_of

if TYPE_CHECKING:
    from mtp_jax.data import Tokenizer
    from mtp_jax.data.store import TokenStore

_PART = 2**24  # tokens that are counted at one time


def main(argv: list[str]) -> None:
    flags = cli.parser(__doc__ or "")
    flags.add_argument("--model", required=True, help="a workdir or a Hugging Face folder")
    flags.add_argument("--files", default="", help="comma-separated globs or URLs of texts, as data.files")
    flags.add_argument("--size", type=int, required=True, help="number of tokens that may be drafted; 0: all")
    flags.add_argument("--ignore", default="", help="comma-separated fields of config.json that do not matter")
    args, overrides = cli.parse(flags, argv)

    from mtp_jax import data
    from mtp_jax.language_model import draft_vocabulary
    from mtp_jax.language_model.loading import read_info

    info = read_info(args.model, tuple(name for name in args.ignore.split(",") if name))
    if args.size == 0:
        if args.files:
            raise UserError(f"--files={args.files}: is not read with --size=0, which removes the file; leave it out")
        is_removed = draft_vocabulary.remove(args.model)
        print(f"{args.model}: {draft_vocabulary.FILE} {'removed' if is_removed else 'is not there'}; drafts from all")
        return
    vocab_size = info.config.model.vocab_size or 0
    draft_vocabulary.check_size(args.size, vocab_size, info.end_tokens, "--size")
    if info.tokenizer is None:
        raise UserError(f"--model={args.model}: has no tokenizer.json, so no text can be read; put it into the folder")
    config = _config(info.config, args.files, overrides)
    counts_V = count(data.tokenise(config), info.tokenizer, vocab_size)
    made = draft_vocabulary.from_counts(args.model, counts_V, args.size, info.end_tokens)
    print(
        f"{draft_vocabulary.folder_of(args.model) / draft_vocabulary.FILE}: {len(made.ids):,} of {vocab_size:,} tokens "
        f"cover {made.coverage:.2%} of {made.num_tokens_counted:,} counted tokens; "
        f"a draft reads {len(made.ids) / vocab_size:.1%} of the output head"
    )
    if kind_of(info.config).max_drafts == 0:
        print("note: the model has no multi-token prediction to draft with, so the file has no effect yet")


def _config(model: Config, files: str, overrides: list[str]) -> Config:
    """Returns the config of the texts: the model's tokenizer and template, and the source of the command line.

    Raises:
      UserError: no texts, or an override outside the section data.
    """
    for text in overrides:
        if not text.startswith("--config.data."):
            raise UserError(f"{text}: is no key of the texts; only --config.data.KEY=VALUE has an effect")
    own = model.data
    source = DataConfig(
        source="text_files",
        files=files,
        tokenizer=own.tokenizer,
        chat_template=own.chat_template,
        cache_dir=own.cache_dir,
        tfds_dir=own.tfds_dir,
    )
    config = override(dataclasses.replace(model, data=source), overrides)
    if config.data.mixture:
        raise UserError("--config.data.mixture: is not counted; give the files of one source with --files")
    if config.data.tokenizer != own.tokenizer:
        raise UserError(
            f"--config.data.tokenizer={config.data.tokenizer}: is not the model's {own.tokenizer}; leave it out"
        )
    if config.data.source == "text_files" and not config.data.files:
        raise UserError("--files: is empty; give globs of texts, as in --files='texts/**/*.txt'")
    if files and config.data.source != "text_files":
        raise UserError(f"--files={files}: of no effect with data.source={config.data.source}; leave one of them out")
    return config


def count(store: "TokenStore", tokenizer: "Tokenizer", vocab_size: int) -> np.ndarray:
    """Returns how often each token is a target of the loss, int64[vocab_size].

    Tokens without a loss and the bos before a text are not counted: a model never has to predict them.

    Args:
      store: tokens of the texts.
      tokenizer: that of the texts.
      vocab_size: V of the model.
    """
    counts_V = np.zeros(vocab_size, np.int64)
    for start in range(0, len(store.tokens), _PART):
        at = slice(start, start + _PART)
        ids = store.tokens[at] if store.weights is None else store.tokens[at][store.weights[at] > 0]
        counts_V += np.bincount(ids, minlength=vocab_size)[:vocab_size]
    if store.has_bos and tokenizer.bos_id is not None and tokenizer.bos_id < vocab_size:
        counts_V[tokenizer.bos_id] -= len(store)
    return counts_V


def command() -> None:
    """Runs the command line of this process: mtp-draft-vocabulary."""
    cli.run(main)


if __name__ == "__main__":
    command()
