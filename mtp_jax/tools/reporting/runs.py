"""Runs as they lie in their folders: config.json, metrics.jsonl, eval.json, and what a sweep wrote of them."""

import functools
import os
import pathlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from mtp_jax.config import Config, UserError, from_dict, renamed
from mtp_jax.files import read_json
from mtp_jax.mtp import reads
from mtp_jax.tools.sweeping.run_folder import EVAL_FILE, SWEEP_FILE, read_record
from mtp_jax.training.metrics import METRICS_FILE, read_metrics
from mtp_jax.training.workdir import CHECKPOINTS, CONFIG_FILE, flat
from mtp_jax.typing import JsonObject

Rows = list[JsonObject]


@dataclass(frozen=True, eq=False)
class Run:
    """One run.

    rows: the lines of metrics.jsonl, none before the first logged step.
    config: nested values of config.json, or those a sweep means to run; None where neither is there.
    evaluation: what eval.py wrote to eval.json.
    error: the line it failed with in a sweep.
    """

    name: str
    path: pathlib.Path
    rows: Rows
    config: JsonObject | None = None
    evaluation: JsonObject = field(default_factory=dict)
    error: str = ""

    @functools.cached_property
    def settings(self) -> JsonObject:
        """The config's keys that mean something for this run: those of an MTP kind that is not in use do not."""
        if self.config is None:
            return {}
        values = {k: v for k, v in flat(renamed(self.config)).items() if (k, v) != ("model.vocab_size", None)}
        return {k: v for k, v in values.items() if reads(values.get("mtp.kind", ""), k)}

    @property
    def seed(self) -> int | None:
        return self.settings.get("seed")

    @property
    def is_finished(self) -> bool:
        """Whether the config's last step was logged; a run without a config is taken as it is."""
        num_steps = self.settings.get("training.num_steps", 0)
        return bool(self.rows) and self.rows[-1]["step"] >= num_steps

    @property
    def state(self) -> str:
        """`done`, or how far it has come."""
        if self.error:
            return f"failed: {self.error}"
        if not self.rows:
            return "not started"
        if not self.is_finished:
            return f"at step {self.rows[-1]['step']} of {self.settings['training.num_steps']}"
        return "done"

    def results(self) -> JsonObject:
        """The evaluation, if it is of the run's last step."""
        if not self.is_finished or self.evaluation.get("step", self.rows[-1]["step"]) != self.rows[-1]["step"]:
            return {}
        return self.evaluation

    def resolved(self) -> Config | None:
        """The config, for what can be counted from it; None where it is unknown, not complete yet, or one that another
        version of this program wrote."""
        if self.settings.get("model.vocab_size") is None:
            return None
        try:
            return from_dict(self.config or {}, str(self.path / CONFIG_FILE))
        except UserError:
            return None


def load_runs(workdirs: Iterable[str], sweeps: Iterable[str] = ()) -> list[Run]:
    """The runs in `workdirs`, each with metrics, and all below `sweeps`, whatever has become of them.

    A name is as much of the path's end as tells the runs apart.

    Raises:
      UserError: a workdir that does not exist or has no metrics, a sweep without runs, a file that cannot be read.
    """
    paths: dict[pathlib.Path, tuple[pathlib.Path, str]] = {}  # each folder once, under the path it was given by
    for workdir in workdirs:
        _check_workdir(workdir)
        paths.setdefault(pathlib.Path(workdir).resolve(), (pathlib.Path(workdir), f"--workdir={workdir}"))
    for sweep in sweeps:
        found = find_runs(sweep)
        if not found:
            raise UserError(f"--sweep={sweep}: no run in it or below it")
        for path in found:
            paths.setdefault(path.resolve(), (path, f"--sweep={sweep}"))
    names = short_names([str(path) for path in paths])
    return [_load(path, name, flag) for (path, flag), name in zip(paths.values(), names, strict=True)]


def find_runs(root: str) -> list[pathlib.Path]:
    """The folders of runs in and below `root`, in the order of their names; in the folder of a run none is looked for.

    Raises:
      UserError: no such folder.
    """
    if not pathlib.Path(root).is_dir():
        raise UserError(f"--sweep={root}: no such folder")
    found = []
    for folder, below, files in os.walk(root):
        if {METRICS_FILE, SWEEP_FILE} & set(files):
            found.append(pathlib.Path(folder))
            below.clear()
        below[:] = sorted(name for name in below if name != CHECKPOINTS)
    return found


def _check_workdir(workdir: str) -> None:
    path = pathlib.Path(workdir)
    if not path.is_dir():
        raise UserError(f"--workdir={workdir}: no such folder")
    if not (path / METRICS_FILE).is_file():
        below = any((child / METRICS_FILE).is_file() for child in path.iterdir() if child.is_dir())
        remedy = f"give the folder of a run, or --sweep={workdir}" if below else "give the folder of a run"
        raise UserError(f"--workdir={workdir}: has no {METRICS_FILE}; {remedy}")


def _load(path: pathlib.Path, name: str, flag: str) -> Run:
    metrics = path / METRICS_FILE
    try:
        rows = read_metrics(metrics) if metrics.is_file() else []
        record = read_record(path)
        config = _read_json(path / CONFIG_FILE) or record.get("config")
        evaluation = _read_json(path / EVAL_FILE) or {}
    except ValueError as error:
        raise UserError(str(error)) from error
    if not rows and flag.startswith("--workdir"):
        raise UserError(f"{flag}: its {METRICS_FILE} is empty; the run has logged nothing yet")
    return Run(name, path, rows, config, evaluation, record.get("error", ""))


def _read_json(path: pathlib.Path) -> JsonObject | None:
    return read_json(path, "write it again, or remove it") if path.is_file() else None


def short_names(paths: list[str]) -> list[str]:
    """As much of each path's end as tells them all apart."""
    parts = [pathlib.Path(p).resolve().parts for p in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return paths
