"""Memory and speed of a config on a TPU slice, without the slice: the real training step is compiled on a CPU.

    python -m mtp_jax.tools.plan --config=configs/NAME.py --topology=v5p:4x4x4 [--slices=N] [--json=FILE]
        [--search] [--config.section.key=VALUE ...]

Prints the memory in use and that of the chip, the largest buffers by source line, collectives, and a roofline. With
--search, tries meshes, recomputation and micro-batches, and prints the best. Requires libtpu (the extra tpu). Exit
codes: 0 the step fits, 1 it does not ("needs X of Y GiB"), 2 unusable arguments or config.
"""

import argparse
import json

from mtp_jax import cli, config, signals
from mtp_jax.tools.planning.topology import Topology, open_topology, prepare_environment
from mtp_jax.typing import JsonObject


def main(argv: list[str]) -> None:
    args, overrides = cli.parse(_flags(), argv)
    resolved = config.load_config(args.config, overrides)
    if args.json:
        cli.check_output("json", args.json)
    prepare_environment()
    topology = open_topology(args.topology, args.slices)
    _write(args.json, _search(resolved, topology, args) if args.search else _plan(resolved, topology, args.json))


def _flags() -> argparse.ArgumentParser:
    flags = cli.parser(__doc__)
    config.shipped.add_flag(flags)
    flags.add_argument("--topology", required=True, help="generation:chips, as in v5p:4x4x4, v5e:4x4, v6e:8x8")
    flags.add_argument("--slices", type=int, default=1, help="slices joined by the data center's network")
    flags.add_argument("--json", help="write everything to this file too")
    flags.add_argument("--search", action="store_true", help="try meshes, remat policies and batch sizes")
    flags.add_argument("--tries", type=int, default=12, help="with --search: how many plans are compiled at most")
    return flags


def _plan(resolved: config.Config, topology: Topology, output: str | None) -> JsonObject:
    from mtp_jax.tools.planning import estimate, plan_text  # imports jax
    from mtp_jax.tools.planning.compile import resolve

    plan = estimate.make_plan(resolve(resolved, topology), topology)
    if not plan.fits:
        _write(output, estimate.to_json(plan))
        raise estimate.OverFull(estimate.over_full_message(plan))
    print(plan_text.report(plan))
    return estimate.to_json(plan)


def _search(resolved: config.Config, topology: Topology, args: argparse.Namespace) -> JsonObject:
    from mtp_jax.tools.planning import search

    found = search.search(resolved, topology, args.tries)
    print(search.table(found, args.config, topology))
    return {"plans": [search.to_json(one) for one in found]}


def _write(output: str | None, result: JsonObject) -> None:
    if output:
        cli.write_output("json", output, json.dumps(result, indent=1))


def command() -> None:
    """Runs the command line of this process: mtp-plan."""
    signals.install()  # Ctrl-C during a compilation
    cli.run(main)


if __name__ == "__main__":
    command()
