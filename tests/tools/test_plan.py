"""The planner: what it reads from compiled programs, against small programs whose numbers are known."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.config import UserError, load_config
from mtp_jax.errors import warn_once
from mtp_jax.kernels import grouped_matmul as grouped
from mtp_jax.kernels.attention import Mask, splash
from mtp_jax.kernels.grouped_matmul import megablox
from mtp_jax.tools import plan as plan_command
from mtp_jax.tools.planning import buffers, calibration, collectives, estimate, hlo, roofline, search, topology, traffic
from mtp_jax.tools.planning.compile import compile_step, resolve
from mtp_jax.tools.planning.matmul_flops import matmul_flops
from mtp_jax.training.flops import train_flops_per_token
from tests.commands import run_here

MESH = {"data": 2, "fsdp": 4}

# A loop of 26 runs around an inner one of 8, a fusion, and a loop whose bound is known only at run time.
TEXT = """HloModule jit_step, is_scheduled=true

FileNames
1 "/somewhere/mtp_jax/layers/moe.py"
2 "/somewhere/jax/lax.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=60 end_line=60 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=9 end_line=9 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

%cut (p0: f32[26,128], p1: s32[]) -> f32[1,128] {
  %p0 = f32[26,128]{1,0:T(8,128)} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %ds = f32[1,128]{1,0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,128}
}

%inner_condition (i: (s32[])) -> pred[] {
  %c8 = s32[]{:T(128)} constant(8)
  %i0 = s32[] get-tuple-element(%i), index=0
  ROOT %less = pred[] compare(%i0, %c8), direction=LT
}

%inner (i: (s32[], bf16[4,128])) -> (s32[], bf16[4,128]) {
  %x = bf16[4,128]{1,0} get-tuple-element(%i), index=1
  %send = (bf16[4,128]{1,0}, bf16[4,128]{1,0}) collective-permute-start(%x), PAIRS
  %sent = bf16[4,128]{1,0} collective-permute-done(%send)
}

%outer_condition (i: (s32[])) -> pred[] {
  %c26 = s32[] constant(26)
  ROOT %lt = pred[] fusion(%i, %c26), kind=kLoop, calls=%lt_body
}

%outer (i: (s32[], f32[26,128])) -> (s32[], f32[26,128]) {
  %w = f32[26,128]{1,0:T(8,128)} get-tuple-element(%i), index=1
  %n = s32[] get-tuple-element(%i), index=0
  %slice = f32[1,128]{1,0} fusion(%w, %n), kind=kLoop, calls=%cut
  %whole = f32[4,128]{1,0:T(8,128)S(1)} all-gather(%slice), channel_id=1, GROUPS, metadata={stack_frame_id=2}
  %loop = (s32[], bf16[4,128]) while(%t), condition=%inner_condition, body=%inner
}

%all-reduce-scatter.2 (g: bf16[64,128]) -> bf16[16,128] {
  %g = bf16[64,128]{1,0} parameter(0)
  %reduced = bf16[64,128]{1,0} all-reduce(%g), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %mine = bf16[16,128]{1,0} dynamic-slice(%reduced, %at), dynamic_slice_sizes={16,128}
}

%round_condition (i: (s32[], s32[])) -> pred[] {
  ROOT %less = pred[] compare(%a, %b), direction=LT
}

%round (i: (s32[], s32[])) -> (s32[], s32[]) {
  %more = f32[8,8]{1,0} all-to-all(%z), replica_groups={{0,1,2,3,4,5,6,7}}
}

ENTRY %main (p: f32[26,128]) -> f32[] {
  %p = f32[26,128]{1,0} parameter(0)
  %kept = bf16[16,128]{1,0} fusion(%grads), kind=kCustom, calls=%all-reduce-scatter.2
  %first = (s32[], f32[26,128]) while(%p), condition=%outer_condition, body=%outer
  %second = (s32[], s32[]) while(%p), condition=%round_condition, body=%round
  %sum = f32[8,8]{1,0} all-reduce(%z), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
}
"""
TEXT = TEXT.replace("PAIRS", "source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}")
TEXT = TEXT.replace("GROUPS", "replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}")


def test_what_is_in_a_loop_counts_as_often_as_it_runs():
    module = hlo.parse(TEXT)
    assert [module.times[n] for n in ("main", "outer", "inner", "cut", "round")] == [1, 26, 26 * 8, 26, 0]
    assert module.fused >= {"cut"}


def test_collectives_by_kind_axis_and_bytes():
    module = hlo.parse(TEXT)
    module.computations["main"].insert(0, hlo.Instruction("z", "f32[8,8]{1,0}", "parameter", "1)"))
    found = {c.kind: c for c in collectives.collectives(module, MESH)}
    assert set(found) == {"all-gather", "collective-permute", "all-reduce", "reduce-scatter"}
    assert found["reduce-scatter"].bytes == 64 * 128 * 2 * 3 / 4
    gather = found["all-gather"]
    assert (gather.axes, gather.group, gather.times, gather.source) == (("fsdp",), 4, 26, "layers/moe.py:60")
    assert (gather.bytes, gather.payload) == (26 * 3 * 512, 26 * 4 * 512)
    permute = found["collective-permute"]
    assert (permute.axes, permute.group, permute.times, permute.bytes) == (("fsdp",), 4, 208, 208 * 1024)
    reduce = found["all-reduce"]
    assert (reduce.axes, reduce.group, reduce.bytes) == (("data",), 2, 256)
    rows = estimate.by_kind(list(found.values()))
    assert rows[0]["kind"] == "collective-permute" and rows[0]["bytes_sent"] == 208 * 1024


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, x", [[0, 1], [2, 3]]),
        ("replica_groups={}, x", [[0, 1, 2, 3]]),
    ],
)
def test_every_way_of_writing_groups(text, groups):
    assert collectives.replica_groups(text, 4) == groups


def test_a_program_compiled_here_is_read_as_it_is():
    """jax's own loop, gather and reduction on eight devices; no hand-written text."""
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def f(w, x):
        def body(x, w):
            return jnp.tanh(x @ jax.lax.all_gather(w, "fsdp", tiled=True)), None

        return jax.lax.psum(jax.lax.scan(body, x, w)[0], "data")

    specs = {"in_specs": (jax.P(None, "fsdp"), jax.P(("data", "fsdp"))), "out_specs": jax.P("fsdp")}
    f = jax.jit(jax.shard_map(f, mesh=mesh, check_vma=False, **specs))
    traced = f.trace(jax.ShapeDtypeStruct((5, 64, 64), "float32"), jax.ShapeDtypeStruct((16, 64), "float32"))
    assert matmul_flops(traced.jaxpr.jaxpr, 8) == 5 * 2 * 16 * 64 * 64
    module = hlo.parse(traced.lower().compile().as_text())
    found = collectives.collectives(module, MESH)
    summary = {(c.kind, c.axes): (c.times, c.bytes, c.payload) for c in found}
    assert summary == {
        ("all-gather", ("fsdp",)): (5, 5 * 64 * 64 * 4 * 3 / 4, 5 * 64 * 64 * 4),
        ("all-reduce", ("data",)): (1, 2 * 64 * 4, 2 * 64 * 4),
    }
    assert traffic.memory_bytes(module) > 5 * 64 * 64 * 4


def test_flops_of_the_real_step_are_the_models_own():
    """Without recomputation, and with attention over all of a row where the model counts the causal half of it."""
    config = load_config("configs/dense_1b.py", ["--config.model.remat=none"])
    config = replace(config, mesh=replace(config.mesh, data=1, fsdp=1), data=replace(config.data, batch_size=1))
    from mtp_jax import sharding
    from mtp_jax.tools.planning.compile import abstract_batch
    from mtp_jax.training.step import make_trainer

    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        trainer = make_trainer(config, mesh)
        traced = trainer.step.trace(trainer.abstract_state, abstract_batch(config, trainer))
    counted = matmul_flops(traced.jaxpr.jaxpr, 1)
    model = train_flops_per_token(config) * config.data.sequence_length
    assert model < counted < 1.35 * model


def test_flops_of_kernels_are_those_of_the_blocks_they_compute():
    shapes = [jax.ShapeDtypeStruct((2, 2048, heads, dim), "bfloat16") for heads, dim in ((4, 192), (2, 192), (2, 128))]

    def attend(q, k, v):
        return splash.attend(q, k, v, Mask(), None, 0.1).astype(jnp.float32).sum()

    pairs = 2 * 4 * 512 * 512 * (4 * 5 / 2)  # four blocks per row, those above the diagonal left out
    forward = 2 * (192 + 128)
    backward = 2 * (2 * 192 + 128) + 2 * (2 * 192 + 2 * 128)  # dq; dk and dv
    assert matmul_flops(jax.make_jaxpr(attend)(*shapes).jaxpr, 1) == pairs * forward
    both = matmul_flops(jax.make_jaxpr(jax.grad(attend, (0, 1, 2)))(*shapes).jaxpr, 1)
    assert both == pytest.approx(pairs * (forward + backward), rel=1e-3)  # and normalisers

    def attend_near(q, k, v):
        return splash.attend(q, k, v, Mask(window=512), None, 0.1)

    near = 2 * 4 * 512 * 512 * (1 + 3 * 2)  # the first block of queries reaches over one block of keys, the others two
    assert matmul_flops(jax.make_jaxpr(attend_near)(*shapes).jaxpr, 1) == near * forward

    x, w, sizes = (
        jax.ShapeDtypeStruct(*a) for a in (((256, 128), "bfloat16"), ((4, 128, 384), "bfloat16"), ((4,), "int32"))
    )
    assert matmul_flops(jax.make_jaxpr(megablox.product)(x, w, sizes).jaxpr, 1) == 2 * 256 * 128 * 384


KERNEL = """ENTRY %main (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0} parameter(0)
  %kernel = (f32[8,128]{1,0}, f32[8,128]{1,0:S(1)}) custom-call(%p, %p), custom_call_target="tpu_custom_call", a={b={
"c":"d"
}}, metadata={op_name="kernel"}
  %double = f32[8,128]{1,0} add(%p, %p)
}
"""


def test_attributes_of_several_lines_end_no_program():
    module = hlo.parse(KERNEL)
    assert [i.name for i in module.computations["main"]] == ["p", "kernel", "double"]
    assert 'op_name="kernel"' in module.computations["main"][1].rest
    assert traffic.memory_bytes(module) == (3 + 3) * 8 * 128 * 4  # operands and results, but what stays on the chip


ASSIGNMENT = """BufferAssignment:
allocation 0: size 4096, thread-local:
allocation 1: size 1048576, parameter 0, shape |f32[512,512]| at ShapeIndex {}, maybe-live-out:
 value: <1 p @0> (size=1048576,offset=0): f32[512,512]{1,0}
allocation 2: size 512, color 6, preallocated-temp:
allocation 3: size 3145728, preallocated-temp:
 value: <2 a @0> (size=1048576,offset=0): f32[512,512]{1,0}
 value: <3 b @0> (size=1048576,offset=1048576): f32[512,512]{1,0}
 value: <4 b_again{1} (phi) @0> (size=1048576,offset=1048576): f32[512,512]{1,0}
 value: <5 c @0> (size=2097152,offset=1048576): f32[512,1024]{1,0}
"""
LIVE = """HloLiveRange (max 9):
  BufferLiveRange:
    a{}:0-9
    b{}:0-3
    b_again{1}:2-4
    c{}:5-6
  Live ranges at 5 (peak):
    a: 1
"""


def test_memory_is_that_of_the_assignment():
    memory = buffers.read_memory(ASSIGNMENT, LIVE, hlo.Module())
    assert (memory.total, memory.arguments, memory.heap) == (4 << 20, 1 << 20, 3 << 20)
    assert memory.live == 3 << 20  # a and c; b has gone
    assert [(row.bytes, row.shape) for row in memory.largest] == [(2 << 20, "f32[512,1024]"), (1 << 20, "f32[512,512]")]


def test_times_of_links():
    chip = topology.CHIPS["v5p"]
    one = collectives.Collective("all-gather", ("fsdp",), 16, 1e9, 1e9, 1, "")
    assert roofline.link_seconds(one, chip, [(0, 4)], (4, 4, 4)) == pytest.approx(
        1e9 / 200e9
    )  # a ring, both directions
    assert roofline.link_seconds(one, chip, [(0, 2)], (4, 4, 4)) == pytest.approx(1e9 / 100e9)  # part of one: a line
    both = roofline.link_seconds(one, chip, [(0, 4), (1, 4)], (4, 4, 4))
    assert both == pytest.approx(1e9 / 400e9)
    exchange = replace(one, kind="all-to-all")
    assert roofline.link_seconds(exchange, chip, [(0, 8)], (8, 8, 8)) == pytest.approx(2 * 1e9 / 200e9)


LLAMA = [
    *("--config.mtp.kind=none", "--config.model.attention=gqa", "--config.model.num_experts=0"),
    *("--config.model.vocab_size=128256", "--config.model.num_kv_heads=8", "--config.model.head_dim=128"),
]
LLAMA_70B = [
    *("--config.model.num_layers=80", "--config.model.embed_dim=8192", "--config.model.num_heads=64"),
    *(*LLAMA, "--config.model.ffn_dim=28672"),
]
LLAMA_405B = [
    *("--config.model.num_layers=126", "--config.model.embed_dim=16384", "--config.model.num_heads=128"),
    *(*LLAMA, "--config.model.ffn_dim=53248"),
]


def slice_of(generation, *shape):
    chip = topology.CHIPS[generation]
    name = f"{generation}:{'x'.join(map(str, shape))}"
    return topology.Topology(name, chip, shape, 1, [None] * (chip.devices * int(np.prod(shape))))


def estimated(config, slice_, mfu):
    flops = train_flops_per_token(config) * config.data.batch_size * config.data.sequence_length / len(slice_.devices)
    bounds = roofline.Roofline({"compute": flops / mfu / slice_.chip.flops}, mfu)
    return calibration.estimate(config, slice_, flops, bounds)


@pytest.mark.parametrize(
    ("generation", "name", "overrides"),
    [
        ("v5p", "configs/deepseek_v3_671b.py", ["--config.mtp.kind=none"]),
        ("v5p", "configs/dense_1b.py", LLAMA_405B),
        ("v6e", "configs/dense_1b.py", LLAMA_70B),
    ],
)
def test_the_estimate_of_a_measured_model_is_its_measured_rate(generation, name, overrides):
    rows = ["--config.data.sequence_length=8192", "--config.data.batch_size=1024"]
    config = load_config(name, [*overrides, *rows])
    measured = calibration.MEASURED[generation, config.model.num_experts > 0]
    found = estimated(config, slice_of(generation, 8, 8, 8), 0.9)
    assert found.rate == pytest.approx(measured.rate, rel=2e-3)
    assert found.seconds == pytest.approx(1024 * 8192 / measured.rate / 512, rel=2e-3)
    assert found.basis.startswith(f"assuming an MFU of {100 * measured.mfu:.1f} %") and measured.model in found.basis


def test_there_is_no_estimate_without_a_measurement_or_beyond_the_bound():
    config = load_config("configs/moe_4b.py", [])
    assert estimated(config, slice_of("v5p", 4, 4, 4), 0.34).rate > 0
    slower = estimated(config, slice_of("v5p", 4, 4, 4), 0.33)
    assert slower.rate is None and "the bound is slower than an MFU of 33.2 %" in slower.basis
    for generation in ("v4", "v5e", "v6e", "tpu7x"):
        found = estimated(config, slice_of(generation, 4, 4), 0.9)
        assert found.seconds is None and f"no rate of a mixture of experts on {generation}" in found.basis


def test_a_chip_of_two_devices_counts_once():
    assert slice_of("tpu7x", 4, 4, 4).num_chips == 64


def test_candidates_divide_the_topology():
    config = load_config("configs/tiny.py", ["--config.data.batch_size=64"])
    slice_ = topology.Topology("v5e:4x4", topology.CHIPS["v5e"], (4, 4), 1, [None] * 16)
    found = list(search.candidates(config, slice_))
    assert found
    for one in found:
        mesh = one.config.mesh
        assert np.prod([mesh.data, mesh.fsdp, mesh.expert, mesh.context, mesh.tensor]) == 16
        assert config.model.num_heads % mesh.tensor == 0 and config.model.num_experts % mesh.expert == 0
        assert one.gib > 0 and one.seconds > 0
    less, more = (next(c for c in found if c.config.model.remat == r) for r in ("full", "none"))
    assert less.gib < more.gib and less.seconds >= more.seconds


@pytest.mark.parametrize("name", ["v9:4x4", "v5p", "v5p:4by4", ""])
def test_an_unknown_topology_names_the_known(name):
    with pytest.raises(UserError, match="as in v.*:4x4"):
        topology.open_topology(name)


def libtpu_or_skip():
    pytest.importorskip("libtpu", reason="the planner's compiler: pip install 'jax[tpu]'")


SMALL = [
    *("--config.model.num_layers=2", "--config.mtp.depth=1", "--config.data.batch_size=16"),
    *("--config.model.compute_dtype=bfloat16", "--config.model.remat=full", "--config.mesh.fsdp=16"),
    *("--config.mesh.data=1", "--config.data.sequence_length=128"),
]


@pytest.fixture
def here(monkeypatch):
    """This process already runs jax on CPUs; the rest of the tool's environment is undone afterwards."""
    for name, value in topology.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_a_real_step_compiles_for_a_tpu_and_is_reported(here, capsys, tmp_path):
    libtpu_or_skip()
    out = tmp_path / "plan.json"
    command = ["--config=configs/tiny.py", "--topology=v5e:4x4", f"--json={out}", *SMALL]
    assert run_here(here, plan_command.main, *command) == 0
    text = capsys.readouterr().out
    for part in ("memory per device", "largest temporaries", "collectives", "bound:", "estimate: none", "of 15.75"):
        assert part in text
    result = json.loads(out.read_text())
    assert 0 < result["peak_live_gib"] <= result["peak_hbm_gib"] < result["hbm_gib"] == 15.75
    assert result["parameters_active"] < result["parameters"]
    assert 0 < result["model_tflops_per_chip"] < result["executed_tflops_per_chip"]
    assert {"all-gather"} <= {row["kind"] for row in result["collectives"]}
    assert {tuple(row["axes"]) for row in result["collectives"]} == {("fsdp",)}
    assert 0 < result["mfu"] < 1 and result["bound"] in result["seconds"]
    assert result["estimate"]["rate"] is None and "mixture of experts on v5e" in result["estimate"]["basis"]


@pytest.mark.parametrize(
    ("context", "length", "is_splash"),
    [(1, 256, True), (2, 256, True), (2, 128, False)],
    ids=["whole rows", "split rows", "split too short"],
)
def test_a_mixture_of_experts_compiles_to_the_tpu_kernels_on_every_axis(here, capsys, context, length, is_splash):
    libtpu_or_skip()
    warn_once.cache_clear()
    mesh = {"fsdp": 4 // context, "expert": 2, "context": context, "tensor": 2}
    overrides = [*SMALL, f"--config.data.sequence_length={length}", "--config.model.remat=kernels"]
    overrides += [f"--config.mesh.{name}={size}" for name, size in mesh.items()]
    devices = topology.open_topology("v5e:4x4")
    program = compile_step(resolve(load_config("configs/tiny.py", overrides), devices), devices)
    assert not program.is_over_full
    calls = [i for body in hlo.parse(program.hlo).computations.values() for i in body if "tpu_custom_call" in i.rest]
    kernels = {kernel: sum(f"splash_mha_{kernel}_" in i.name for i in calls) for kernel in ("fwd", "dq", "dkv")}
    num_layers = 3  # of the decoder a dense one and one with experts, and one of the MTP module
    assert kernels == dict.fromkeys(kernels, num_layers if is_splash else 0)
    assert ("tgmm" in program.hlo) == (jax.__version_info__ < grouped.NATIVE_SINCE) != ("ragged-dot" in program.hlo)
    said = capsys.readouterr().err
    assert ("model.attention_kernel=xla, slow here: not splash" in said) != is_splash


def test_an_over_full_step_is_one_line(here, capsys, tmp_path):
    libtpu_or_skip()
    out = tmp_path / "plan.json"
    huge = ["--config.model.embed_dim=1024", "--config.model.expert_dim=65536", "--config.model.num_layers=20"]
    code = run_here(
        here, plan_command.main, "--config=configs/tiny.py", "--topology=v5e:4x4", f"--json={out}", *SMALL, *huge
    )
    assert code == 1
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and "needs" in error and "of 15.8 GiB" in error and "largest:" in error
    result = json.loads(out.read_text())
    assert not result["fits"] and result["peak_hbm_gib"] > 15.75


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--topology=v9:2x2"], "unknown; a topology is a generation"),
        (["--topology=v5p:3x3x3"], "not divisible"),
        (["--topology=v5e:4x4", "--slices=0"], "must be at least 1"),
        (["--topology=v5e:4x4", "--config.mesh.data=3"], "takes 3 devices, there are 16"),
        (["--topology=v5e:4x4", *SMALL, "--config.mesh.fsdp=1", "--config.mesh.tensor=16"], "does not divide"),
        (["--topology=v5e:4x4", *SMALL, "--config.mesh.fsdp=1", "--config.mesh.expert=16"], "does not divide"),
        (
            ["--topology=v5e:4x4", "--slices=2", *SMALL, "--config.mesh.fsdp=32", "--config.data.batch_size=32"],
            "slices",
        ),
        (["--topology=v5e:4x4", "--json=/no/such/folder/x.json"], "its folder does not exist"),
    ],
)
def test_unusable_arguments_are_one_line(here, capsys, arguments, says):
    libtpu_or_skip()
    assert run_here(here, plan_command.main, "--config=configs/tiny.py", *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error.removeprefix("Failed") and says in error
