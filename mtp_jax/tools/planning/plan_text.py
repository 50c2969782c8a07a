"""Plan as text, as tools.plan prints it."""

from mtp_jax.model import count_parameters
from mtp_jax.mtp import kind_of
from mtp_jax.tools.planning.estimate import GIB, TABLE_ROWS, TERA, Plan, by_kind


def report(plan: Plan) -> str:
    """Returns memory, large buffers, collectives, work and bounds as text."""
    return "\n\n".join([_head(plan), _memory(plan), _buffers(plan), _collectives(plan), _bounds(plan)])


def _head(plan: Plan) -> str:
    counted, config, topology = count_parameters(plan.config.architecture), plan.config, plan.topology
    mtp = f" + {_count(counted.mtp_total)} of {kind_of(config).describe()}" if counted.mtp_total else ""
    axes = " x ".join(f"{name} {size}" for name, size in plan.mesh.items() if size > 1) or "one device"
    slices = f"{topology.num_slices} slices of " if topology.num_slices > 1 else ""
    return "\n".join(
        [
            f"model    {_count(counted.total)} parameters, {_count(counted.active)} active per token{mtp}",
            f"chips    {slices}{topology.name}, {len(topology.devices)} devices ({topology.chip.name})",
            f"mesh     {axes}",
            f"batch    {config.data.batch_size} rows of {config.data.sequence_length} tokens, "
            f"{config.training.grad_accum_steps} micro-batch(es), remat {config.model.remat}",
            f"compiled in {plan.lower_seconds + plan.compile_seconds:.0f} s, {plan.hlo_bytes / 1e6:.1f} MB of HLO",
        ]
    )


def _memory(plan: Plan) -> str:
    memory, hbm = plan.memory, plan.topology.chip.hbm_gib
    rest = memory.total - plan.params_bytes - plan.optimizer_bytes - memory.heap
    rows = [
        ("parameters", plan.params_bytes),
        ("optimizer state", plan.optimizer_bytes),
        ("batch, constants, metrics", rest),
        (f"temporaries, {_gib(memory.live)} in use at the fullest moment", memory.heap),
    ]
    lines = [f"memory per device, GiB: {_gib(memory.total)} of {hbm} ({100 * plan.needs_gib / hbm:.1f} %)"]
    return "\n".join(lines + [f"  {_gib(size):>8s}  {name}" for name, size in rows])


def _buffers(plan: Plan) -> str:
    lines = ["largest temporaries at the fullest moment, GiB"]
    for row in plan.memory.largest[:TABLE_ROWS]:
        lines.append(f"  {_gib(row.bytes):>8s}  {row.count:3d} x {row.shape:30s} {row.source}")
    return "\n".join(lines)


def _collectives(plan: Plan) -> str:
    lines = ["collectives, per device and step    runs   GiB sent   GiB held  largest from"]
    for row in by_kind(plan.sent):
        name = f"{row['kind']} over {'+'.join(row['axes'])}"
        sizes = f"{_gib(row['bytes_sent']):>10s} {_gib(row['bytes_held']):>10s}"
        lines.append(f"  {name:32s} {row['times']:5.0f} {sizes}  {row['largest_source']}")
    return "\n".join(lines if len(lines) > 1 else [*lines, "  none"])


def _bounds(plan: Plan) -> str:
    lines = [
        f"work per device and step: {plan.model_flops / TERA:,.4g} TFLOP of the model, "
        f"{plan.executed_flops / TERA:,.4g} executed; {_gib(plan.hbm_bytes)} GiB through HBM",
    ]
    bounds = plan.roofline
    if bounds is None:
        return lines[0]
    lines.append("  ".join(f"{name} {seconds:.3g} s" for name, seconds in bounds.parts.items() if seconds))
    tokens = plan.config.data.batch_size * plan.config.data.sequence_length
    rate = tokens / bounds.seconds / plan.topology.num_chips
    lines.append(
        f"bound:    {bounds.seconds:.3g} s a step by {bounds.bound}, {rate:,.0f} tokens/s per chip, "
        f"MFU {100 * bounds.mfu:.1f} %; nothing waits, every unit at its peak"
    )
    found = plan.estimate
    assert found is not None
    if found.seconds is None:
        lines.append(f"estimate: none, {found.basis}")
    else:
        lines.append(f"estimate: {found.seconds:.3g} s a step, {found.rate:,.0f} tokens/s per chip, {found.basis}")
    return "\n".join(lines)


def _gib(size: float) -> str:
    """Formats bytes as GiB with two decimals, or with two digits below 0.1."""
    gib = size / GIB
    return f"{gib:.2f}" if gib >= 0.1 or not gib else f"{gib:.2g}"


def _count(number: int) -> str:
    return f"{number / 1e9:,.1f} B" if number >= 1e9 else f"{number / 1e6:,.2f} M"
