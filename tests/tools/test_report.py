"""The report command: its table, its picture, and its one-line errors."""

import dataclasses
import json
import math
import re
import types

import numpy as np
import pytest

from mtp_jax import cli
from mtp_jax.config import load_config, to_dict
from mtp_jax.model import count_parameters
from mtp_jax.mtp import kind_of
from mtp_jax.tools import report
from mtp_jax.tools.reporting import pictures, runs, table, variants
from mtp_jax.training.metrics import read_metrics
from mtp_jax.training.workdir import read_config


def make_run(folder, depth=2, num_steps=60, moe=True, seed=0.0):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, num_steps + 1):
            wave = 0.03 * math.sin(7 * step + seed)
            row = {
                "step": step,
                "tokens": 100 * step,
                "loss": 2.0 + 3 / step + wave,
                "loss_main": 1.8 + 3 / step + wave,
            }
            row |= {"accuracy_main": 0.6 - 0.5 / step + wave, "grad_norm": 1 + 1 / step + wave, "mtp_lambda": 0.3}
            row |= {"learning_rate": 1e-3 * min(step / 10, 1), "tokens_per_second": 1000.0 + step, "mfu": None}
            for k in range(1, depth + 1):
                row[f"loss_mtp_{k}"] = 1.8 + 0.3 * k + 3 / step - wave
                row[f"accuracy_mtp_{k}"] = 0.6 - 0.12 * k - 0.4 / step
                row[f"agreement_mtp_{k}"] = 0.8 - 0.15 * k - 0.4 / step if step > 5 else None
            if moe:
                row["moe_load_max_over_mean"] = 1.1 + 2 / step
            file.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command: exit code, stdout, stderr. The terminal is wide enough for every table."""

    def command(*argv, columns=400):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr("sys.argv", ["report", *map(str, argv)])
        code = 0
        try:
            cli.run(report.main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return command


def test_table_and_picture(tmp_path, run):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", depth=0, moe=False)
    code, out, err = run(f"--workdir={a}", f"--workdir={b}", f"--output={tmp_path / 'x' / 'out.png'}")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == ["run", "step", "loss", "by", "depth", "accuracy", "agreement", "tokens/s"]
    assert lines[1].split()[:2] == ["a", "60"] and lines[2].split()[:2] == ["b", "60"]
    last = json.loads((a / "metrics.jsonl").read_text().splitlines()[-1])
    depths = " ".join(f"{last[f'loss_{d}']:.3f}" for d in ("main", "mtp_1", "mtp_2"))
    assert depths in lines[1] and f"{last['agreement_mtp_1']:.3f} {last['agreement_mtp_2']:.3f}" in lines[1]
    assert "1,031" in lines[1]
    assert (tmp_path / "x" / "out.png").read_bytes().startswith(b"\x89PNG")


def test_panels_follow_what_was_logged():
    rows = [{"step": 1, "loss_main": 1.0, "loss_mtp_2": 3.0, "loss_mtp_1": 2.0, "loss_mtp_x": 9.0, "grad_norm": None}]
    assert pictures.curves(rows, ("loss_main", "loss_mtp_")) == {0: [(1, 1.0)], 1: [(1, 2.0)], 2: [(1, 3.0)]}
    assert pictures.curves(rows, ("grad_norm",)) == {}


def test_single_run_writes_into_its_workdir_and_passes_over_a_torn_line(tmp_path, run):
    folder = make_run(tmp_path / "a", depth=0, moe=False, num_steps=3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')
    code, out, _ = run(f"--workdir={folder}")
    assert code == 0 and out.splitlines()[1].split()[1] == "3"
    assert (folder / "report.png").exists()


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [str(tmp_path / "x" / "run"), str(tmp_path / "y" / "run")]
    assert runs.short_names(paths) == ["x/run", "y/run"]


def test_unusable_arguments_are_one_line_and_exit_code_2(tmp_path, run):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "metrics.jsonl").write_text("")
    good = make_run(tmp_path / "good", num_steps=2)
    cases = [
        ([f"--workdir={tmp_path / 'absent'}"], "no such folder"),
        ([f"--workdir={tmp_path / 'empty'}"], "has no metrics.jsonl"),
        ([f"--workdir={tmp_path / 'blank'}"], "logged nothing yet"),
        ([], "--workdir"),
        (["--workdir=a", "--wrong=1"], "--wrong=1"),
        ([f"--workdir={good}", f"--output={good / 'metrics.jsonl' / 'x.png'}"], "cannot be written (File exists)"),
    ]
    for argv, message in cases:
        code, _, err = run(*argv)
        assert code == 2 and message in err and err.count("\n") == 1, (argv, err)


def test_output_with_an_unknown_ending(tmp_path, run):
    folder = make_run(tmp_path / "a", num_steps=2)
    code, _, err = run(f"--workdir={folder}", f"--output={tmp_path / 'out.txt'}")
    assert code == 2 and err.endswith("must end in .png\n")


@pytest.mark.parametrize("depth", [0, 3])
def test_depths_column(depth):
    row = {"loss_main": 1.0, **{f"loss_mtp_{k}": float(k) for k in range(1, depth + 1)}}
    assert table.depths(row, "loss", 1) == " ".join(["1.0", "1.0", "2.0", "3.0"][: depth + 1])


# ---------------------------------------------------------------------------------------------------------------
# Variants of several seeds


def run_of(folder, kind="none", depth=1, seed=0, *, last=600, num_steps=600, evaluation=None, error="", **over):
    """The folder of a run of configs/tiny.py as train.py, eval.py and a sweep leave it; None: not there."""
    folder.mkdir(parents=True)
    texts = {"mtp.kind": kind, "mtp.depth": depth, "seed": seed, "training.num_steps": num_steps, **over}
    overrides = [f"--config.{key}={value}" for key, value in texts.items()]
    planned = load_config("configs/tiny.py", overrides)
    record = {"overrides": overrides, "config": to_dict(planned), **({"error": error} if error else {})}
    (folder / "sweep.json").write_text(json.dumps(record))
    if last:
        config = dataclasses.replace(planned, model=dataclasses.replace(planned.model, vocab_size=264))
        (folder / "config.json").write_text(json.dumps(to_dict(config)))
        make_run(folder, depth=kind_of(config).depth, num_steps=last, seed=float(seed))
    if evaluation is not None:
        (folder / "eval.json").write_text(json.dumps({"step": last} | evaluation))
    return folder


def losses(*values):
    """eval.json's losses of the main model and its depths."""
    names = ["main", *(f"mtp_{k}" for k in range(1, len(values)))]
    return {"loss": {n: {"loss": v, "bits_per_byte": 2 * v} for n, v in zip(names, values, strict=True)}}


def benchmark(value, stderr=None, kind="generative", **facts):
    metrics = {"other": {"value": 9.0, "stderr": None}, "exact_match": {"value": value, "stderr": stderr}}
    return {"metrics": metrics, "main_metric": "exact_match", "kind": kind, "num_docs": 200, "num_fewshot": 4, **facts}


def rows_of(out, title):
    """The cells of each line below this title, split at runs of two spaces."""
    lines = re.split(r"\n\n|\ncurves: ", out.split(title, 1)[1])[0].splitlines()[1:]
    return [re.split(r"\s{2,}", line.strip()) for line in lines]


@pytest.fixture
def undrawn(monkeypatch):
    """No pictures, for tests of tables alone: a picture takes longer than all of them."""
    monkeypatch.setattr(report, "_draw", lambda *_: None)


@pytest.fixture
def sweep(tmp_path):
    """Three seeds of a baseline and of sequential depth 1, two of three of parallel depth 3 done, one not started."""
    root = tmp_path / "sweep"
    for seed, loss in enumerate((1.30, 1.34, 1.38)):
        run_of(
            root / f"none{seed}", seed=seed, evaluation=losses(loss) | {"acceptance": {"main": {"expected_tokens": 1}}}
        )
    for seed, loss in enumerate((1.10, 1.13, 1.16)):
        speculative = {"tokens_per_forward": 1.5 + 0.1 * seed, "speed_up": 1.2}
        acceptance = {"main": {"expected_tokens": 1}, "mtp_1": {"agreement": 0.6 + 0.1 * seed, "expected_tokens": 1.7}}
        found = losses(loss, loss + 0.5) | {"acceptance": acceptance, "speculative": speculative}
        run_of(root / f"seq{seed}", "sequential", 1, seed, evaluation=found)
    for seed in (0, 1):
        run_of(root / f"par{seed}", "parallel", 2, seed, evaluation=losses(1.3, 1.4, 1.5) if seed else None)
    run_of(root / "par2", "parallel", 2, 2, last=300, error="train.py: out of memory")
    run_of(root / "par3", "parallel", 2, 3, last=0)
    return root


@pytest.mark.usefixtures("undrawn")
def test_mean_and_standard_deviation_over_seeds(sweep, run):
    code, out, err = run(f"--sweep={sweep}")
    assert (code, err) == (0, "")
    learnt = rows_of(out, "runs: what was learnt (held-out documents, eval.json)")
    assert learnt[1] == ["kind", "depth", "runs", "main loss", "bits/byte", "loss by depth", "agreement by depth"]
    # 1.30, 1.34, 1.38: mean 1.34, squares of deviations 0.0016 + 0 + 0.0016 over two: 0.0016, its root 0.04
    assert learnt[2] == ["none", "-", "3", "1.340 ± 0.040", "2.680 ± 0.080", "-", "-"]
    assert learnt[4] == ["sequential", "1", "3", "1.130 ± 0.030", "2.260 ± 0.060", "1.630±0.030", "0.700±0.100"]
    # One of the two that are finished is evaluated: no training loss takes the place of the other's.
    assert learnt[3][:5] == ["parallel", "2", "2 of 4", "1.300 [1]", "2.600 [1]"]
    assert learnt[3][5:] == ["1.400[1]", "1.500[1]", "-", "-"]
    costs = {row[0]: row for row in rows_of(out, "runs: what it takes and yields")[2:]}
    assert costs["sequential"][-3:] == ["1.70 ± 0.00", "1.60 ± 0.10", "1.20 ± 0.00"]
    assert costs["none"][-3:] == ["1.00 ± 0.00", "-", "-"]
    assert costs["none"][5] == "1,301 ± 0"  # the median of 1001 ... 1600


@pytest.mark.usefixtures("undrawn")
def test_parameters_are_those_of_the_model(sweep, run):
    out = run(f"--sweep={sweep}")[1]
    costs = {row[0]: row for row in rows_of(out, "runs: what it takes and yields")[2:]}
    for kind, depth, folder in (("none", 1, "none0"), ("parallel", 2, "par0"), ("sequential", 1, "seq0")):
        config = read_config(sweep / folder)
        assert (config.mtp.kind, config.mtp.depth) == (kind, depth)
        counts = count_parameters(config.architecture)
        total = counts.total + counts.mtp_total
        assert costs[kind][3:5] == [f"{counts.total / 1e6:.2f}", f"{total / 1e6:.2f}"]


@pytest.mark.usefixtures("undrawn")
def test_no_run_is_dropped(sweep, run):
    lines = run(f"--sweep={sweep}")[1].splitlines()
    states = {line.split()[0]: re.split(r"\s{2,}", line)[-1] for line in lines[1:11]}
    assert states["par2"] == "failed: train.py: out of memory" and states["par3"] == "not started"
    assert set(states) == {path.name for path in sweep.iterdir() if path.is_dir()}
    assert [line for line in lines if line.startswith("par3")][0].split()[1:4] == ["-", "-", "-"]


@pytest.mark.usefixtures("undrawn")
def test_an_evaluation_of_fewer_steps_does_not_count(tmp_path, run):
    run_of(tmp_path / "a" / "x", evaluation=losses(1.0) | {"step": 300})
    run_of(tmp_path / "a" / "y", seed=1)
    out = run(f"--sweep={tmp_path / 'a'}")[1]
    assert "last logged training step" in out and "1.000" not in out


@pytest.mark.usefixtures("undrawn")
def test_without_evaluations_the_last_training_step_counts(tmp_path, run):
    folders = [run_of(tmp_path / "a" / str(seed), "sequential", 1, seed) for seed in (0, 1)]
    last = [read_metrics(folder / "metrics.jsonl")[-1] for folder in folders]
    low, high = sorted(row["loss_main"] for row in last)
    learnt = rows_of(run(f"--sweep={tmp_path / 'a'}")[1], "runs: what was learnt (last logged training step")
    mean, deviation = (low + high) / 2, (high - low) / math.sqrt(2)
    assert learnt[2][:3] == ["all runs", "2", f"{mean:.3f} ± {deviation:.3f}"]


@pytest.mark.usefixtures("undrawn")
def test_the_search_over_n(sweep, run):
    out = run(f"--sweep={sweep}")[1]
    title = "parallel heads, parameter-matched: the main model gives up a block for each"
    header, base, three = rows_of(out, f"search over n = 1 + depth: {title}")[-3:]
    assert header[:5] == ["n", "runs", "blocks", "main loss", "bits/byte"]
    assert base[:4] == ["1", "3", "4", "1.340 ± 0.040"] and three[:4] == ["3", "2 of 4", "2 + 2", "1.300 [1]"]
    _, base, two = rows_of(out, "search over n = 1 + depth: sequential modules, on top of the main model")[-3:]
    assert two[:4] == ["2", "3", "4 + 1", "1.130 ± 0.030*"]  # 0.21 apart, t = 7.3


@pytest.mark.usefixtures("undrawn")
def test_the_summary_fits_the_terminal_and_keeps_every_value(sweep, run):
    wide, narrow = (run(f"--sweep={sweep}", columns=columns)[1] for columns in (400, 80))
    tables = [text.partition("\ncurves:")[0] for text in (wide, narrow)]
    assert max(map(len, tables[0].splitlines())) > 100
    too_long = [line for line in tables[1].splitlines() if len(line) > 80]
    assert not too_long, too_long
    words = [text.split() for text in tables]
    assert not set(words[0]) - set(words[1])


@pytest.mark.usefixtures("undrawn")
def test_a_setting_that_also_differs_parts_the_tables(tmp_path, run):
    root, rate = tmp_path / "a", "optimizer.learning_rate"
    for i, (kind, value) in enumerate([("none", 0.001), ("none", 0.01), ("parallel", 0.001), ("parallel", 0.01)]):
        scores = {"benchmarks": {"sums": benchmark(0.1 * (i + 1), 0.02)}}
        run_of(root / str(i), kind, evaluation=losses(*[1.0 + i] * (1 + (i > 1))) | scores, **{rate: value})
    out = run(f"--sweep={root}")[1]
    for value, low, high in ((0.001, "1.000", "3.000"), (0.01, "2.000", "4.000")):
        rows = rows_of(out, f"block for each (learning_rate {value})")
        assert [row[3] for row in rows[-2:]] == [low, high]
        assert rows_of(out, f"benchmarks (learning_rate {value})")[-1][-1] == "+0.200*"


def benchmarked(root, scores, **facts):
    """Runs of {(kind, depth): [(value, stderr) of each seed]} on one task."""
    for (kind, depth), found in scores.items():
        for seed, (value, stderr) in enumerate(found):
            task = {"benchmarks": {"sums": benchmark(value, stderr, **facts)}}
            run_of(
                root / f"{kind}{depth}{seed}", kind, max(depth, 1), seed, evaluation=losses(*[1.0] * (1 + depth)) | task
            )
    return root


def test_benchmarks_beside_the_baseline(tmp_path, run):
    near = {("sequential", 1): [(0.21, 0.001), (0.24, 0.001), (0.27, 0.001)]}
    scores = {("none", 0): [(0.20, 0.001), (0.22, 0.001), (0.24, 0.001)]}
    far = {("parallel", 1): [(0.50, 0.001), (0.52, 0.001), (0.54, 0.001)]}
    root = tmp_path / "a"
    for (kind, depth), found in (scores | near | far).items():
        for seed, (value, stderr) in enumerate(found):
            tasks = {"choices": benchmark(0.5, 0.01, "likelihood"), "sums": benchmark(value, stderr)}
            evaluation = losses(*[1.0] * (1 + depth)) | {"benchmarks": tasks}
            run_of(root / f"{kind}{seed}", kind, max(depth, 1), seed, evaluation=evaluation)
    for columns in range(60, 140, 5):  # a difference stays beside the score it belongs to
        out = run(f"--sweep={root}", columns=columns)[1]
        assert re.search(r"^benchmark \(metric\) +shots", out, re.MULTILINE)
        assert not re.search(r"^benchmark \(metric\) +diff", out, re.MULTILINE), columns
    code, out, _ = run(f"--sweep={root}")
    table = rows_of(out, "\nbenchmarks")
    assert code == 0 and ["generative"] in table and ["likelihood-based"] in table
    (sums,) = [row for row in table if row[0] == "sums (exact_match)"]
    base, parallel, sequential = "0.220 ± 0.020", ["0.520 ± 0.020", "+0.300*"], ["0.240 ± 0.030", "+0.020"]
    assert sums[1:] == ["4", "200", base, *parallel, *sequential]
    (choices,) = [row for row in table if row[0].startswith("choices")]
    assert choices[3:] == ["0.500 ± 0.000", "0.500 ± 0.000", "+0.000", "0.500 ± 0.000", "+0.000"]
    assert table.index(["generative"]) < table.index(sums) < table.index(["likelihood-based"]) < table.index(choices)
    assert (root / "report_benchmarks.png").read_bytes().startswith(b"\x89PNG")


def runs_of_both_kinds(root):
    """Runs with one group of two tasks of both kinds, and a task outside: (generative, choice, other) of each seed."""
    scores = {
        ("none", 0): [(0.30, 0.50, 0.40), (0.32, 0.52, 0.40)],
        ("sequential", 1): [(0.40, 0.45, 0.60), (0.42, 0.47, 0.60)],
    }
    for (kind, depth), found in scores.items():
        for seed, (generated, chosen, other) in enumerate(found):
            choice = benchmark(chosen, 0.01, "likelihood", group="words")
            choice["metrics"]["acc_norm"] = {"value": chosen + 0.1, "stderr": 0.01}
            tasks = {"copy": benchmark(generated, 0.01, group="words"), "copy_choice": choice}
            tasks["sums"] = benchmark(other, 0.03)
            evaluation = losses(*[1.0] * (1 + depth)) | {"benchmarks": tasks}
            run_of(root / f"{kind}{seed}", kind, max(depth, 1), seed, evaluation=evaluation)
    return root


def test_means_over_benchmarks_and_the_normalized_accuracy(tmp_path, run):
    root = runs_of_both_kinds(tmp_path / "a")
    code, out, _ = run(f"--sweep={root}", f"--json={tmp_path / 'values.json'}")
    table = rows_of(out, "\nbenchmarks")
    (mean,) = [row for row in table if row[0].startswith("mean of the")]  # one likelihood-based task: no mean
    # baseline (0.30 + 0.40) / 2 and (0.32 + 0.40) / 2; sequential (0.40 + 0.60) / 2 and (0.42 + 0.60) / 2
    assert mean == ["mean of the 2 main metrics", "-", "-", "0.355 ± 0.007", "0.505 ± 0.007", "+0.150*"]
    (normalized,) = [row for row in table if "acc_norm" in row[0]]
    assert normalized[0] == "words: copy_choice (acc_norm)" and normalized[3:] == [
        "0.610 ± 0.014",
        "0.560 ± 0.014",
        "-0.050",
    ]
    balance = ["-0.155 ± 0.007", "0.045 ± 0.007", "+0.200*"]  # 0.355 - 0.51, 0.505 - 0.46
    assert table[-2:] == [["balance"], ["mean generative - mean likelihood", "-", "-", *balance]]
    values = json.loads((tmp_path / "values.json").read_text())
    (found,) = [v["means"] for v in values["variants"] if v["settings"]["mtp.kind"] == "sequential"]
    assert found["generative"]["tasks"] == ["copy", "sums"] and found["likelihood"]["tasks"] == ["copy_choice"]
    assert math.isclose(found["generative"]["stderr"], math.hypot(0.01, 0.03) / 2)
    # t = 0.15 / 0.00707 (equal deviations, n = 2 each): 21.2 with two degrees of freedom
    assert found["generative"]["p_value"] == pytest.approx(0.0022, abs=1e-4) and found["generative"]["beyond_noise"]
    difference = found["generative_minus_likelihood"]
    assert difference["difference"] == pytest.approx(0.2) and difference["p_value"] == pytest.approx(0.00125, abs=2e-5)
    assert difference["stderr"] == pytest.approx(math.hypot(0.01, 0.03, 2 * 0.01) / 2)
    assert code == 0 and (root / "report_balance.png").read_bytes().startswith(b"\x89PNG")


def test_the_balance_pairs_seeds(tmp_path, monkeypatch):
    """A point is a seed minus the baseline's same seed, likelihood across and generative up."""
    found = variants.variants_of(runs.load_runs([], [str(runs_of_both_kinds(tmp_path / "a"))]))
    figures = []
    monkeypatch.setattr(pictures, "_save", lambda figure, _: figures.append(figure))
    assert pictures.draw_balance(found, tmp_path / "x.png")
    axes = figures[0].axes
    assert [axis.get_title(loc="left") for axis in axes] == ["all benchmarks, mean", "words"]
    points = [
        [tuple(map(float, line.get_xydata()[0])) for line in a.get_lines() if line.get_marker() == "."] for a in axes
    ]
    for got, wanted in zip(points, [[(-0.05, 0.15)] * 2, [(-0.05, 0.10)] * 2], strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-9)
    others = [v for v in found if not v.is_baseline]
    assert not pictures.draw_balance(others, tmp_path / "y.png")  # no baseline


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("baseline", "other", "marked"),
    [
        # one seed: the standard errors of the task decide, 1.96 * sqrt(2) * 0.05 = 0.139
        ([(0.20, 0.05)], [(0.35, 0.05)], True),
        ([(0.20, 0.05)], [(0.33, 0.05)], False),
        ([(0.20, None)], [(0.90, None)], False),  # nothing is known of chance
        ([(0.20, 0.01)], [(0.90, None)], False),
        # seeds agree, but on too few documents
        ([(0.20, 0.05), (0.20, 0.05)], [(0.30, 0.05), (0.30, 0.05)], False),
        ([(0.20, None), (0.20, None)], [(0.30, None), (0.30, None)], True),
        # many documents, but seeds that scatter: two of each have one degree of freedom or two, t = 4.3 at least
        ([(0.20, 1e-3), (0.30, 1e-3)], [(0.35, 1e-3), (0.45, 1e-3)], False),
        ([(0.20, 1e-3), (0.21, 1e-3)], [(0.35, 1e-3), (0.36, 1e-3)], True),
    ],
)
def test_what_is_inside_the_noise_is_not_marked(baseline, other, marked, tmp_path, run):
    root = benchmarked(tmp_path / "a", {("none", 0): baseline, ("sequential", 1): other})
    row = rows_of(run(f"--sweep={root}")[1], "\nbenchmarks")[-1]
    assert row[0] == "sums (exact_match)" and row[-1].endswith("*") == marked
    if len(baseline) == 1 and baseline[0][1] is not None:
        assert row[3] == f"0.200 ({baseline[0][1]:.3f})"


def test_the_test_over_seeds_is_welchs():
    from scipy.stats import ttest_ind

    rng, found = np.random.default_rng(0), []
    for _ in range(300):
        one = rng.normal(0, 1, rng.integers(2, 6))
        other = rng.normal(2, rng.uniform(0.2, 2), rng.integers(2, 6))
        found.append(variants.beyond_noise(variants.Sample(tuple(one)), variants.Sample(tuple(other))))
        assert found[-1] == (ttest_ind(one, other, equal_var=False).pvalue < 0.05)
    assert 50 < sum(found) < 250


def test_a_single_run_is_assumed_to_have_the_deviation_of_the_other_side():
    """The same as Student's test of one run against several; a difference by the documents alone is not enough."""
    from scipy.stats import ttest_ind

    rng, found = np.random.default_rng(1), []
    for _ in range(200):
        one, other = rng.normal(0, 1, 1), rng.normal(3, 1, rng.integers(2, 6))
        sides = [variants.Sample(tuple(side), (1e-3,) * len(side)) for side in (one, other)]
        found.append(variants.beyond_noise(*sides))
        assert found[-1] == variants.beyond_noise(*sides[::-1]) == (ttest_ind(one, other).pvalue < 0.05)
    assert 30 < sum(found) < 170


@pytest.mark.usefixtures("undrawn")
def test_without_a_baseline_there_are_no_differences(tmp_path, run):
    root = benchmarked(tmp_path / "a", {("sequential", 1): [(0.2, 0.1)], ("parallel", 1): [(0.3, 0.1)]})
    out = run(f"--sweep={root}")[1]
    assert "there is no run with mtp.kind=none" in out and not re.search(r"\bdiff\b", out)


@pytest.mark.usefixtures("undrawn")
def test_every_seed_is_listed(tmp_path, run):
    """A mean of 0.75 does not describe runs at 0.5 and 1."""
    scores = {("none", 0): [(0.5, 0.1), (0.49, 0.1)], ("sequential", 1): [(0.5, 0.1), (1.0, 0.1)]}
    root = benchmarked(tmp_path / "a", scores)
    rows = rows_of(run(f"--sweep={root}")[1], "\nbenchmarks of every seed")
    assert ["sums (exact_match)", "sequential, depth 1", "0.500", "1.000"] in rows
    assert ["sums (exact_match)", "none", "0.500", "0.490"] in rows
    one = run(f"--sweep={benchmarked(tmp_path / 'b', {('none', 0): [(0.5, 0.1)]})}")[1]
    assert "every seed" not in one


def test_tasks_of_a_group_that_has_a_number_are_not_listed():
    found = {"all": {"group": None}, "all_a": {"group": "all"}, "other_a": {"group": "other"}}
    run = types.SimpleNamespace(is_finished=True, results=lambda: {"benchmarks": found})
    shown = variants.shown_benchmarks([variants.Variant({}, (run,))])
    assert [name for name, _ in shown] == ["all", "other_a"]


@pytest.mark.usefixtures("undrawn")
def test_lower_is_better_is_stated(tmp_path, run):
    root = benchmarked(tmp_path / "a", {("none", 0): [(0.2, 0.1)]}, higher_is_better=False, group="arithmetic")
    assert "arithmetic: sums (exact_match, lower is better)" in run(f"--sweep={root}")[1]


@pytest.mark.usefixtures("undrawn")
def test_markdown_and_json(sweep, run, tmp_path):
    markdown, values = tmp_path / "tables.md", tmp_path / "values.json"
    assert run(f"--sweep={sweep}", f"--markdown={markdown}", f"--json={values}")[0] == 0
    text = markdown.read_text()
    assert "### runs: what was learnt" in text and "| none | - | 3 | 1.340 ± 0.040 | 2.680 ± 0.080 | - | - |" in text
    assert "1.130 ± 0.030\\*" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    found = json.loads(values.read_text(), parse_constant=pytest.fail)
    assert found["source"] == "validation" and len(found["runs"]) == 10
    (sequential,) = [v for v in found["variants"] if v["settings"]["mtp.kind"] == "sequential"]
    assert (sequential["n"], sequential["num_runs"]) == (2, 3)
    loss = sequential["measures"]["loss_main"]
    assert (loss["n"], loss["mean"], loss["deviation"]) == (3, pytest.approx(1.13), pytest.approx(0.03))


def test_a_mean_curve_is_of_the_steps_that_all_seeds_have():
    one, other = [(1, 1.0), (2, 2.0), (3, 3.0)], [(2, 4.0), (3, 5.0), (4, 6.0)]
    assert pictures.mean_curve([one, other]) == [(2, 3.0), (3, 4.0)]
    assert pictures.mean_curve([one]) == one


def test_seeds_are_thin_and_their_mean_is_bold(sweep, monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(pictures, "_save", lambda figure, output: figures.append(figure))
    pictures.draw(variants.variants_of(runs.load_runs([], [str(sweep)])), tmp_path / "x.png")
    axes = {axis.get_title(loc="left"): axis for axis in figures[0].axes}
    assert {"loss, main", "loss, depth 1", "loss, depth 2", "agreement with the main head, depth 2"} <= set(axes)
    lines = axes["loss, main"].get_lines()
    widths = {color: [x.get_linewidth() for x in lines if x.get_color() == color] for color in ("C0", "C1", "C2")}
    assert [(sum(w < 1 for w in ws), sum(w > 1.5 for w in ws)) for ws in widths.values()] == [(3, 1), (3, 1), (3, 1)]
    (mean,) = [x for x in lines if x.get_color() == "C1" and x.get_linewidth() > 1.5]
    assert len(mean.get_xdata()) == 600  # of the finished two: the seed that failed at step 300 does not shorten it
    bands = axes["loss, main"].collections
    assert len(bands) == 3 and axes["loss, main"].get_ylabel() == "nats per token"
    outline = bands[1].get_paths()[0].vertices
    step = 100
    seeds = [1.8 + 3 / step + 0.03 * math.sin(7 * step + seed) for seed in (0, 1)]
    found = outline[outline[:, 0] == step, 1]
    assert (min(found), max(found)) == (pytest.approx(min(seeds)), pytest.approx(max(seeds)))


@pytest.mark.usefixtures("undrawn")
def test_sweeps_and_workdirs_together_and_each_run_once(sweep, run, tmp_path):
    alone = make_run(tmp_path / "alone")
    argv = [f"--sweep={sweep}", f"--sweep={sweep.parent}", f"--workdir={sweep / 'none0'}", f"--workdir={alone}"]
    lines = run(*argv, f"--output={tmp_path / 'x.png'}")[1].splitlines()
    names = [line.split()[0] for line in lines[1 : lines.index("")]]
    assert len(names) == len(set(names)) == 11 and "alone" in " ".join(names)


@pytest.mark.usefixtures("undrawn")
def test_unusable_sweeps(tmp_path, run, sweep):
    (tmp_path / "empty").mkdir()
    corrupt = run_of(tmp_path / "corrupt" / "x")
    (corrupt / "eval.json").write_text("{")
    cases = [
        ([f"--sweep={tmp_path / 'absent'}"], "no such folder"),
        ([f"--sweep={tmp_path / 'empty'}"], "no run in it or below it"),
        ([f"--sweep={tmp_path / 'corrupt'}"], "eval.json: cannot be read as JSON"),
        ([f"--workdir={sweep}"], f"give the folder of a run, or --sweep={sweep}"),
        ([f"--sweep={sweep}", f"--json={tmp_path}"], "cannot be written (Is a directory)"),
        ([f"--sweep={sweep}", f"--markdown={tmp_path}"], "cannot be written (Is a directory)"),
    ]
    for argv, message in cases:
        code, _, err = run(*argv)
        assert code == 2 and message in err and err.count("\n") == 1, (argv, err)


def test_a_sweep_of_which_nothing_has_begun(tmp_path, run):
    run_of(tmp_path / "a" / "x", last=0)
    code, out, _ = run(f"--sweep={tmp_path / 'a'}")
    assert code == 0 and "not started" in out and "no curves" in out


@pytest.mark.usefixtures("undrawn")
def test_a_config_of_another_version_is_no_obstacle(tmp_path, run):
    folders = [run_of(tmp_path / "a" / str(seed), seed=seed, evaluation=losses(1.0 + seed)) for seed in (0, 2)]
    values = json.loads((folders[0] / "config.json").read_text())
    values["model"]["of_old"] = 1
    (folders[0] / "config.json").write_text(json.dumps(values))
    code, out, _ = run(f"--sweep={tmp_path / 'a'}")
    assert code == 0 and "2.000 ± 1.414" in out


def test_a_line_that_cannot_be_read_is_noted_and_left_out(tmp_path, run):
    good = make_run(tmp_path / "good", num_steps=2)
    path = good / "metrics.jsonl"
    path.write_text("x\n" + path.read_text())
    code, out, err = run(f"--workdir={good}")
    assert code == 0 and "good" in out
    assert "line 1 is not a JSON object with a step and is dropped" in err
