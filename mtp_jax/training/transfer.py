"""Starting a run from another run's weights (`init_from`): the main model must match, MTP modules may be new."""

import pathlib
from typing import Any

import jax

from mtp_jax.config import UserError
from mtp_jax.training.checkpoint import Checkpoints
from mtp_jax.training.workdir import CHECKPOINTS

Tree = dict[str, Any]

MODEL_PARTS = ("params", "biases")  # of the state: what makes the model, without optimizer and step


def check_source(workdir: str, abstract_state: Tree) -> None:
    """Whether `load_from` will be able to start from `workdir`.

    Raises:
      UserError: no checkpoints there, or a main model of another shape, with the first weight that differs.
    """
    with _open(workdir) as saved:
        there = saved.saved_part(MODEL_PARTS)
    if there is None:
        raise UserError(f"init_from={workdir}: has no checkpoint that can be read; give the workdir of a trained run")
    problem = _misfit(there, abstract_state, "trunk")
    if problem:
        raise UserError(f"init_from={workdir}: its main model is another one: {problem}")


def load_from(workdir: str, state: Tree, abstract_state: Tree) -> tuple[Tree, str]:
    """`state` with the weights and router biases of `workdir`'s newest sound checkpoint.

    Every weight of the main model must be there in its shape (`check_source`). The MTP modules are taken over where
    all of them fit and keep their fresh weights otherwise: that is how heads are bolted on to a trained model.

    Returns:
      the new state, and a line that says what was taken.
    """
    with _open(workdir) as saved:
        there = saved.saved_part(MODEL_PARTS) or {}
        takes_mtp = "mtp" in state["params"] and _misfit(there, abstract_state, "mtp") is None
        parts = ("trunk", "mtp") if takes_mtp else ("trunk",)
        wanted = {
            name: {p: abstract_state[name][p] for p in parts if p in abstract_state[name]} for name in MODEL_PARTS
        }
        step, loaded = saved.restore_part(None, {name: tree for name, tree in wanted.items() if tree})
    merged = {name: {**state[name], **loaded.get(name, {})} for name in MODEL_PARTS}
    fresh = "" if takes_mtp or "mtp" not in state["params"] else "; the MTP modules start fresh"
    return {**state, **merged}, f"{' and '.join(parts)} of {workdir}, step {step}{fresh}"


def _open(workdir: str) -> Checkpoints:
    folder = pathlib.Path(workdir) / CHECKPOINTS
    if not folder.is_dir():
        raise UserError(f"init_from={workdir}: has no {CHECKPOINTS}/ folder; give the workdir of a trained run")
    return Checkpoints(folder)


def _misfit(there: Tree, wanted: Tree, part: str) -> str | None:
    """The first weight of `part` that is missing there or has another shape; None if all fit."""
    for kind in MODEL_PARTS:
        saved = _shapes(there.get(kind, {}).get(part, {}))
        for name, shape in _shapes(wanted[kind].get(part, {})).items():
            if saved.get(name) != shape:
                has = f"is {saved[name]}" if name in saved else "is not there"
                hint = "; set mtp.parameter_matched=false" if "blocks" in name and name in saved else ""
                return f"{part}.{name} {has}, this run's is {shape}{hint}"
    return None


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(str(key.key) for key in path): tuple(leaf.shape) for path, leaf in leaves}
