"""Import and export of Hugging Face weights.

    python -m mtp_jax.tools.convert import --hf=DIR --workdir=DIR [--family=NAME] [--check[=TEXTFILE]]
    python -m mtp_jax.tools.convert export --workdir=DIR --hf=DIR [--family=NAME] [--dtype=bfloat16]

import writes a workdir for eval.py, mtp_jax.load and training:
    python train.py --config=DIR/config.json --config.init_from=DIR --workdir=OTHER --config.data.source=...
export writes the newest checkpoint. Both hold at most one layer in memory. Until it is complete, the result is in the
same parent folder as .NAME.partial-XXXXXXXX, which remains after a kill -9; NAME is complete or does not exist.
Exit codes: 0 done, 1 failed, 2 unusable arguments or files.
"""

import argparse
import json
import math
import os
import signal
from collections.abc import Iterable

import tqdm
from etils import epath

from mtp_jax import cli, storage
from mtp_jax.config import Config, UserError, to_dict, with_values
from mtp_jax.mtp import NONE, kind_of
from mtp_jax.typing import ReadableArray


def main(argv: list[str]) -> None:
    flags = cli.parser(__doc__ or "")
    actions = flags.add_subparsers(dest="action", required=True, parser_class=type(flags))
    _import_flags(actions.add_parser("import", help="from a Hugging Face folder"))
    _export_flags(actions.add_parser("export", help="to a Hugging Face folder"))
    for action in actions.choices.values():
        action.add_argument("--debug", action="store_true", help=argparse.SUPPRESS, default=argparse.SUPPRESS)
    args, overrides = cli.parse(flags, argv)
    if overrides:
        raise UserError(f"{overrides[0]}: convert takes the config of the folder or workdir")
    (import_ if args.action == "import" else export)(args)


def _import_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--hf", required=True, help="the Hugging Face folder")
    flags.add_argument("--workdir", required=True, help="the folder to make")
    flags.add_argument("--family", help="required family of the folder; default: that of its config.json")
    flags.add_argument("--depth", type=int, choices=[0], help="0: leave the MTP layers out")
    flags.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the checkpoint; default: as the files are")
    flags.add_argument("--ignore", default="", help="comma-separated fields of config.json that do not matter")
    flags.add_argument(
        "--check", nargs="?", const="", metavar="TEXTFILE", help="compare the MTP conventions on a text (default: code)"
    )


def _export_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--workdir", required=True, help="of a run, or of an import")
    flags.add_argument("--hf", required=True, help="the folder to make")
    flags.add_argument("--family", help="layout to write; default: the one that holds the model")
    flags.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as imported, or as trained")
    flags.add_argument("--depth", type=int, choices=[0], help="0: leave the MTP layers or heads out")


def import_(args: argparse.Namespace) -> None:
    """Converts a Hugging Face folder into a workdir with one checkpoint, step 0, of weights only."""
    from flax.traverse_util import flatten_dict

    from mtp_jax.data import find_tokenizer
    from mtp_jax.interop import checkpoint_folder as folder
    from mtp_jax.training import workdir as workdirs
    from mtp_jax.training.checkpoint import CheckpointError, write_streamed

    ignore = tuple(name for name in args.ignore.split(",") if name)
    workdir = storage.path(args.workdir, "--workdir")
    tokenizer = find_tokenizer(storage.path(args.hf, "--hf"))
    storage.refuse_existing(args.workdir)
    model = folder.open_model(args.hf, args.family, ignore, args.depth, args.dtype)
    if args.check is not None:
        _refuse_check(args.check, args.hf, tokenizer is not None, model.config)
    leaves = list(flatten_dict(model.arrays).values())
    num_bytes = sum(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in leaves)
    print(f"{args.hf}: {describe(model.config)}")
    with storage.fresh_folder(args.workdir, num_bytes) as partial, _bar(leaves, "import") as bar:
        folder.save_sides(model, partial)
        try:
            write_streamed(partial / workdirs.CHECKPOINTS, 0, model.arrays, bar.update)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(partial), args.workdir)) from error
        # Set even if the folder has no tokenizer, so that a run fails instead of reading bytes.
        name = "tokenizer.json" if tokenizer is None else tokenizer.name
        config = with_values(model.config, {"data.tokenizer": str(workdir / "hf" / name)})
        text = json.dumps(to_dict(config), indent=2) + "\n"
        storage.write_text(partial / workdirs.CONFIG_FILE, text)
    print(f"{args.workdir}: config.json, checkpoints/0, hf/ (what travels to an export)")
    if tokenizer is None:
        print(f"note: there is no tokenizer.json; set data.tokenizer in {args.workdir}/config.json before its next use")
    if args.check is not None:
        from mtp_jax.evaluation import conventions

        print(conventions.report(args.workdir, args.check))


def _refuse_check(text_file: str, hf: str, has_tokenizer: bool, config: Config) -> None:
    """Refuses a --check that cannot work, before a long import."""
    if not has_tokenizer:
        raise UserError(f"--check: {hf} has no tokenizer.json, so no text can be read; leave --check out")
    if not kind_of(config).depth:
        raise UserError(f"--check: {hf} has no MTP layers to compare conventions of; leave --check out")
    if text_file and not storage.is_file(storage.path(text_file, "--check")):
        raise UserError(f"--check={text_file}: no such file; give a text file")


def export(args: argparse.Namespace) -> None:
    """Writes the newest valid checkpoint as a Hugging Face folder."""
    from flax.traverse_util import flatten_dict

    from mtp_jax.interop import checkpoint_folder as folder
    from mtp_jax.training import workdir as workdirs
    from mtp_jax.training.checkpoint import Checkpoints
    from mtp_jax.training.init_from import MODEL_PARTS

    workdir = storage.path(args.workdir, "--workdir")
    config = workdirs.read_config(workdir)
    with Checkpoints(workdir / workdirs.CHECKPOINTS) as saved:
        if not saved.steps():
            raise UserError(f"--workdir={workdir}: has no checkpoints yet; train it first")
        step, arrays = saved.open_part(MODEL_PARTS)
        if args.depth == 0 and "mtp" in arrays["params"]:
            # A parameter-matched parallel model has fewer main blocks than model.num_layers.
            config = with_values(config, {"model.num_layers": kind_of(config).num_main_layers, "mtp.kind": NONE})
            arrays = {name: {k: v for k, v in tree.items() if k != "mtp"} for name, tree in arrays.items()}
        sides = workdir / folder.SIDE_FOLDER
        with _bar(flatten_dict(arrays).values(), "export") as bar:
            layout, written = folder.write_model(
                args.hf, config, arrays, sides, args.family, args.dtype, _tokenizer_file(config), bar.update
            )
    print(f"{args.hf}: step {step} as {layout} in {written}, {describe(config)}")
    for note in notes(config, layout):
        print(f"note: {note}")


def _tokenizer_file(config: Config) -> epath.Path | None:
    """Returns the tokenizer file of the model's training; None for bytes, or if an import had none."""
    from mtp_jax.data import find_tokenizer

    if config.data.tokenizer == "bytes":
        return None
    path = storage.path(os.path.expanduser(config.data.tokenizer))
    if storage.is_dir(path):
        return find_tokenizer(path)
    return path if storage.is_file(path) else None


def notes(config: Config, layout: str) -> list[str]:
    """Returns remarks for serving the export."""
    from mtp_jax.config import conventions
    from mtp_jax.interop.families import FAMILIES

    out, depth = [], kind_of(config).depth
    if depth and config.model.num_layers not in FAMILIES[layout].ignored_layers:
        out.append(
            f"transformers recognises MTP layers by the layer numbers of released models; in {layout} from layer "
            f"{config.model.num_layers} on it calls them unexpected and ignores them"
        )
    if depth > 1 and conventions(config.mtp).recycled_hidden == "before_norm":
        out.append(
            "serving engines normalise the hidden state between depths, this model was trained without "
            "(mtp.recycled_hidden=before_norm): depths beyond 1 may draft worse there than eval.py reports"
        )
    return out


def describe(config: Config) -> str:
    """Returns the model's size in one line."""
    from mtp_jax.model import count_parameters

    counts, depth = count_parameters(config.architecture), kind_of(config).depth
    extra = f" + {counts.mtp_total / 1e6:,.1f} M in {depth} MTP layer(s)" if depth else ""
    return f"{counts.total / 1e6:,.1f} M parameters{extra}, {config.model.num_layers} layers"


def _bar(leaves: Iterable[ReadableArray], what: str) -> tqdm.tqdm:
    """Progress bar over weights; nothing is shown before the first of them, so that a refusal stays one line."""
    total = sum(math.prod(leaf.shape) for leaf in leaves)
    return tqdm.tqdm(total=total, desc=what, unit=" weights", unit_scale=True, delay=1e-3)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def command() -> None:
    """Runs the command line of this process: mtp-convert."""
    signal.signal(signal.SIGTERM, _stop)  # removes partial results, as Ctrl-C does
    cli.run(main)


if __name__ == "__main__":
    command()
