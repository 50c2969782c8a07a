"""Tables of tools.report: runs, variants, the search over n, benchmarks."""

from collections.abc import Sequence

from mtp_jax.mtp import KINDS, kind_of
from mtp_jax.tools.reporting.runs import Run
from mtp_jax.tools.reporting.table import MARK, MISSING, Table, depths, mean_and_std, number
from mtp_jax.tools.reporting.variants import (
    Sample,
    Variant,
    baseline_of,
    beyond_noise,
    comparable,
    measures,
    shown_benchmarks,
    value_text,
)
from mtp_jax.typing import JsonObject

SEARCHED = ("mtp.kind", "mtp.depth")
MEAN_NOTE = "mean ± sample standard deviation over seeds; [n]: of n runs only"
NOISE_NOTE = (
    f"{MARK} differs from the baseline by more than chance: at 95 % by Welch's t-test over seeds (a single run is "
    "assumed to have the deviation of the other side) and by 1.96 standard errors over documents, each where known; of "
    "pairs that do not differ one in twenty is marked, at most"
)
NORMALIZED = "acc_norm"  # shown beside acc: likelihoods divided by the lengths of the options
SOURCES = {"validation": "held-out documents, eval.json", "training": "last logged training step, no run is evaluated"}


def newest(runs: Sequence[Run]) -> Table:
    """Table of the newest values, one row per run, depths 0 (main), 1, 2 ... side by side; tokens/s is the median."""
    has_states = any(run.state != "done" for run in runs)
    has_memory = any("peak_memory_gib" in row for run in runs for row in run.rows[-1:])
    header = ["run", "step", "loss", "by depth", "accuracy", "agreement", "tokens/s"]
    header += ["peak GiB"] * has_memory + ["state"] * has_states
    rows = []
    for run in runs:
        last = run.rows[-1] if run.rows else {}
        found = measures(run, "training") if run.rows else {}
        row = [run.name, str(last.get("step", MISSING)), number(last.get("loss"), 4)]
        row += [depths(last, kind, 3) for kind in ("loss", "accuracy", "agreement")]
        row += [number(found.get("tokens_per_second"), 0)]
        row += [number(found.get("peak_memory_gib"), 2)] * has_memory + [run.state] * has_states
        rows.append(row)
    return Table("every run: newest numbers", header, rows, has_title=False)


def learnt(variants: Sequence[Variant], source: str) -> Table:
    """Table of losses, bits per byte and agreement per variant."""
    keys = _keys(variants)
    header = [*_short(keys), "runs", "main loss", "bits/byte", "loss by depth", "agreement by depth"]
    rows = []
    for v in variants:
        count, depth = len(v.finished), _depth(v, source)
        row = [*_settings(v, keys), v.num_runs]
        row += [mean_and_std(v.sample(f"{name}_main", source), 3, count) for name in ("loss", "bits_per_byte")]
        for name in ("loss", "agreement"):
            samples = [v.sample(f"{name}_mtp_{k}", source) for k in range(1, depth + 1)]
            row.append("  ".join(mean_and_std(s, 3, count).replace(" ", "") for s in samples) or MISSING)
        rows.append(row)
    return Table(f"runs: what was learnt ({SOURCES[source]})", header, rows, (MEAN_NOTE,))


def costs(variants: Sequence[Variant], source: str) -> Table:
    """Table of parameters, memory, speed and tokens per forward pass of each variant."""
    keys = _keys(variants)
    header = [*_short(keys), "runs", "params M", "with MTP", "tokens/s", "peak GiB"]
    header += ["tokens/forward expected", "measured", "speed-up"]
    rows = []
    for v in variants:
        row = [*_settings(v, keys), v.num_runs]
        for name in ("parameters_main", "parameters_total"):
            sample = v.sample(name, source)
            row.append(number(sample.mean / 1e6, 2) if sample else MISSING)
        for name, digits in (("tokens_per_second", 0), ("peak_memory_gib", 2), ("expected_tokens", 2)):
            row.append(mean_and_std(v.sample(name, source), digits, len(v.finished)))
        row += [mean_and_std(v.sample(name, source), 2, len(v.finished)) for name in ("tokens_per_forward", "speed_up")]
        rows.append(row)
    title = "runs: what it takes and yields (tokens/s: training, the median; speed-up: of self-speculation)"
    return Table(title, header, rows, (MEAN_NOTE,))


def searches(variants: Sequence[Variant], source: str) -> list[Table]:
    """Tables of the search over n of Gloeckle et al. 2024 (2404.19737, table 1): one per kind and combination of other
    settings that has more than one n."""
    groups: dict[tuple[str, str], list[Variant]] = {}
    for v in variants:
        if v.kind and not v.is_baseline:
            groups.setdefault((v.kind, v.label(v.others(SEARCHED))), []).append(v)
    out = []
    for (kind, others), members in groups.items():
        baseline = baseline_of(members[0], variants)
        rows = sorted([baseline, *members] if baseline else members, key=lambda v: v.depth)
        if len({v.depth for v in rows}) > 1:
            out.append(_search(kind, others, rows, baseline, source))
    return out


def _search(kind: str, others: str, variants: list[Variant], baseline: Variant | None, source: str) -> Table:
    tasks = shown_benchmarks(variants)
    header = ["n", "runs", "blocks", "main loss", "bits/byte", "tokens/forward", "speed-up", *map(_task_label, tasks)]
    rows = []
    for v in variants:
        other, count = None if v is baseline else baseline, len(v.finished)
        row = [str(1 + v.depth), v.num_runs, _num_blocks(v)]
        for name in ("loss_main", "bits_per_byte_main"):
            sample = v.sample(name, source)
            row.append(mean_and_std(sample, 3, count) + _mark(sample, other.sample(name, source) if other else None))
        row += [mean_and_std(v.sample(name, source), 2, count) for name in ("tokens_per_forward", "speed_up")]
        for task, _ in tasks:
            sample = v.benchmark(task)
            row.append(score(sample, count) + _mark(sample, other.benchmark(task) if other else None))
        rows.append(row)
    title = f"search over n = 1 + depth: {_heads(kind, variants)}{f' ({others})' if others else ''}"
    notes = ("blocks: of the main model, and of the depths on top", f"losses: {SOURCES[source]}; {MEAN_NOTE}")
    return Table(title, header, rows, (*notes, NOISE_NOTE))


def _heads(kind: str, variants: Sequence[Variant]) -> str:
    """Returns a description of a kind's depths and of the origin of their blocks."""
    settings = [v.runs[0].settings for v in variants if v.kind == kind]
    return KINDS[kind].heading(settings) if kind in KINDS else f"{kind} heads"


def benchmarks(variants: Sequence[Variant]) -> list[Table]:
    """Tables of every variant beside the baseline (mtp.kind=none), as table 4 of DeepSeek-V3 (2412.19437): one per
    combination of the settings outside mtp.*."""
    groups: dict[str, list[Variant]] = {}
    for v in variants:
        groups.setdefault(v.label(v.others()), []).append(v)
    tables = []
    for others, members in groups.items():
        tasks = shown_benchmarks(members)
        if tasks:
            tables.append(_benchmarks(others, members, tasks))
    return tables


def _benchmarks(others: str, variants: list[Variant], tasks: list[tuple[str, JsonObject]]) -> Table:
    baseline = next((v for v in variants if v.is_baseline), None)
    compared = [v for v in variants if v is not baseline]
    header = ["benchmark (metric)", "shots", "documents"] + ["baseline"] * (baseline is not None)
    for v in compared:
        own = v.label([key for key in v.settings if key.startswith("mtp.")]) or v.label()
        header += [own] + ["diff"] * (baseline is not None)
    rows: list[list[str]] = []
    shown = ([baseline] if baseline else []) + compared
    for kind, title in (("generative", "generative"), ("likelihood", "likelihood-based")):
        chosen = [t for t in tasks if t[1]["kind"] == kind]
        rows += [[title]] if chosen else []
        for task, facts in chosen:
            row = [_task_label((task, facts)), str(facts.get("num_fewshot", MISSING)), number(facts.get("num_docs"), 0)]
            rows.append(row + _compared([v.benchmark(task) for v in shown], shown, baseline))
            if NORMALIZED in facts["metrics"] and facts["main_metric"] != NORMALIZED:
                row = [_task_label((task, facts | {"main_metric": NORMALIZED})), *row[1:]]
                rows.append(row + _compared([v.benchmark(task, NORMALIZED) for v in shown], shown, baseline))
        names = comparable(chosen, kind)
        if len(names) > 1:
            row = [f"mean of the {len(names)} main metrics", MISSING, MISSING]
            rows.append(row + _compared([v.mean_benchmark(names) for v in shown], shown, baseline))
    both = [comparable(tasks, kind) for kind in ("generative", "likelihood")]
    if all(both):
        row = ["mean generative - mean likelihood", MISSING, MISSING]
        rows += [["balance"], row + _compared([v.balance(*both) for v in shown], shown, baseline)]
    title = f"benchmarks{f' ({others})' if others else ''}"
    counts = ", ".join(f"{v.label()}: {v.num_runs}" for v in variants)
    notes = (
        f"{MEAN_NOTE}; (e): the standard error over documents, where there is one seed",
        f"runs: {counts}",
        NOISE_NOTE if baseline else "no differences: there is no run with mtp.kind=none",
    )
    return Table(title, header, rows, notes, joined=("diff",))


def _compared(samples: list[Sample | None], variants: list[Variant], baseline: Variant | None) -> list[str]:
    """Returns the cells of one row: each variant's score and, where there is a baseline, which comes first, its
    difference."""
    cells = []
    for sample, variant in zip(samples, variants, strict=True):
        cells.append(score(sample, len(variant.finished)))
        cells += [_difference(sample, samples[0])] if baseline and variant is not baseline else []
    return cells


def each_seed(variants: Sequence[Variant]) -> Table | None:
    """Table of benchmarks per seed: a mean hides runs that fall into two groups. None if there are no benchmarks or
    fewer than two seeds."""
    tasks = shown_benchmarks(variants)
    seeds = sorted({run.seed for v in variants for run in v.finished if run.seed is not None})
    if not tasks or len(seeds) < 2:
        return None
    rows = []
    for task, facts in tasks:
        for v in variants:
            found = {run.seed: run.results().get("benchmarks", {}).get(task) for run in v.finished}
            values = [found[s]["metrics"][found[s]["main_metric"]]["value"] if found.get(s) else None for s in seeds]
            rows.append([_task_label((task, facts)), v.label(), *(number(value, 3) for value in values)])
    return Table("benchmarks of every seed", ["benchmark (metric)", "variant", *map(str, seeds)], rows)


def score(sample: Sample | None, num_expected: int) -> str:
    """Formats a benchmark's mean and deviation, or a single value and its standard error."""
    text = mean_and_std(sample, 3, num_expected)
    is_single = sample is not None and len(sample.values) == 1 and sample.error is not None
    return f"{text} ({number(sample.error, 3)})" if is_single and sample else text


def _difference(sample: Sample | None, baseline: Sample | None) -> str:
    if sample is None or baseline is None:
        return MISSING
    return f"{sample.mean - baseline.mean:+.3f}{_mark(sample, baseline) or ' '}"


def _mark(sample: Sample | None, baseline: Sample | None) -> str:
    return MARK if sample is not None and baseline is not None and beyond_noise(sample, baseline) else ""


def _task_label(task: tuple[str, JsonObject]) -> str:
    name, facts = task
    group = f"{facts['group']}: " if facts.get("group") else ""
    lower = "" if facts.get("higher_is_better", True) else ", lower is better"
    return f"{group}{name} ({facts['main_metric']}{lower})"


def _num_blocks(variant: Variant) -> str:
    """Returns the number of blocks of the main model and of the depths, as `3 + 2`."""
    config = variant.runs[0].resolved()
    if config is None:
        return MISSING
    kind = kind_of(config)
    return f"{kind.num_main_layers} + {kind.num_blocks}" if kind.num_blocks else str(kind.num_main_layers)


def _depth(variant: Variant, source: str) -> int:
    """Returns the largest depth that has a loss."""
    found = [name for run in variant.finished for name in measures(run, source) if name.startswith("loss_mtp_")]
    return max((int(name.removeprefix("loss_mtp_")) for name in found), default=0)


def _keys(variants: Sequence[Variant]) -> list[str]:
    return list(dict.fromkeys(key for v in variants for key in v.settings)) or ["variant"]


def _settings(variant: Variant, keys: list[str]) -> list[str]:
    if not variant.settings:
        return [variant.label(), *[MISSING] * (len(keys) - 1)]
    return [value_text(variant.settings.get(key, MISSING)) for key in keys]


def _short(keys: list[str]) -> list[str]:
    last = [key.split(".")[-1] for key in keys]
    return [name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)]
