"""Checks that need more than one field: what cannot run is refused before anything is built."""

import dataclasses

from mtp_jax.config.schema import Config, MeshConfig, UserError


def validate(config: Config, num_devices: int, tokenizer_size: int | None = None) -> None:
    """Refuse what cannot run.

    Args:
      config: the run.
      num_devices: devices the mesh must fill, over all processes.
      tokenizer_size: ids the tokenizer can produce, when it is known.

    Raises:
      UserError: on the first problem, naming field, value and remedy.
    """
    _check_positive(config)
    _check_mtp(config)
    _check_experts(config)
    sizes = mesh_sizes(config.mesh, num_devices)
    _check_mesh(config, sizes)
    vocab = config.model.vocab_size
    if tokenizer_size is not None and vocab is not None and vocab < tokenizer_size:
        raise UserError(
            f"model.vocab_size={vocab}: smaller than the tokenizer's {tokenizer_size} "
            f"(data.tokenizer={config.data.tokenizer}); use at least {tokenizer_size}"
        )


def mesh_sizes(mesh: MeshConfig, num_devices: int) -> dict[str, int]:
    """Axis sizes with -1 filled in.

    Raises:
      UserError: more than one -1, a size below 1, or a product that is not `num_devices`.
    """
    sizes = dataclasses.asdict(mesh)
    free = [name for name, size in sizes.items() if size == -1]
    bad = [f"mesh.{n}={s}" for n, s in sizes.items() if s < 1 and s != -1]
    if bad:
        raise UserError(f"{bad[0]}: an axis is at least 1, or -1 for the devices that are left")
    if len(free) > 1:
        raise UserError(f"mesh.{free[0]}=-1 and mesh.{free[1]}=-1: only one axis may be -1")
    product = 1
    for size in sizes.values():
        product *= size if size != -1 else 1
    shown = ", ".join(f"{n}={s}" for n, s in sizes.items())
    if num_devices % product or (not free and product != num_devices):
        raise UserError(f"mesh ({shown}): takes {product} devices, there are {num_devices}; set one axis to -1")
    if free:
        sizes[free[0]] = num_devices // product
    return sizes


def _check_positive(config: Config) -> None:
    keys = [
        *("model.num_layers", "model.embed_dim", "model.num_heads", "model.ffn_dim", "model.kv_lora_rank"),
        *("data.sequence_length", "data.batch_size", "data.prefetch", "data.max_document_chars"),
        *("training.num_steps", "training.log_every", "training.accumulate_steps", "training.loss_chunk"),
        *("checkpoint.every", "checkpoint.keep", "training.eval_batches"),
    ]
    for key in keys:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value < 1:
            raise UserError(f"{key}={value}: must be at least 1")
    for key in ("data.validation_fraction", "data.fim_rate", "optimizer.final_fraction", "optimizer.decay_fraction"):
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if not 0.0 <= value <= 1.0:
            raise UserError(f"{key}={value}: must lie between 0 and 1")
    rope_dim = config.model.qk_rope_head_dim
    if config.model.attention == "mla" and (rope_dim % 2 or rope_dim < 2):
        raise UserError(f"model.qk_rope_head_dim={rope_dim}: rotary dimensions come in pairs; use an even number")
    if config.model.attention == "gqa" and config.model.num_heads % config.model.num_kv_heads:
        raise UserError(
            f"model.num_kv_heads={config.model.num_kv_heads}: does not divide model.num_heads={config.model.num_heads}"
        )


MAX_DEPTH = 16


def _check_mtp(config: Config) -> None:
    mtp = config.mtp
    if mtp.kind == "none":
        return
    if not 1 <= mtp.depth <= MAX_DEPTH:
        raise UserError(f"mtp.depth={mtp.depth}: must lie between 1 and {MAX_DEPTH}; for no MTP set mtp.kind=none")
    if config.num_main_layers < 2 and mtp.kind == "parallel":
        raise UserError(
            f"mtp.depth={mtp.depth}: parallel heads take {mtp.depth} of model.num_layers={config.model.num_layers} and "
            f"leave no trunk; use a depth of at most {config.model.num_layers - 2}, more layers, or "
            "mtp.parameter_matched=false"
        )
    if len(mtp.weight_values) != len(mtp.weight_boundaries):
        raise UserError(
            f"mtp.weight_values={mtp.weight_values}: needs one value a boundary, "
            f"mtp.weight_boundaries={mtp.weight_boundaries}"
        )
    if list(mtp.weight_boundaries) != sorted(set(mtp.weight_boundaries)):
        raise UserError(f"mtp.weight_boundaries={mtp.weight_boundaries}: must increase")
    if mtp.depth_decay <= 0:
        raise UserError(f"mtp.depth_decay={mtp.depth_decay}: must be above 0")
    if mtp.shared_depths and mtp.kind == "parallel":
        raise UserError(
            "mtp.shared_depths=true: parallel heads that share weights are one head; use mtp.kind=sequential"
        )


def _check_experts(config: Config) -> None:
    m = config.model
    if not m.num_experts:
        return
    if not 1 <= m.num_experts_per_token <= m.num_experts:
        raise UserError(
            f"model.num_experts_per_token={m.num_experts_per_token}: must lie between 1 and "
            f"model.num_experts={m.num_experts}"
        )
    if m.num_experts % m.router_num_groups:
        raise UserError(
            f"model.router_num_groups={m.router_num_groups}: does not divide model.num_experts={m.num_experts}"
        )
    if not 1 <= m.router_groups_per_token <= m.router_num_groups:
        raise UserError(
            f"model.router_groups_per_token={m.router_groups_per_token}: must lie between 1 and "
            f"model.router_num_groups={m.router_num_groups}"
        )
    reachable = m.num_experts // m.router_num_groups * m.router_groups_per_token
    if reachable < m.num_experts_per_token:
        raise UserError(
            f"model.num_experts_per_token={m.num_experts_per_token}: the chosen groups hold only {reachable} experts; "
            "raise model.router_groups_per_token"
        )
    if m.num_dense_layers < 0:
        raise UserError(f"model.num_dense_layers={m.num_dense_layers}: must be at least 0")


def _check_mesh(config: Config, sizes: dict[str, int]) -> None:
    model, data = config.model, config.data
    rows = sizes["data"] * sizes["fsdp"] * sizes["expert"]
    micro = data.batch_size // config.training.accumulate_steps
    if data.batch_size % config.training.accumulate_steps or micro % rows:
        times = f" x training.accumulate_steps={config.training.accumulate_steps}" if data.batch_size != micro else ""
        raise UserError(
            f"data.batch_size={data.batch_size}: does not divide over the mesh's data={sizes['data']} x "
            f"fsdp={sizes['fsdp']} x expert={sizes['expert']}{times}; use a multiple of "
            f"{rows * config.training.accumulate_steps}"
        )
    pairs = [
        ("context", "data.sequence_length", data.sequence_length),
        ("tensor", "model.num_heads", model.num_heads),
        *([("tensor", "model.num_kv_heads", model.num_kv_heads)] if model.attention == "gqa" else []),
        *([("tensor", "model.vocab_size", model.vocab_size)] if model.vocab_size else []),
        *([("expert", "model.num_experts", model.num_experts)] if model.num_experts else []),
        ("tensor", "model.ffn_dim", model.ffn_dim),
        *([("tensor", "model.expert_dim", model.expert_dim)] if model.num_experts else []),
        ("fsdp", "model.embed_dim", model.embed_dim),
    ]
    for axis, key, value in pairs:
        if value % sizes[axis]:
            raise UserError(f"mesh.{axis}={sizes[axis]}: does not divide {key}={value}")
    if sizes["expert"] > 1 and not model.num_experts:
        raise UserError(f"mesh.expert={sizes['expert']}: the model has no experts; use mesh.data or mesh.fsdp")
