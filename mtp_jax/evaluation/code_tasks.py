"""Execution and scoring of code benchmarks: all programs of a task run at once, then each problem is scored.

The harness passes all responses at once to a task's filter, and one problem at a time to its metric. So the filter runs
the programs, on all cores, and the metric (and a file of samples) sees "passed" or the reason of the failure.
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
    """Runs `program(doc, response)` for every response to every doc.

    Args:
      responses: the responses to each doc.
      program: builds the program of a doc and a response.

    Returns:
      for each doc, for each response: "passed", or the reason and a detail.

    Raises:
      UserError: this machine cannot isolate programs.
    """
    programs = [program(doc, text) for texts, doc in zip(responses, docs, strict=True) for text in texts]
    outcomes = iter(sandbox.run_programs(programs))
    return [[str(next(outcomes)) for _ in texts] for texts in responses]


def score(predictions: Sequence[Sequence[str]], k: int | Sequence[int]) -> dict[str, float]:
    """Returns {"pass@k": ...} of one problem, with the signature of the harness's metrics.

    Args:
      predictions: the problem's outcomes, in a list of their own.
      k: one value or several; each at most the task's `repeats`.
    """
    (outcomes,) = predictions
    passed = sum(text == "passed" for text in outcomes)
    return {f"pass@{i}": pass_at_k(len(outcomes), passed, i) for i in ([k] if isinstance(k, int) else k)}
