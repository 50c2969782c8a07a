"""Estimated speed of a step: the MFU that MaxText measured with a large model on chips of the same generation.

The measurements are the rates that github.com/AI-Hypercomputer/tpu-recipes states (read 2026-11). `mfu` is the rate
times the FLOPs per token of the model as `training.flops` counts them, over the peak of `topology.CHIPS`. On v5p it
equals the MFU from MaxText's own TFLOP/s; the older recipes for v6e counted the masked half of attention too.
"""

from dataclasses import dataclass

from mtp_jax.config import Config
from mtp_jax.tools.planning.roofline import Roofline
from mtp_jax.tools.planning.topology import Topology


@dataclass(frozen=True)
class Measurement:
    """Published speed of a training step in bfloat16. rate: tokens/s per chip. source: folder of the recipes."""

    model: str
    num_chips: int
    length: int
    rate: float
    mfu: float
    source: str

    def __str__(self) -> str:
        return f"{self.model} on {self.num_chips} chips (AI-Hypercomputer/tpu-recipes, training/{self.source})"


# By generation and by whether the model has experts. Left out: recipes that drop tokens (v6e) or state no rate (tpu7x).
MEASURED = {
    ("v5p", True): Measurement("DeepSeek-V3 671B", 512, 8192, 542.108, 0.332, "v5p/DeepSeek3-671B-MaxText"),
    ("v5p", False): Measurement("Llama 3.1 405B", 512, 8192, 124.618, 0.685, "v5p/Llama3.1-405B-MaxText"),
    ("v6e", False): Measurement("Llama 3.1 70B", 256, 8192, 960.248, 0.470, "trillium/Llama3.1-70B-MaxText/v6e-256"),
}


@dataclass(frozen=True)
class Estimate:
    """Estimate of a step. seconds: per step; rate: tokens/s per chip; both None if there is none. basis: why."""

    seconds: float | None
    rate: float | None
    basis: str


def estimate(config: Config, topology: Topology, model_flops: float, bounds: Roofline) -> Estimate:
    """Returns the time of a step at the measured MFU.

    There is none without a measurement for the generation and the type of model, and none where the bound itself is
    slower: a step that HBM or the links limit so much differs from the measured one.

    Args:
      model_flops: FLOP of the model per device and step.
    """
    generation, has_experts = topology.name.split(":")[0], config.model.num_experts > 0
    measured = MEASURED.get((generation, has_experts))
    if measured is None:
        model = "mixture of experts" if has_experts else "dense model"
        return Estimate(None, None, f"MaxText's recipes have no rate of a {model} on {generation}")
    basis = f"an MFU of {100 * measured.mfu:.1f} %, which MaxText measured for {measured}"
    if bounds.mfu < measured.mfu:
        return Estimate(None, None, f"the bound is slower than {basis}")
    seconds = model_flops / (measured.mfu * topology.chip.flops)
    tokens = config.data.batch_size * config.data.sequence_length
    return Estimate(seconds, tokens / seconds / topology.num_chips, f"assuming {basis}")
