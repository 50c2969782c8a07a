"""Tables of runs, and a PNG of their curves.

    python -m mtp_jax.tools.report --workdir=runs/a [--workdir=runs/b ...] [--output=report.png]
    python -m mtp_jax.tools.report --sweep=DIR [--sweep=DIR2 ...] [--markdown=FILE] [--json=FILE]

Runs that differ only in their seed are one variant, with mean and standard deviation. Besides the newest values of
every run, the tables show losses and costs of the variants (runs), the search over n, and benchmarks beside the
baseline, each if there is something to compare. Values on held-out documents come from the eval.json in a run's folder
(eval.py --output=DIR/eval.json; tools.sweep writes it). Benchmarks have a separate PNG, NAME_benchmarks.png, and a
second one, NAME_balance.png, where the baseline and others have generative and likelihood benchmarks: the differences.

Exit code 2 with one line if a workdir has no metrics, or a sweep no runs.
"""

import importlib.util
import json
import shutil
from typing import TYPE_CHECKING

from etils import epath

from mtp_jax import cli, storage
from mtp_jax.config import UserError

if TYPE_CHECKING:  # imports jax: errors in the arguments are reported before
    from mtp_jax.tools.reporting.runs import Run
    from mtp_jax.tools.reporting.table import Table

NO_MATPLOTLIB = "matplotlib is not installed; pip install matplotlib (the extra plot)"


def main(argv: list[str]) -> None:
    flags = cli.parser(__doc__)
    flags.add_argument("--workdir", action="append", default=[], help="folder of a run; may be given repeatedly")
    flags.add_argument("--sweep", action="append", default=[], help="a folder with runs below it; likewise")
    flags.add_argument("--output", help="the PNG of curves; default: report.png in the first folder")
    flags.add_argument("--markdown", help="write the tables to this file too, as Markdown")
    flags.add_argument("--json", help="write all numbers to this file too")
    args = flags.parse_args(argv)
    if not args.workdir and not args.sweep:
        raise UserError("--workdir or --sweep is needed: the folder of a run, or one with runs below it; see --help")
    first = [*args.sweep, *args.workdir][0]
    output = (
        storage.path(args.output, "--output")
        if args.output
        else storage.path(first, "--sweep" if args.sweep else "--workdir") / "report.png"
    )
    if output.suffix != ".png":
        raise UserError(f"--output={output}: must end in .png")
    if args.output and not _has_matplotlib():
        raise UserError(f"--output={output}: {NO_MATPLOTLIB}")

    from mtp_jax.tools.reporting import variants as grouping  # imports jax
    from mtp_jax.tools.reporting.runs import load_runs

    runs = load_runs(args.workdir, args.sweep)
    variants, source = grouping.variants_of(runs), grouping.best_source(runs)
    tables = make_tables(runs, variants, source)
    width = shutil.get_terminal_size().columns  # 80 where there is no terminal
    print("\n\n".join(table.text(width) for table in tables))
    if args.markdown:
        cli.write_output("markdown", args.markdown, "\n\n".join(table.markdown() for table in tables))
    if args.json:
        cli.write_output("json", args.json, json.dumps(grouping.as_json(runs, variants, source), indent=1))
    _draw(variants, output)


def make_tables(runs: list["Run"], variants: list, source: str) -> list["Table"]:
    """Returns the tables that apply to these runs."""
    from mtp_jax.tools.reporting import tables

    out = [tables.newest(runs)]
    if len(runs) > 1 or any(run.evaluation for run in runs):
        out += [tables.learnt(variants, source), tables.costs(variants, source)]
    out += [*tables.searches(variants, source), *tables.benchmarks(variants)]
    seeds = tables.each_seed(variants)
    return [*out, seeds] if seeds else out


def _has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _draw(variants: list, output: epath.Path) -> None:
    if not any(run.rows for variant in variants for run in variant.runs):
        print("no curves: no run has logged a step yet")
        return
    if not _has_matplotlib():
        print(f"no curves: {NO_MATPLOTLIB}")
        return
    from mtp_jax.tools.reporting import pictures

    bars = output.with_name(f"{output.stem}_benchmarks.png")
    balance = output.with_name(f"{output.stem}_balance.png")
    try:
        pictures.draw(variants, output)
        has_bars = pictures.draw_benchmarks(variants, bars)
        has_balance = pictures.draw_balance(variants, balance)
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written ({storage.reason(error)})") from error
    print(f"curves: {output}")
    if has_bars:
        print(f"benchmarks: {bars}")
    if has_balance:
        print(f"generative against likelihood: {balance}")


def command() -> None:
    """Runs the command line of this process: mtp-report."""
    cli.run(main)


if __name__ == "__main__":
    command()
