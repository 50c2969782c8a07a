"""HumanEval for lm-evaluation-harness: problems from a local file, programs in the sandbox."""

from mtp_jax.evaluation import benchmark_data, code_tasks
from mtp_jax.evaluation.sandbox import Program

FILE = "humaneval.jsonl"
FIELDS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")


def dataset(**_):
    """Returns the 164 problems as split `test`; the harness passes the task's metadata, which is not used."""
    return benchmark_data.dataset(test=benchmark_data.read_jsonl(FILE, FIELDS))


def program(doc, response):
    """Returns the prompt's function with the response as its body."""
    return Program(doc["prompt"] + response, f"{doc['test']}\ncheck({doc['entry_point']})")


def run(responses, docs):
    """Filter of the harness: the result of each response's program."""
    return code_tasks.run(responses, docs, program)


def pass_at_k(references, predictions, k):
    """Metric of one problem: {"pass@k": ...}."""
    return code_tasks.score(predictions, k)
