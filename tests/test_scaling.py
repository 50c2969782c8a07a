"""benchmarks/scaling.py: its cases, its reading of a profile, and a measurement on CPU devices."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import scaling
from benchmarks.measuring import collective_of, communication
from tests.commands import QUICK, run_process


def event(begin, end, op="fusion.1", name="kernel"):
    return SimpleNamespace(start_ns=begin, duration_ns=end - begin, stats=[("hlo_op", op)], name=name)


def test_exposed_communication_is_the_time_of_collectives_without_another_kernel():
    gpu = [event(0, 4e6), event(2e6, 8e6, "all-gather-start.3"), event(6e6, 7e6), event(9e6, 10e6, "reduce-scatter")]
    found = communication([gpu, []], num_steps=1)
    assert (found["communication_ms"], found["exposed_ms"]) == (7, 4)
    assert found["collectives_ms"] == {"all-gather": 6, "reduce-scatter": 1}
    assert communication([[]], 1)["exposed_ms"] is None


@pytest.mark.parametrize(
    ("op", "name", "kind"),
    [
        ("ragged-all-to-all-start.1", "RaggedAllToAllKernel", "ragged-all-to-all"),
        ("", "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "AllGather"),
        ("loop_convert_fusion", "loop_convert_fusion", ""),
    ],
)
def test_collectives_are_recognized(op, name, kind):
    assert collective_of(event(0, 1, op, name)) == kind


def arguments(**changed):
    given = {"configs": ["moe_4b"], "mtp": ["none"], "flags": ["default"], "meshes": ["data=1", "fsdp=2+expert=2"]}
    return SimpleNamespace(**given | {"rows_per_gpu": [], "rows": [], "reference": False} | changed)


def test_weak_and_strong_scaling_and_the_references():
    found = scaling.cases(arguments(rows_per_gpu=[2], rows=[8]), [])
    assert [(c.mesh, c.num_gpus, c.rows) for c in found] == [
        *(("data=1", 1, 2), ("data=1", 1, 8)),
        ("fsdp=2+expert=2", 4, 8),  # 2 rows per GPU are 8 rows
    ]
    more = scaling.cases(arguments(meshes=["data=1", "fsdp=4"], rows_per_gpu=[2], reference=True), [])[2:]
    assert [(c.mesh, c.rows, c.micro_batches) for c in more] == [("data=1", 8, 4)]


def line(mesh, num_gpus, rows, losses=(1.0,), rate=100.0, **more):
    case = {"config": "m", "mesh": mesh, "rows": rows, "mtp": "none", "flags": "default", "overrides": []}
    measured = {"tokens_per_second_per_gpu": rate, "losses": list(losses), "micro_batches": 1}
    return case | measured | {"num_gpus": num_gpus, **more}


def test_losses_are_compared_with_one_gpu_and_the_same_batches():
    lines = [line("data=1", 1, 2, [9.0]), line("data=1", 1, 4, [2.0, 1.0], micro_batches=2)]
    two = line("fsdp=2", 2, 4, [2.0, 1.1])
    assert scaling.loss_difference(two, [*lines, two]) == pytest.approx(0.1)
    assert scaling.loss_difference(line("data=2", 2, 6), lines) is None
    failed = line("expert=2", 2, 4, error="RESOURCE_EXHAUSTED")
    rows = scaling.table([*lines, two, failed]).splitlines()
    assert len(rows) == 2 + 3 and "1.0e-01" in rows[3] and "RESOURCE_EXHAUSTED" in rows[4]
    assert scaling.curves([*lines, two]) == {"m, MTP none, fsdp, 2 rows per GPU": [(2, 100.0), (1, 100.0)]}


def test_cases_run_in_processes_of_their_own_and_a_failed_one_has_a_line(tmp_path):
    output = tmp_path / "scaling.jsonl"
    small = ["--config.model.num_layers=2", "--config.model.embed_dim=32", "--config.data.sequence_length=16"]
    done = run_process(
        *("benchmarks/scaling.py", "--configs=tiny", "--meshes=data=1,fsdp=2,expert=3", "--rows=4", *small),
        *("--steps=1", "--warm=1", "--gpus=0,1,2", "--seconds=250", f"--output={output}", "--no_profile"),
        env=QUICK,
    )
    lines = {each["mesh"]: each for each in map(json.loads, output.read_text().splitlines())}
    assert done.returncode == 1, done.stderr
    assert lines["fsdp=2"]["losses"] == pytest.approx(lines["data=1"]["losses"], rel=1e-4)
    assert len(lines["fsdp=2"]["losses"]) == 2 and lines["fsdp=2"]["num_gpus"] == 2
    assert "data.batch_size=4: does not divide over the mesh" in lines["expert=3"]["error"]
    assert "| fsdp=2 | 2 | 4 |" in done.stdout
