"""Layers as values: what distinguishes one layer of a model from another, and the groups that a scan goes over."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mtp_jax.config import ModelConfig, RopeConfig


@dataclass(frozen=True)
class AttentionSpec:
    """Attention of one layer, where layers of a model differ.

    Attributes:
      rope: its rotary positions.
      num_kv_heads: its key/value heads, for kinds of attention that have them.
      window: number of keys that a query sees at most, itself included; 0: no limit.
      has_sinks: whether every head has a learnt attention sink.
    """

    rope: RopeConfig
    num_kv_heads: int
    window: int = 0
    has_sinks: bool = False

    def pairs_per_query(self, length: int) -> float:
        """Mean number of keys that a query of a document of `length` positions sees, its own counted as one half."""
        window = min(self.window or length, length)
        return window - window**2 / (2 * length)


@dataclass(frozen=True)
class LayerSpec:
    """One transformer block: its attention, and whether its feed-forward is a mixture of experts."""

    attention: AttentionSpec
    is_moe: bool


@dataclass(frozen=True)
class LayerGroup:
    """`count` repetitions of a period of layers; the layers at one place of the period are one stacked module.

    Attributes:
      specs: the period.
      names: of its stacked modules.
    """

    specs: tuple[LayerSpec, ...]
    names: tuple[str, ...]
    count: int


def layer_specs(model: ModelConfig, num_layers: int) -> list[LayerSpec]:
    """The first `num_layers` layers, first to last."""
    distant = AttentionSpec(model.rope, model.num_kv_heads, has_sinks=model.sinks)
    local, pattern = model.local, model.local.pattern if model.local.window else "G"
    rope = RopeConfig(theta=local.rope_theta, interleaved=model.rope.interleaved) if local.rope_theta else model.rope
    near = AttentionSpec(rope, local.num_kv_heads or model.num_kv_heads, local.window, local.sinks)
    return [
        LayerSpec(
            attention=near if pattern[layer % len(pattern)] == "L" else distant,
            is_moe=bool(model.num_experts) and layer >= model.num_dense_layers,
        )
        for layer in range(num_layers)
    ]


def with_window(spec: LayerSpec, model: ModelConfig, window: int) -> LayerSpec:
    """A layer like this one whose attention sees `window` keys: one of the model's specs if it has such a layer."""
    found = [s.attention for s in layer_specs(model, model.num_layers) if s.attention.window == window]
    return replace(spec, attention=found[-1] if found else replace(spec.attention, window=window))


def layer_groups(model: ModelConfig, num_layers: int) -> list[LayerGroup]:
    """The first `num_layers` layers in few periods, so that few are compiled: each time the one that repeats over
    the most layers.

    Stacked modules of layers with experts, and of every layer of a model without, are called "blocks", those of other
    layers "dense_blocks"; further ones are numbered from 1.
    """
    specs = layer_specs(model, num_layers)
    groups: list[LayerGroup] = []
    used: dict[str, int] = {}
    at = 0
    while at < len(specs):
        period, count = max(_repetitions(specs[at:]), key=lambda found: found[0] * (found[1] - 1))
        names = []
        for spec in specs[at : at + period]:
            base = "dense_blocks" if model.num_experts and not spec.is_moe else "blocks"
            names.append(f"{base}_{used[base]}" if base in used else base)
            used[base] = used.get(base, 0) + 1
        groups.append(LayerGroup(tuple(specs[at : at + period]), tuple(names), count))
        at += period * count
    return groups


def _repetitions(specs: Sequence[LayerSpec]) -> list[tuple[int, int]]:
    """(period, how often it repeats from the first layer on) for every period that fits."""
    found = []
    for period in range(1, len(specs) // 2 + 1):
        count = 1
        while specs[count * period : (count + 1) * period] == specs[:period]:
            count += 1
        found.append((period, count))
    return found or [(1, 1)]


def layer_places(model: ModelConfig, num_layers: int) -> list[tuple[str, int]]:
    """(stacked module, index in it) of each of the first `num_layers` layers, first to last."""
    return [
        (name, index)
        for group in layer_groups(model, num_layers)
        for index in range(group.count)
        for name in group.names
    ]
