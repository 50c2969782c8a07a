"""Runs loaded from their folders: config.json, metrics.jsonl, eval.json and a sweep's record."""

import functools
import os
import pathlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from etils import epath

from mtp_jax import storage
from mtp_jax.config import Config, UserError, from_dict, renamed
from mtp_jax.errors import short
from mtp_jax.mtp import reads
from mtp_jax.storage import read_json
from mtp_jax.tools.sweeping.run_folder import EVAL_FILE, SWEEP_FILE, read_record
from mtp_jax.training.metrics import METRICS_FILE, read_metrics
from mtp_jax.training.workdir import CHECKPOINTS, CONFIG_FILE, flat
from mtp_jax.typing import JsonObject

Rows = list[JsonObject]


@dataclass(frozen=True, eq=False)
class Run:
    """A run.

    rows: the lines of metrics.jsonl; empty before the first logged step.
    config: nested values of config.json, or else of the sweep's record; None if neither exists.
    evaluation: the contents of eval.json.
    error: the line with which the run failed in a sweep; "" if it did not.
    """

    name: str
    path: epath.Path
    rows: Rows
    config: JsonObject | None = None
    evaluation: JsonObject = field(default_factory=dict)
    error: str = ""

    @functools.cached_property
    def settings(self) -> JsonObject:
        """Config keys that apply to this run, with their values; those of unused MTP kinds are left out."""
        if self.config is None:
            return {}
        values = {k: v for k, v in flat(renamed(self.config)).items() if (k, v) != ("model.vocab_size", None)}
        return {k: v for k, v in values.items() if reads(values.get("mtp.kind", ""), k)}

    @property
    def seed(self) -> int | None:
        return self.settings.get("seed")

    @property
    def is_finished(self) -> bool:
        """True if the config's last step was logged; for a run without a config, if any step was."""
        num_steps = self.settings.get("training.num_steps", 0)
        return bool(self.rows) and self.rows[-1]["step"] >= num_steps

    @property
    def state(self) -> str:
        """`done`, `not started`, `at step N of M` or `failed: ERROR`."""
        if self.error:
            return f"failed: {self.error}"
        if not self.rows:
            return "not started"
        if not self.is_finished:
            return f"at step {self.rows[-1]['step']} of {self.settings['training.num_steps']}"
        return "done"

    def results(self) -> JsonObject:
        """Returns the evaluation if it is of the run's last step, else {}."""
        if not self.is_finished or self.evaluation.get("step", self.rows[-1]["step"]) != self.rows[-1]["step"]:
            return {}
        return self.evaluation

    def resolved(self) -> Config | None:
        """Returns the resolved config; None if it is missing, not yet complete, or refused by this version of the
        package."""
        if self.settings.get("model.vocab_size") is None:
            return None
        try:
            return from_dict(self.config or {}, str(self.path / CONFIG_FILE))
        except UserError:
            return None


def load_runs(workdirs: Iterable[str], sweeps: Iterable[str] = ()) -> list[Run]:
    """Loads the runs in `workdirs`, each of which must have metrics, and all runs below `sweeps`, in any state.

    Names are the shortest unique ends of the paths (`short_names`).

    Raises:
      UserError: a workdir does not exist or has no metrics, a sweep has no runs, or a file cannot be read.
    """
    paths: dict[str, tuple[epath.Path, str]] = {}  # resolved folder -> (path, flag) as given
    for workdir in workdirs:
        _check_workdir(workdir)
        path = storage.path(workdir, "--workdir")
        paths.setdefault(_resolved(path), (path, f"--workdir={workdir}"))
    for sweep in sweeps:
        found = find_runs(sweep)
        if not found:
            raise UserError(f"--sweep={sweep}: no run in it or below it")
        for path in found:
            paths.setdefault(_resolved(path), (path, f"--sweep={sweep}"))
    names = short_names(list(paths))
    return [_load(path, name, flag) for (path, flag), name in zip(paths.values(), names, strict=True)]


def _resolved(path: epath.Path) -> str:
    return os.path.realpath(path) if storage.is_local(path) else os.fspath(path)


def find_runs(root: str) -> list[epath.Path]:
    """Returns the folders of runs in and below `root`, sorted by name; folders inside a run are not searched.

    Raises:
      UserError: `root` does not exist.
    """
    folder = storage.path(root, "--sweep")
    if not storage.is_dir(folder):
        raise UserError(f"--sweep={root}: no such folder")
    return _runs_below(folder)


def _runs_below(folder: epath.Path) -> list[epath.Path]:
    names = storage.names(folder)
    if {METRICS_FILE, SWEEP_FILE} & set(names):
        return [folder]
    below = [folder / name for name in names if name != CHECKPOINTS]
    return [run for path in below if storage.is_dir(path) and not os.path.islink(path) for run in _runs_below(path)]


def _check_workdir(workdir: str) -> None:
    path = storage.path(workdir, "--workdir")
    if not storage.is_dir(path):
        raise UserError(f"--workdir={workdir}: no such folder")
    if not storage.is_file(path / METRICS_FILE):
        below = any(storage.is_file(path / name / METRICS_FILE) for name in storage.names(path))
        remedy = f"give the folder of a run, or --sweep={workdir}" if below else "give the folder of a run"
        raise UserError(f"--workdir={workdir}: has no {METRICS_FILE}; {remedy}")


def _load(path: epath.Path, name: str, flag: str) -> Run:
    metrics = path / METRICS_FILE
    try:
        rows = read_metrics(metrics) if storage.is_file(metrics) else []
        record = read_record(path)
        config = _read_json(path / CONFIG_FILE) or record.get("config")
        evaluation = _read_json(path / EVAL_FILE) or {}
    except ValueError as error:
        raise UserError(str(error)) from error
    if not rows and flag.startswith("--workdir"):
        is_empty = not storage.size(metrics)
        problem = "is empty; the run has logged nothing yet" if is_empty else "has no line that can be read; restore it"
        raise UserError(f"{flag}: its {METRICS_FILE} {problem}")
    _check_types(path, rows, config)
    return Run(name, path, rows, config, evaluation, record.get("error", ""))


def _check_types(path: epath.Path, rows: Rows, config: Any) -> None:
    """Raises UserError for metrics that are not numbers, and a config that is not made of sections."""
    for row in rows:
        for key, value in row.items():
            if value is not None and not isinstance(value, (int, float)):
                shown = f"{path / METRICS_FILE}: step {row['step']}: {key}={short(value)}"
                raise UserError(f"{shown} is not a number; correct the line or remove it")
    problem = None
    if config is not None and not isinstance(config, dict):
        problem = f"holds a {type(config).__name__} as its config"
    elif config:
        training = config.get("training", {})
        steps = training.get("num_steps", 0) if isinstance(training, dict) else training
        if not isinstance(training, dict) or type(steps) is not int:
            problem = f"has training.num_steps={short(steps)}, which is not an integer"
    if problem:
        file = CONFIG_FILE if storage.is_file(path / CONFIG_FILE) else SWEEP_FILE
        raise UserError(f"{path / file}: {problem}; write it again, or remove it")


def _read_json(path: epath.Path) -> JsonObject | None:
    return read_json(path, "write it again, or remove it") if storage.is_file(path) else None


def short_names(paths: list[str]) -> list[str]:
    """Returns the shortest ends of the paths, all with the same number of parts, that are unique."""
    parts = [pathlib.PurePath(_resolved(storage.path(p))).parts for p in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return paths
