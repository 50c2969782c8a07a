"""Specifications of the layers of a model, and the groups of layers that are scanned over."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mtp_jax.config import ModelConfig, RopeConfig


@dataclass(frozen=True)
class AttentionSpec:
    """Attention settings of one layer that may differ between layers of a model.

    Attributes:
      rope: rotary position embedding.
      num_kv_heads: number of key/value heads, for attention variants that have them.
      window: maximum number of keys that a query sees, its own included; 0: no limit.
      has_sinks: whether every head has a learned attention sink.
    """

    rope: RopeConfig
    num_kv_heads: int
    window: int = 0
    has_sinks: bool = False

    def pairs_per_query(self, length: int) -> float:
        """Returns the mean number of keys per query in a document of `length` positions, its own key counted as 1/2."""
        window = min(self.window or length, length)
        return window - window**2 / (2 * length)


@dataclass(frozen=True)
class LayerSpec:
    """Specification of one transformer block: its attention, and whether its feed-forward is a mixture of experts."""

    attention: AttentionSpec
    is_moe: bool


@dataclass(frozen=True)
class LayerGroup:
    """`count` repetitions of a period of layers; each position of the period is one stacked module.

    Attributes:
      specs: layers of one period.
      names: names of the stacked modules, one per layer of the period.
      count: number of repetitions.
    """

    specs: tuple[LayerSpec, ...]
    names: tuple[str, ...]
    count: int


def layer_specs(model: ModelConfig, num_layers: int) -> list[LayerSpec]:
    """Returns the specifications of the first `num_layers` layers, in order."""
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
    """Returns `spec` with the given attention window.

    The attention is that of the model's last layer with this window, or `spec`'s own where the model has none.
    """
    found = [s.attention for s in layer_specs(model, model.num_layers) if s.attention.window == window]
    return replace(spec, attention=found[-1] if found else replace(spec.attention, window=window))


def layer_groups(model: ModelConfig, num_layers: int) -> list[LayerGroup]:
    """Groups the first `num_layers` layers into few periods, so that few layers are compiled.

    The period chosen at each step is the one whose repetitions cover the most layers. Stacked modules of layers with
    experts, and of all layers of a model without experts, are named "blocks", those of other layers "dense_blocks";
    further ones are numbered from 1.
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
    """Returns (period, number of repetitions from the first layer on) for every period that fits."""
    found = []
    for period in range(1, len(specs) // 2 + 1):
        count = 1
        while specs[count * period : (count + 1) * period] == specs[:period]:
            count += 1
        found.append((period, count))
    return found or [(1, 1)]


def layer_places(model: ModelConfig, num_layers: int) -> list[tuple[str, int]]:
    """Returns (stacked module, index in it) of each of the first `num_layers` layers, in order."""
    return [
        (name, index)
        for group in layer_groups(model, num_layers)
        for index in range(group.count)
        for name in group.names
    ]
