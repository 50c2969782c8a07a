"""Initialization of a run from trained weights (`init_from`): a workdir, or a Hugging Face folder read directly into
the shards of the mesh. The main model must match; MTP modules may be new.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict

from mtp_jax import storage
from mtp_jax.config import Config, UserError, conventions, walk
from mtp_jax.interop import checkpoint_folder as hf_folder
from mtp_jax.interop.weights import place
from mtp_jax.mtp import kind_of
from mtp_jax.training.checkpoint import Checkpoints
from mtp_jax.training.workdir import CHECKPOINTS, CONFIG_FILE, read_config

Tree = dict[str, Any]

MODEL_PARTS = ("params", "biases")  # of the state: the model, without optimizer and step


class Source(NamedTuple):
    """Weights to start from.

    Attributes:
      config: config of their model; None if unknown.
      shapes: `MODEL_PARTS` as nested dicts of leaves with shape and dtype.
      read: maps ShapeDtypeStructs with shardings, of some of the leaves, to (a description of the source, jax arrays).
    """

    config: Config | None
    shapes: Tree
    read: Callable[[Tree], tuple[str, Tree]]


def check_source(path: str, abstract_state: Tree) -> None:
    """Checks that `load_from` can start from `path`.

    Raises:
      UserError: `path` has no weights, or its main model has other shapes; names the first weight that differs.
    """
    with _opened(path) as source:
        problem = _misfit(source.shapes, abstract_state, "trunk")
    if problem:
        raise UserError(f"init_from={path}: its main model is another one: {problem}")


def load_from(path: str, config: Config, state: Tree, abstract_state: Tree) -> tuple[Tree, str]:
    """Returns `state` with the weights and router biases of `path`.

    `path` is a workdir, whose newest valid checkpoint is read, or a Hugging Face folder.

    Every weight of the main model must be present in its shape (`check_source`). The MTP modules are loaded if all of
    them fit and keep their fresh weights otherwise, so that heads can be added to a trained model. Of the MTP weights,
    those of `Kind.optional_weights` that the source lacks keep their fresh values, and the others are loaded.

    Returns:
      The new state, and lines that state what was loaded and which settings differ from those of the weights.
    """
    with _opened(path) as source:
        added = _added(source.shapes, state, kind_of(config).optional_weights)
        wanted = {name: _without(abstract_state[name], added) for name in MODEL_PARTS}
        takes_mtp = "mtp" in state["params"] and _misfit(source.shapes, wanted, "mtp") is None
        parts = ("trunk", "mtp") if takes_mtp else ("trunk",)
        wanted = {name: {p: tree[p] for p in parts if p in tree} for name, tree in wanted.items()}
        name, loaded = source.read({name: tree for name, tree in wanted.items() if tree})
        differences = _differences(source.config, config, takes_mtp)
        taken = f"{'decoder and MTP modules' if takes_mtp else 'decoder'} of {name}"
    merged = {
        name: {part: {**tree, **loaded.get(name, {}).get(part, {})} for part, tree in state[name].items()}
        for name in MODEL_PARTS
    }
    fresh = ""
    if "mtp" in state["params"] and not takes_mtp:
        fresh = "; the MTP modules start fresh"
    elif added:
        fresh = f"; of the MTP modules, {', '.join(added)} starts fresh"
    return {**state, **merged}, "\n         ".join([taken + fresh, *differences])


def copy_sides(path: str, workdir: str) -> None:
    """Copies the side files of an imported model (tokenizer, config.json of its family) to a workdir that has none."""
    if storage.names(storage.path(workdir) / hf_folder.SIDE_FOLDER):
        return
    if hf_folder.is_hf_folder(path):
        model = hf_folder.open_model(path, is_checked=True)
        hf_folder.save_sides(model, workdir)
    else:
        hf_folder.save_sides(storage.path(path) / hf_folder.SIDE_FOLDER, workdir)


@contextmanager
def _opened(path: str) -> Iterator[Source]:
    if hf_folder.is_hf_folder(path):
        model = hf_folder.open_model(path)
        yield Source(model.config, model.arrays, lambda wanted: (path, place(model.arrays, wanted)))
        return
    checkpoints = storage.path(path, "init_from") / CHECKPOINTS
    if not storage.is_dir(checkpoints):
        raise UserError(
            f"init_from={path}: has no {CHECKPOINTS}/ folder and is no Hugging Face folder; give the workdir of a "
            "trained run, or a folder with config.json and safetensors"
        )
    config = read_config(path) if storage.is_file(storage.path(path) / CONFIG_FILE) else None
    with Checkpoints(checkpoints) as saved:
        shapes = saved.saved_part(MODEL_PARTS)
        if shapes is None:
            raise UserError(f"init_from={path}: has no checkpoint that can be read; give the workdir of a trained run")

        def read(wanted: Tree) -> tuple[str, Tree]:
            step, loaded = saved.restore_part(None, wanted)
            return f"{path}, step {step}", loaded

        yield Source(config, shapes, read)


def _differences(source: Config | None, run: Config, takes_mtp: bool) -> list[str]:
    """Returns the settings that decide what the weights compute and do not show in their shapes."""
    if source is None:
        return []
    old = {key: value for key, value, _ in walk(source.model)}
    pairs = [(f"model.{k}", old[k], value) for k, value, setting in walk(run.model) if setting.may_change == "never"]
    if takes_mtp:
        was, now = (dataclasses.asdict(conventions(c.mtp)) for c in (source, run))
        pairs += [(f"mtp.{key}", was[key], now[key]) for key in was]
    return [f"{key} is {now!r} in this run and was {was!r} in the source" for key, was, now in pairs if was != now]


def _added(available: Tree, state: Tree, optional: Sequence[str]) -> list[str]:
    """Returns the names below "mtp" that this run has, the source lacks, and the MTP kind declares as optional."""
    saved = available.get("params", {}).get("mtp", {})
    return [name for name in optional if name in state["params"].get("mtp", {}) and name not in saved]


def _without(tree: Tree, names: Sequence[str]) -> Tree:
    """Returns params or biases without the weights of these names below "mtp"."""
    if "mtp" not in tree:
        return tree
    return {**tree, "mtp": {name: leaf for name, leaf in tree["mtp"].items() if name not in names}}


def _misfit(available: Tree, wanted: Tree, part: str) -> str | None:
    """Returns the first weight of `part` that is missing in `available` or has another shape; None if all fit."""
    for kind in MODEL_PARTS:
        saved = _shapes(available.get(kind, {}).get(part, {}))
        for name, shape in _shapes(wanted[kind].get(part, {})).items():
            if saved.get(name) != shape:
                has = f"is {saved[name]}" if name in saved else "is missing"
                hint = "; set mtp.parameter_matched=false" if "blocks" in name and name in saved else ""
                return f"{part}.{name} {has}, this run's is {shape}{hint}"
    return None


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in flatten_dict(tree, sep=".").items()}
