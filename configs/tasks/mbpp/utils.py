"""MBPP for lm-evaluation-harness: problems from a local file, programs in the sandbox."""

from mtp_jax.config import UserError
from mtp_jax.evaluation import benchmark_data, code_tasks
from mtp_jax.evaluation.sandbox import Program

FILE = "mbpp.jsonl"
FIELDS = ("task_id", "text", "code", "test_list")
TEST_IDS, FEWSHOT_IDS = range(11, 511), (2, 3, 4)


def dataset(**_):
    """Returns the 500 test problems as split `test`; the harness passes the task's metadata, which is not used."""
    return benchmark_data.dataset(test=[{name: row[name] for name in FIELDS} for row in rows(TEST_IDS)])


def rows(ids):
    """Returns the problems with these task_ids.

    Raises:
      UserError: one of them is not in the file.
    """
    known = {row["task_id"]: row for row in benchmark_data.read_jsonl(FILE, FIELDS)}
    missing = [i for i in ids if i not in known]
    if missing:
        path = benchmark_data.folder() / FILE
        raise UserError(f"{path}: has no task_id {missing[0]}; put the full file of 974 problems into MTP_DATA_DIR")
    return [known[i] for i in ids]


def fewshot_samples():
    """Returns the three solved problems that precede each prompt."""
    return [{**{name: row[name] for name in FIELDS}, "is_fewshot": True} for row in rows(FEWSHOT_IDS)]


def program(doc, response):
    """Returns the response with the three asserts of the prompt as its check."""
    return Program(response, "\n".join(doc["test_list"][:3]))


def run(responses, docs):
    """Filter of the harness: the result of each response's program."""
    return code_tasks.run(responses, docs, program)


def pass_at_k(references, predictions, k):
    """Metric of one problem: {"pass@k": ...}."""
    return code_tasks.score(predictions, k)
