"""Variants: groups of runs that differ only in their seed, with means and deviations of their measurements."""

import functools
import math
import pathlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from etils import epath
from scipy import stats

from mtp_jax.model import count_parameters
from mtp_jax.mtp import KINDS
from mtp_jax.tools.reporting.runs import Run
from mtp_jax.typing import JsonObject

CONFIDENCE = 0.95
SEED = "seed"
ABSENT = "-"


@dataclass(frozen=True)
class Sample:
    """One quantity measured on several runs. errors: standard error of each run's measurement, None if unknown."""

    values: tuple[float, ...]
    errors: tuple[float | None, ...] = ()

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over the runs; None for a single run."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def error(self) -> float | None:
        """Root mean square of the measurements' standard errors; None if one is unknown."""
        known = [e for e in self.errors if e is not None]
        if not self.errors or len(known) < len(self.values):
            return None
        return math.sqrt(statistics.fmean(e * e for e in known))


@dataclass(frozen=True)
class Variant:
    """Runs with the same settings. settings: values of the keys, except the seed, that differ among all runs."""

    settings: JsonObject
    runs: tuple[Run, ...]

    @property
    def kind(self) -> str:
        """mtp.kind; "" if unknown."""
        return self.runs[0].settings.get("mtp.kind", "")

    @property
    def is_baseline(self) -> bool:
        """True if the runs are of the next-token model."""
        return self.kind in KINDS and KINDS[self.kind].is_baseline

    @property
    def depth(self) -> int:
        return self.runs[0].settings.get("mtp.depth", 0)

    @property
    def finished(self) -> list[Run]:
        """The finished runs; only these enter the samples."""
        return [run for run in self.runs if run.is_finished]

    @property
    def num_runs(self) -> str:
        """`3`, or `2 of 3` if not all are finished."""
        done, total = len(self.finished), len(self.runs)
        return str(total) if done == total else f"{done} of {total}"

    def label(self, keys: Sequence[str] | None = None) -> str:
        """Returns a label as `parallel, depth 3`, of the settings in `keys`, which may be empty; if None, of all
        settings, or the run's name if there are none."""
        shown = {k: v for k, v in self.settings.items() if (keys is None or k in keys) and v != ABSENT}
        text = ", ".join(str(v) if k == "mtp.kind" else f"{k.split('.')[-1]} {value_text(v)}" for k, v in shown.items())
        name = self.runs[0].name if len(self.runs) == 1 else "all runs"
        return text or (name if keys is None else "")

    def others(self, but: Sequence[str] = ()) -> list[str]:
        """Returns the keys of the settings except `but`; if `but` is empty, those outside mtp.*."""
        return [key for key in self.settings if (key not in but if but else not key.startswith("mtp."))]

    def sample(self, name: str, source: str) -> Sample | None:
        """Returns a measurement over the finished runs that have it, None if none has. source: see `measures`."""
        found = [measures(run, source).get(name) for run in self.finished]
        values = tuple(v for v in found if v is not None)
        return Sample(values) if values else None

    def benchmark(self, task: str, metric: str = "") -> Sample | None:
        """Returns a metric of a benchmark, by default the main one, over the finished runs that have it, None if none
        has."""
        found = [run.results().get("benchmarks", {}).get(task) for run in self.finished]
        metrics = [f["metrics"].get(metric or f["main_metric"]) for f in found if f]
        metrics = [m for m in metrics if m and m["value"] is not None]
        if not metrics:
            return None
        return Sample(tuple(m["value"] for m in metrics), tuple(m.get("stderr") for m in metrics))

    def mean_benchmark(self, tasks: Sequence[str]) -> Sample | None:
        """Returns the unweighted mean of the main metrics of several benchmarks over the finished runs that have all of
        them, None if none has."""
        by_seed = self.mean_by_seed(tasks)
        found = [mean for means in by_seed.values() for mean in means]
        return Sample(tuple(m[0] for m in found), tuple(m[1] for m in found)) if found else None

    def balance(self, generative: Sequence[str], likelihood: Sequence[str]) -> Sample | None:
        """Returns the mean of the generative benchmarks minus that of the likelihood-based ones, over the finished runs
        that have all of them; None if none has."""
        ups, downs = self.mean_by_seed(generative), self.mean_by_seed(likelihood)
        pairs = [pair for seed in ups if seed in downs for pair in zip(ups[seed], downs[seed], strict=False)]
        errors = tuple(None if up[1] is None or down[1] is None else math.hypot(up[1], down[1]) for up, down in pairs)
        return Sample(tuple(up[0] - down[0] for up, down in pairs), errors) if pairs else None

    def mean_by_seed(self, tasks: Sequence[str]) -> dict[int | None, list[tuple[float, float | None]]]:
        """Returns (mean of the main metrics, its standard error over documents) of the runs of each seed."""
        out: dict[int | None, list[tuple[float, float | None]]] = {}
        for run in self.finished:
            found = [run.results().get("benchmarks", {}).get(task) for task in tasks]
            metrics = [f["metrics"][f["main_metric"]] for f in found if f]
            if len(metrics) < len(tasks) or any(m["value"] is None for m in metrics):
                continue
            errors = [m.get("stderr") for m in metrics]
            known = [e for e in errors if e is not None]
            error = math.hypot(*known) / len(tasks) if len(known) == len(errors) else None
            out.setdefault(run.seed, []).append((statistics.fmean(m["value"] for m in metrics), error))
        return out


def variants_of(runs: Sequence[Run]) -> list[Variant]:
    """Groups runs into variants, in the order of their first runs; a run without a config is a variant by itself."""
    keys = differing_keys(runs)
    groups: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        known = [(key, run.settings.get(key, ABSENT)) for key in keys] if run.settings else [("run", run.name)]
        groups.setdefault(tuple((key, value_text(value)) for key, value in known), []).append(run)
    out = []
    for group, members in groups.items():
        first = members[0].settings
        out.append(Variant({key: first.get(key, text) if first else text for key, text in group}, tuple(members)))
    return out


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Returns the config keys, except the seed, that have more than one value among the runs that have them."""
    values: dict[str, set[str]] = {}
    for run in runs:
        for key, value in run.settings.items():
            values.setdefault(key, set()).add(value_text(value))
    keys = [key for key, found in values.items() if len(found) > 1 and key != SEED]
    if "mtp.kind" in keys and "mtp.depth" in values and "mtp.depth" not in keys:
        keys.insert(keys.index("mtp.kind") + 1, "mtp.depth")  # not applicable to the baseline, so it has one value
    return sorted(keys, key=lambda key: key not in ("mtp.kind", "mtp.depth"))


def baseline_of(variant: Variant, variants: Sequence[Variant]) -> Variant | None:
    """Returns the variant without multi-token prediction and with the same other settings; None if there is none."""
    same = [v for v in variants if v.is_baseline and v.label(v.others()) == variant.label(variant.others())]
    return same[0] if same else None


def benchmark_names(variants: Sequence[Variant]) -> list[tuple[str, JsonObject]]:
    """Returns (task, its entry in eval.json) of every benchmark of any finished run, in order, groups together."""
    found: dict[str, JsonObject] = {}
    for v in variants:
        for run in v.finished:
            for task, facts in run.results().get("benchmarks", {}).items():
                found.setdefault(task, facts)
    groups = list(dict.fromkeys(facts.get("group") or task for task, facts in found.items()))
    return sorted(found.items(), key=lambda item: groups.index(item[1].get("group") or item[0]))


def shown_benchmarks(variants: Sequence[Variant]) -> list[tuple[str, JsonObject]]:
    """Returns `benchmark_names` without the tasks of a group that has its own score: MMLU is one row, not 57."""
    tasks = benchmark_names(variants)
    names = {name for name, _ in tasks}
    return [(name, facts) for name, facts in tasks if facts.get("group") not in names]


def value_text(value: object) -> str:
    """Returns a config value as text; equal values have equal texts."""
    return ", ".join(map(value_text, value)) or "()" if isinstance(value, (list, tuple)) else str(value)


def best_source(runs: Sequence[Run]) -> str:
    """Returns `validation` if any run has been evaluated, so that no column mixes the two sources; else `training`."""
    return "validation" if any(run.results().get("loss") for run in runs) else "training"


@functools.cache
def measures(run: Run, source: str) -> dict[str, float]:
    """Returns the measurements of a finished run by name; those that are missing are left out.

    source: `validation` for losses and agreement on held-out documents, from eval.json; `training` for those of the
    last logged step. tokens_per_second is the median over the logged steps, peak_memory_gib the maximum.
    """
    last, results = run.rows[-1], run.results()
    out: dict[str, float | None] = {}
    if source == "training":
        out |= {key: value for key, value in last.items() if key.startswith(("loss_", "agreement_"))}
    for depth, found in results.get("loss", {}).items() if source == "validation" else ():
        out |= {f"{name}_{depth}": found.get(name) for name in ("loss", "bits_per_byte", "accuracy")}
    for depth, found in results.get("acceptance", {}).items():
        out["expected_tokens"] = found.get("expected_tokens")  # of the largest depth, which comes last
        if source == "validation" and depth != "main":
            out[f"agreement_{depth}"] = found.get("agreement")
    speculative = results.get("speculative", {})
    out |= {name: speculative.get(name) for name in ("tokens_per_forward", "speed_up")}
    speeds = sorted(row["tokens_per_second"] for row in run.rows if row.get("tokens_per_second") is not None)
    out["tokens_per_second"] = speeds[len(speeds) // 2] if speeds else None
    out["peak_memory_gib"] = max((r["peak_memory_gib"] for r in run.rows if r.get("peak_memory_gib")), default=None)
    config = run.resolved()
    if config is not None:
        counts = count_parameters(config.architecture)
        out |= {"parameters_main": counts.total, "parameters_total": counts.total + counts.mtp_total}
    return {name: value for name, value in out.items() if value is not None}


def beyond_noise(one: Sample, other: Sample) -> bool | None:
    """Returns whether two means differ by more than chance explains; None if neither test below can be computed.

    Each test that can be computed must pass:
      * over seeds (at least two on one side): Welch's t-test, two-sided, at 95 %; a single run is assumed to have the
        other side's deviation, with the other side's degrees of freedom alone;
      * over documents (the standard error of each measurement is known): the difference exceeds 1.96 standard errors.
        All seeds are evaluated on the same documents, so more seeds do not reduce these errors. The two variants share
        their documents too; a paired test would reduce the errors, so this one marks rather too few than too many.
    """
    checks, p_value = [], welch_p_value(one, other)
    if p_value is not None:
        checks.append(p_value < 1 - CONFIDENCE)
    if one.error is not None and other.error is not None:
        bound = stats.norm.ppf((1 + CONFIDENCE) / 2) * math.hypot(one.error, other.error)
        checks.append(abs(one.mean - other.mean) > bound)
    return all(checks) if checks else None


def welch_p_value(one: Sample, other: Sample) -> float | None:
    """Returns the two-sided p-value of Welch's t-test over seeds, see `beyond_noise`; None for one run on each side."""
    counts = [len(s.values) for s in (one, other)]
    if max(counts) < 2:
        return None
    sides = [x for s in (one, other) for x in (s.mean, s.deviation or 0.0, len(s.values))]
    # With a single run on one side, the pooled deviation and its degrees of freedom are those of the other side.
    return float(stats.ttest_ind_from_stats(*sides, equal_var=1 in counts).pvalue)


def comparable(tasks: Sequence[tuple[str, JsonObject]], kind: str) -> list[str]:
    """Returns the names of the benchmarks of a kind, "generative" or "likelihood", whose scores have a common scale:
    those that are better if higher, which leaves out perplexities."""
    return [name for name, facts in tasks if facts["kind"] == kind and facts.get("higher_is_better", True)]


def as_json(runs: Sequence[Run], variants: Sequence[Variant], source: str) -> JsonObject:
    """Returns the data of the tables: {"source", "runs": [...], "variants": [...]}."""
    found = [_json(variant, variants, source) for variant in variants]
    return {"source": source, "runs": [_run_json(run) for run in runs], "variants": found}


def _run_json(run: Run) -> JsonObject:
    kept = {
        "workdir": _shown(run.path),
        "state": run.state,
        "seed": run.seed,
        "last": run.rows[-1] if run.rows else None,
    }
    return {"name": run.name, **kept, "evaluation": run.evaluation or None}


def _shown(path: epath.Path) -> str:
    """Returns a path relative to the current folder where it is inside, so that results name no machine's folders."""
    current = pathlib.Path.cwd()
    return str(pathlib.Path(path).relative_to(current)) if current in pathlib.Path(path).parents else str(path)


def _json(variant: Variant, variants: Sequence[Variant], source: str) -> JsonObject:
    names = dict.fromkeys(name for run in variant.finished for name in measures(run, source))
    baseline, tasks = baseline_of(variant, variants), {}
    for task, facts in benchmark_names([variant]):
        sample = variant.benchmark(task)
        tasks[task] = {"metric": facts["main_metric"], **_sample_json(sample)}
        other = baseline.benchmark(task) if baseline and baseline is not variant else None
        if sample and other:
            tasks[task] |= _difference_json(sample, other)
    return {
        "label": variant.label(),
        "settings": variant.settings,
        "n": 1 + variant.depth if variant.kind else None,
        "num_runs": len(variant.runs),
        "num_finished": len(variant.finished),
        "measures": {name: _sample_json(variant.sample(name, source)) for name in names},
        "benchmarks": tasks,
        "means": _means_json(variant, baseline if baseline is not variant else None, shown_benchmarks(variants)),
    }


def _means_json(variant: Variant, baseline: Variant | None, tasks: Sequence[tuple[str, JsonObject]]) -> JsonObject:
    """Returns the means over the benchmarks of each kind, and the difference of the two where there are both."""
    kinds = {kind: comparable(tasks, kind) for kind in ("generative", "likelihood")}
    out: JsonObject = {}
    for kind, names in kinds.items():
        if names:
            other = baseline.mean_benchmark(names) if baseline else None
            out[kind] = {"tasks": names, **_compared_json(variant.mean_benchmark(names), other)}
    if all(kinds.values()):
        other = baseline.balance(*kinds.values()) if baseline else None
        out["generative_minus_likelihood"] = _compared_json(variant.balance(*kinds.values()), other)
    return out


def _compared_json(sample: Sample | None, baseline: Sample | None) -> JsonObject:
    return _sample_json(sample) | (_difference_json(sample, baseline) if sample and baseline else {})


def _difference_json(sample: Sample, baseline: Sample) -> JsonObject:
    return {
        "difference": sample.mean - baseline.mean,
        "p_value": welch_p_value(sample, baseline),
        "beyond_noise": beyond_noise(sample, baseline),
    }


def _sample_json(sample: Sample | None) -> JsonObject:
    if sample is None:
        return {"n": 0, "mean": None, "deviation": None, "stderr": None}
    return {"n": len(sample.values), "mean": sample.mean, "deviation": sample.deviation, "stderr": sample.error}
