"""HumanEval for the harness: its problems from a local file, its programs in the sandbox."""

from mtp_jax.evaluation import benchmark_data, code_tasks
from mtp_jax.evaluation.sandbox import Program

FILE = "humaneval.jsonl"
FIELDS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")


def dataset(**_):
    """The 164 problems as split `test`; the harness passes the task's metadata."""
    return benchmark_data.dataset(test=benchmark_data.read_jsonl(FILE, FIELDS))


def program(doc, response):
    """The prompt's function with the response as its body."""
    return Program(doc["prompt"] + response, f"{doc['test']}\ncheck({doc['entry_point']})")


def run(responses, docs):
    """A filter: what became of each response."""
    return code_tasks.run(responses, docs, program)


def pass_at_k(references, predictions, k):
    """A metric of one problem: {"pass@k": ...}."""
    return code_tasks.score(predictions, k)
