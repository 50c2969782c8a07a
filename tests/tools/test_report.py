"""The report command: its table, its picture, and its one-line errors."""

import json
import math

import pytest

from mtp_jax import cli
from mtp_jax.tools import report
from mtp_jax.tools.reporting import pictures, runs, table


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
    """Run the command: exit code, stdout, stderr."""

    def command(*argv):
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
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "metrics.jsonl").write_text("x\n{}\n")
    good = make_run(tmp_path / "good", num_steps=2)
    cases = [
        ([f"--workdir={tmp_path / 'absent'}"], "no such folder"),
        ([f"--workdir={tmp_path / 'empty'}"], "has no metrics.jsonl"),
        ([f"--workdir={tmp_path / 'blank'}"], "logged nothing yet"),
        ([f"--workdir={tmp_path / 'broken'}"], "line 1 is not a JSON object"),
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
