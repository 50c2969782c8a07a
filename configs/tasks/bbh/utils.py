"""BIG-Bench Hard from local files: bbh/NAME.json and its chain-of-thought prompt bbh/cot-prompts/NAME.txt."""

from typing import Any

from mtp_jax.config import UserError
from mtp_jax.evaluation import benchmark_data


def dataset(name: str, **metadata: Any) -> dict[str, Any]:
    """Returns the problems of one task, each with the prompt: instruction and three worked examples."""
    del metadata
    path = benchmark_data.find(f"bbh/{name}.json")
    examples = benchmark_data.read_json(f"bbh/{name}.json").get("examples")
    if not examples:
        raise UserError(f"{path}: has no examples; replace the file by the benchmark's own")
    # The canary against use as training data is above a line of dashes.
    prompt = benchmark_data.read_text(f"bbh/cot-prompts/{name}.txt").split("-----\n", 1)[-1].strip()
    return benchmark_data.dataset(test=[{**example, "prompt": prompt} for example in examples])
