"""Benchmarks of eval.py: every task of lm-evaluation-harness by name, with documents from local files or the hub.

A name is looked up in the folders of --tasks_dir, then (if there is local data) in configs/tasks, then among the
harness's own tasks, which load their documents from the hub.
"""

import argparse
import contextlib
import difflib
import importlib.util
import json
import logging
import os
import pathlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax

from mtp_jax import cli
from mtp_jax.config import UserError, shipped
from mtp_jax.errors import first_line, warn_once
from mtp_jax.evaluation import benchmark_data, sandbox
from mtp_jax.evaluation.results import Benchmark, Metric
from mtp_jax.language_model import LanguageModel
from mtp_jax.typing import JsonObject

if TYPE_CHECKING:  # an optional dependency
    from lm_eval.api.group import Group
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

TASKS_FOLDER = shipped.folder() / "tasks"
BOOTSTRAP = 1000  # resamples for the standard error of a metric that is not a mean
OTHER_TASKS = ("loss", "acceptance", "speculative", "advice")  # tasks of eval.py that are not benchmarks
MOST_SHOWN = 8  # tasks of a group that are printed


def add_flags(flags: argparse.ArgumentParser) -> None:
    """Adds the flags of benchmarks."""
    group = flags.add_argument_group("benchmarks (--limit: documents of each task)")
    group.add_argument("--tasks_dir", action="append", default=[], help="a folder with yaml tasks; may be repeated")
    group.add_argument("--data_dir", help=f"local data of configs/tasks; default ${benchmark_data.VARIABLE}")
    group.add_argument("--num_fewshot", type=int, help="examples before each question; default: that of the task")
    group.add_argument("--apply_chat_template", action="store_true", help="prompts are chats of the model's template")
    group.add_argument(
        "--fewshot_as_multiturn",
        type=_boolean,
        nargs="?",
        const=True,
        metavar="true|false",
        help="examples are turns of the chat; default true with --apply_chat_template",
    )
    group.add_argument("--system_instruction", help="text of a system message, or before each prompt without a chat")
    group.add_argument("--speculative", action="store_true", help="self-speculated answers (the same text, faster)")
    group.add_argument("--allow_code_execution", action="store_true", help="run programs the model wrote, in a sandbox")
    group.add_argument("--samples", help="write each document with the model's output to this .jsonl file")


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} must be true or false")
    return text.lower() in ("true", "1", "yes")


@dataclass(frozen=True)
class Selection:
    """Benchmarks that exist and may run.

    Attributes:
      tasks: the harness's objects, in the requested order.
      manager: the task manager that loaded them; it has the harness's own tasks only if needed.
    """

    names: list[str]
    tasks: list["ConfigurableTask | Group"]
    manager: "TaskManager"


def select(args: argparse.Namespace, names: Sequence[str]) -> Selection:
    """Finds the tasks and loads their documents, before a model is loaded.

    Raises:
      UserError: the harness is not installed, an unknown task (with the nearest), missing data, or a problem that would
        otherwise appear only after hours: see `_check`.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            f"--tasks={names[0]}: is not loss, acceptance, speculative or advice; benchmarks need a package: pip "
            "install 'lm_eval>=0.4.13,<0.5' (the extra eval)"
        )
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise UserError(f"--num_fewshot={args.num_fewshot}: must be at least 0")
    if args.fewshot_as_multiturn and not args.apply_chat_template:
        raise UserError("--fewshot_as_multiturn=true: is for chats; add --apply_chat_template")
    if args.samples:
        cli.check_output("samples", args.samples)
    if args.data_dir:
        os.environ[benchmark_data.VARIABLE] = args.data_dir  # read by the files of the tasks
    _quiet()
    manager = _manager(args.tasks_dir, names)
    tasks: list[ConfigurableTask | Group] = []
    for name in names:
        tasks += _load(manager, name)
    _check([leaf for top in tasks for leaf in _leaves(top)], args)
    return Selection(list(names), tasks, manager)


def _check(leaves: "list[ConfigurableTask]", args: argparse.Namespace) -> None:
    """Checks that the tasks can run with these flags.

    Raises:
      UserError: a task is requested twice, has too few examples for --num_fewshot, has unknown generation options, or
        runs programs without permission or on a machine that cannot isolate them.
    """
    from mtp_jax.evaluation.harness import generation_options

    found = [task.task_name for task in leaves]
    twice = [name for name in found if found.count(name) > 1]
    if twice:
        raise UserError(f"--tasks: lists {twice[0]} twice, by its name or as one of a group; leave one out")
    for task in leaves:
        if args.num_fewshot:
            _check_examples(task, args.num_fewshot)
        if task.OUTPUT_TYPE == "generate_until":
            try:
                generation_options(task.config.generation_kwargs or {})
            except UserError as error:
                raise UserError(f"--tasks={task.task_name}: {error}") from error
    unsafe = [task.task_name for task in leaves if getattr(task, "UNSAFE_CODE", False)]
    if unsafe and not args.allow_code_execution:
        raise UserError(f"--tasks={unsafe[0]}: runs programs the model wrote; add --allow_code_execution to allow it")
    if unsafe:
        sandbox.run_programs([])


def _check_examples(task: "ConfigurableTask", num: int) -> None:
    """Raises UserError where the harness would not, or could not, prepend `num` examples."""
    if task.get_config("num_fewshot") == 0:  # the harness then silently ignores the flag
        raise UserError(
            f"--num_fewshot={num}: {task.task_name} has num_fewshot: 0 in its file, which is not changed; leave it out"
        )
    num_there = len(list(task.fewshot_docs()))
    if num > num_there:
        raise UserError(f"--num_fewshot={num}: {task.task_name} has {num_there} examples; use at most {num_there}")


def _quiet() -> None:
    """Silences the harness (its errors are exceptions) and disables its bootstrap's forks, which may crash jax."""
    os.environ["TQDM_DISABLE"] = "1"  # one bar for each task's prompts; the model has its own bar
    import datasets

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    os.environ["DISABLE_MULTIPROC"] = "1"


def _manager(folders: Sequence[str], names: Sequence[str]) -> "TaskManager":
    """Returns a task manager that has all of `names`. The harness's own tasks are read (seconds) only if needed."""
    from lm_eval.tasks import TaskManager

    for folder in folders:
        if not pathlib.Path(folder).is_dir():
            raise UserError(f"--tasks_dir={folder}: no such folder")
    own = list(folders)
    if os.environ.get(benchmark_data.VARIABLE) and TASKS_FOLDER.is_dir():
        benchmark_data.folder()
        own.insert(0, str(TASKS_FOLDER))  # later folders take precedence
    manager = TaskManager(include_path=own, include_defaults=False)
    if all(name in manager.all_tasks for name in names):
        return manager
    manager = TaskManager(include_path=own, include_defaults=True)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, [*OTHER_TASKS, *manager.all_tasks], 1, 0.0)
            raise UserError(f"--tasks={name}: no such task; did you mean {near[0]}?")
    return manager


def _load(manager: "TaskManager", name: str) -> "list[ConfigurableTask | Group]":
    """Returns the task, the group, or the tasks of a tag."""
    try:
        loaded = manager.load([name])
    except UserError:
        raise
    except Exception as error:  # any exception of a task's own files or the hub
        raise UserError(
            f"--tasks={name}: cannot be loaded ({type(error).__name__}: {first_line(error)}); "
            "for local files give --data_dir"
        ) from error
    return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


def _leaves(top: "ConfigurableTask | Group") -> "list[ConfigurableTask]":
    return top.get_all_tasks() if hasattr(top, "get_all_tasks") else [top]


def run(selection: Selection, args: argparse.Namespace, model: LanguageModel) -> tuple[str, dict[str, Benchmark]]:
    """Runs the benchmarks; returns a table, and values for JSON (see `values_of`).

    Raises:
      UserError: a task requires something that this model cannot do.
    """
    from lm_eval import simple_evaluate

    from mtp_jax.evaluation.harness import HarnessModel

    answers = HarnessModel(
        model,
        batch_size=args.batch_size or 16,
        speculative=args.speculative,
        num_speculative_tokens=args.num_speculative_tokens,
        seed=model.config.seed,
        chat=args.apply_chat_template,
    )
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the tables only
        results: JsonObject = simple_evaluate(
            model=answers,
            tasks=selection.tasks,
            task_manager=selection.manager,  # otherwise it reads the files of all its own tasks, for seconds
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=bool(args.samples),
            system_instruction=args.system_instruction,
            apply_chat_template=args.apply_chat_template,
            fewshot_as_multiturn=args.apply_chat_template and args.fewshot_as_multiturn is not False,
            torch_random_seed=None,  # a value would import torch
            confirm_run_unsafe_code=args.allow_code_execution,
        )
    if args.samples and jax.process_index() == 0:
        write_samples(args.samples, results["samples"])
    values = values_of(results)
    for name, (num_tokens, num_passes) in answers.passes.items():
        if name in values:
            values[name]["tokens_per_forward"] = num_tokens / max(1, num_passes)
            values[name]["num_shortened"] = answers.num_shortened[name]
    title = "benchmarks" + (f", {args.limit} documents of each" if args.limit else "")
    title += "; prompts of the chat template" if args.apply_chat_template else ""
    context = model.config.data.sequence_length
    if answers.num_truncated:
        title += f"; {answers.num_truncated} contexts were truncated to the model's {context} tokens"
    if shortened := sum(answers.num_shortened.values()):
        title += f"; {shortened} answers ended with the context of {context} tokens, before their task's limit"
    return f"{title}\n{table(values)}", values


def _num_fewshot(config: JsonObject, num_added: int | None) -> int:
    """Returns the number of examples in a prompt: those the harness added, else those in the task's metadata."""
    return num_added or (config.get("metadata") or {}).get("num_fewshot", 0)


def values_of(results: JsonObject) -> dict[str, Benchmark]:
    """Returns the results of the harness, by task and group."""
    parents = {child: group for group, each in results.get("group_subtasks", {}).items() for child in each}
    groups = results.get("groups", {})
    out: dict[str, Benchmark] = {}
    for name, found in {**groups, **results["results"]}.items():
        metrics = _metrics(found)
        if not metrics:  # a group without metrics of its own
            continue
        leaves = _members(name, results.get("group_subtasks", {}))
        config = results["configs"][leaves[0]]
        main = _main_metric(config, metrics)
        is_better = results["higher_is_better"].get(name, {}).get(main.split(",")[0])
        out[name] = {
            "metrics": metrics,
            "main_metric": main,
            "higher_is_better": True if is_better is None else is_better,
            "kind": "generative" if config["output_type"] == "generate_until" else "likelihood",
            "num_docs": sum(results["n-samples"][leaf]["effective"] for leaf in leaves),
            "num_fewshot": _num_fewshot(config, results["n-shot"].get(leaves[0])),
            "group": parents.get(name),
        }
    return out


def _main_metric(config: JsonObject, metrics: dict[str, Metric]) -> str:
    """Returns the first metric that the task's file lists, after its first filter."""
    listed = [entry["metric"] for entry in config.get("metric_list") or []]
    by_place = {name: listed.index(name.split(",")[0]) for name in metrics if name.split(",")[0] in listed}
    return min(by_place, key=lambda name: by_place[name]) if by_place else next(iter(metrics))


def _metrics(found: JsonObject) -> dict[str, Metric]:
    out: dict[str, Metric] = {}
    for key, value in found.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = found.get(f"{metric}_stderr,{filter_name}")
        name = metric if filter_name == "none" else key
        out[name] = {"value": float(value), "stderr": float(stderr) if isinstance(stderr, int | float) else None}
    return out


def _members(name: str, subtasks: dict[str, list[str]]) -> list[str]:
    """Returns the tasks of a group, including those of nested groups; for a task, the task itself."""
    return [leaf for child in subtasks[name] for leaf in _members(child, subtasks)] if subtasks.get(name) else [name]


def table(values: dict[str, Benchmark]) -> str:
    """Returns a line per benchmark: shots, documents, every metric with its standard error; groups come first."""
    lines = [["benchmark", "shots", "docs", "result"]]

    def add(name: str, level: int) -> None:
        found = values[name]
        shown = "  ".join(f"{metric} {_number(m)}" for metric, m in found["metrics"].items())
        lines.append([" " * 2 * level + name, str(found["num_fewshot"]), f"{found['num_docs']:,}", shown])
        children = [child for child, each in values.items() if each["group"] == name]
        for child in children if len(children) <= MOST_SHOWN else []:
            add(child, level + 1)

    for name, found in values.items():
        if found["group"] not in values:
            add(name, 0)
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _number(metric: Metric) -> str:
    stderr = metric["stderr"]
    return f"{metric['value']:.4g}" + ("" if stderr is None else f" ± {stderr:.2g}")


def write_samples(path: str, samples: dict[str, list[JsonObject]]) -> None:
    """Writes a JSON object per document: its task, prompt, model output, expected answer and metrics.

    A file that cannot be written is reported, since the results of the benchmarks are not written yet.
    """
    lines = [json.dumps({"task": task, **each}, default=str) for task, found in samples.items() for each in found]
    try:
        cli.write_output("samples", path, "\n".join(lines))
    except UserError as error:
        warn_once(str(error))
