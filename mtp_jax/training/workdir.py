"""A run's folder: its config.json, and whether a run may continue in it.

A workdir holds config.json (the resolved config), metrics.jsonl, TensorBoard events and checkpoints/. Every process
of the run must see it under the same path.
"""

import json
import os
import pathlib
from typing import Any

from mtp_jax.config import Config, UserError, from_dict, to_dict, with_own_tokenizer

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"

# What may differ between a run and its continuation: nothing here changes what a given step computes, except that
# num_steps stretches the schedules.
FREE_KEYS = (
    *("training.num_steps", "training.log_every", "training.eval_batches", "training.sample_", "training.loss_chunk"),
    *("model.remat", "model.moe_dispatch", "model.attention_kernel", "model.expert_kernel", "model.scan_unroll"),
    *("checkpoint.", "mesh.", "data.num_workers", "data.prefetch", "data.cache_dir"),
)


def open_workdir(workdir: str | os.PathLike[str], config: Config, is_main: bool = True) -> None:
    """Make `workdir` this run's: write config.json, or check that the one there belongs to the same run.

    Args:
      config: the resolved config. A continued run may change the keys of FREE_KEYS, and config.json follows.
      is_main: whether this process writes; the others only check.

    Raises:
      UserError: `workdir` is a file or cannot be written; its config.json is broken, or missing beside checkpoints; or
        it is of another run, with the keys that differ and both values.
    """
    path = pathlib.Path(workdir)
    if path.exists() and not path.is_dir():
        raise UserError(f"--workdir={workdir}: is a file; give a folder")
    has_config = (path / CONFIG_FILE).exists()
    changed = changes(config, workdir) if has_config else []
    if not is_main:
        return
    if changed:
        print(f"continuing with {', '.join(changed)}")
    if not has_config and any(p.name.isdigit() for p in (path / CHECKPOINTS).glob("*")):
        raise UserError(
            f"--workdir={workdir}: has checkpoints but no {CONFIG_FILE}, so the run they belong to is unknown; "
            "restore the file or use another folder"
        )
    _write(path, json.dumps(to_dict(config), indent=2) + "\n")


def read_config(workdir: str | os.PathLike[str]) -> Config:
    """The config of the run in `workdir`.

    Raises:
      UserError: no such folder, no config.json, or one that is not JSON or not a config.
    """
    path = pathlib.Path(workdir) / CONFIG_FILE
    if not path.parent.is_dir():
        raise UserError(f"--workdir={workdir}: no such folder")
    if not path.is_file():
        raise UserError(f"--workdir={workdir}: has no {CONFIG_FILE}; give the folder of a run")
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); restore it or use another --workdir") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a config, which is a JSON object; restore it or use another --workdir")
    if "model_type" in values:
        raise UserError(f"{path.parent}: is a Hugging Face folder; import it first (mtp_jax.tools.convert import)")
    return from_dict(with_own_tokenizer(values, path.parent), str(path))


def changes(config: Config, workdir: str | os.PathLike[str]) -> list[str]:
    """What `config` changes in the run in `workdir`, as `key old -> new`.

    Raises:
      UserError: its config.json cannot be used, or is of another run: a key differs that may not.
    """
    old, new = flat(to_dict(read_config(workdir))), flat(to_dict(config))
    differing = [key for key in old if old[key] != new[key]]
    bound = [key for key in differing if not key.startswith(FREE_KEYS)]
    if bound:
        shown = ", ".join(f"{key} was {old[key]!r} and is {new[key]!r}" for key in bound)
        raise UserError(f"--workdir={workdir}: holds another run: {shown}; set them back or use another folder")
    return [f"{key} {old[key]!r} -> {new[key]!r}" for key in differing]


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values of a config as `section.key` -> value."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def _write(path: pathlib.Path, text: str) -> None:
    """Replace config.json as a whole, so that a kill leaves the old one or the new one."""
    partial = path / f".{CONFIG_FILE}.partial"
    try:
        path.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        os.replace(partial, path / CONFIG_FILE)
    except OSError as error:
        raise UserError(f"--workdir={path}: cannot be written ({error.strerror}); use another folder") from error
