"""What the harness's code benchmarks share: all programs of a task run in one go, then scored problem by problem.

The harness hands a task's filter every response at once, and its metric one problem at a time. So the programs are run
in the filter, on all cores, and what the metric (and a file of samples) sees is "passed" or why not.
"""

from collections.abc import Callable, Mapping, Sequence

from mtp_jax.evaluation import sandbox
from mtp_jax.evaluation.pass_at_k import pass_at_k
from mtp_jax.evaluation.sandbox import Program


def run(
    responses: Sequence[Sequence[str]],
    docs: Sequence[Mapping[str, object]],
    program: Callable[[Mapping[str, object], str], Program],
) -> list[list[str]]:
    """Run `program(doc, response)` for every response to every doc.

    Returns:
      for each doc, for each response: "passed", or the reason and a detail.

    Raises:
      UserError: this machine cannot contain programs.
    """
    programs = [program(doc, text) for texts, doc in zip(responses, docs, strict=True) for text in texts]
    outcomes = iter(sandbox.run_programs(programs))
    return [[str(next(outcomes)) for _ in texts] for texts in responses]


def score(predictions: Sequence[Sequence[str]], k: int | Sequence[int]) -> dict[str, float]:
    """{"pass@k": ...} of one problem, as the harness calls a metric.

    Args:
      predictions: the problem's outcomes, in a list of their own.
      k: one or more; each at most the task's `repeats`.
    """
    (outcomes,) = predictions
    passed = sum(text == "passed" for text in outcomes)
    return {f"pass@{i}": pass_at_k(len(outcomes), passed, i) for i in ([k] if isinstance(k, int) else k)}
