"""HumanEval and MBPP as the harness runs them, with models that write the answers or nothing; and their solutions."""

import json
import pathlib
import re

import pytest

from mtp_jax.config import UserError
from mtp_jax.evaluation import benchmark_data, code_tasks
from mtp_jax.evaluation.sandbox import Limits, run_programs
from tests import real_data
from tests.conftest import ROOT

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from configs.tasks.humaneval import utils as humaneval  # noqa: E402
from configs.tasks.mbpp import utils as mbpp  # noqa: E402

pytestmark = pytest.mark.usefixtures("sandbox_works")

NEEDS_SETUP = 367  # its tests use `root`, which its test_setup_code defines; the harness does not run that


@pytest.fixture
def data(monkeypatch):
    """MTP_DATA_DIR is the folder of the benchmarks."""
    folder = real_data.find("bench/humaneval.jsonl").parent
    real_data.find("bench/mbpp.jsonl")
    monkeypatch.setenv("MTP_DATA_DIR", str(folder))
    return folder


class Model(LM):
    """Answers from a function of (prompt, how often it was asked), and keeps what it was asked."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.asked, self.prompts, self.arguments = answer, {}, [], []

    def generate_until(self, requests, disable_tqdm=False):
        out = []
        for request in requests:
            prompt, arguments = request.args
            number = self.asked[prompt] = self.asked.get(prompt, -1) + 1
            self.prompts.append(prompt)
            self.arguments.append(arguments)
            out.append(self.answer(request.doc, number))
        return out

    def loglikelihood(self, requests, disable_tqdm=False):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def evaluate(model, task, **settings):
    """The harness's results of a task, whose yaml is found by its name."""
    manager = TaskManager(include_path=str(ROOT / "configs" / "tasks"), include_defaults=False)
    return lm_eval.simple_evaluate(
        **{"model": model, "tasks": [task], "task_manager": manager, "bootstrap_iters": 0},
        **{"confirm_run_unsafe_code": True, **settings},
    )


SOLUTION = {"humaneval": "canonical_solution", "mbpp": "code"}


@pytest.mark.parametrize("task", SOLUTION)
def test_the_answers_score_1_and_rubbish_scores_0(data, task):
    right = evaluate(Model(lambda doc, _: doc[SOLUTION[task]]), task, limit=12)
    assert right["results"][task]["pass@1,sandbox"] == 1.0
    assert right["n-samples"][task] == {"original": {"humaneval": 164, "mbpp": 500}[task], "effective": 12}
    wrong = evaluate(Model(lambda doc, _: "    return None  # rubbish\n"), task, limit=12)
    assert wrong["results"][task]["pass@1,sandbox"] == 0.0
    shown = {sample["filtered_resps"][0][0].split(":")[0] for sample in wrong["samples"][task]}
    assert shown <= {"error"}
    odd = Model(lambda doc, _: doc[SOLUTION[task]] if str(doc["task_id"])[-1] in "13579" else "")
    half = evaluate(odd, task, limit=12)
    assert half["results"][task]["pass@1,sandbox"] == 0.5


def test_prompts_and_stop_strings_are_the_harnesss(data):
    """Byte for byte those of its own yaml files, over the same problems."""
    harness = pathlib.Path(lm_eval.__file__).parent / "tasks"
    keys = [f"{key}: " for key in ("doc_to_text", "doc_to_target", "test_split", "num_fewshot", "output_type")]
    for task in SOLUTION:
        ours = (ROOT / "configs" / "tasks" / task / f"{task}.yaml").read_text()
        theirs = (harness / task / f"{task}.yaml").read_text()
        for key in [*keys, "target_delimiter: "]:
            lines = [[line for line in text.split("\n") if line.startswith(key)] for text in (ours, theirs)]
            assert lines[0] == lines[1], key
        settings = [re.search("generation_kwargs:\n(  .*\n)+", text).group() for text in (ours, theirs)]
        assert settings[0] == settings[1] and "until" in settings[0]


def test_the_few_shot_problems_are_the_harnesss(data):
    """2, 3 and 4 of the file, as its utils.py has them by heart; that file cannot be imported without its code_eval."""
    text = (pathlib.Path(lm_eval.__file__).parent / "tasks" / "mbpp" / "utils.py").read_text()
    namespace = {}
    exec(text[text.index("def list_fewshot_samples") :], namespace)
    assert mbpp.fewshot_samples() == namespace["list_fewshot_samples"]()
    model = Model(lambda doc, _: "")
    evaluate(model, "mbpp", limit=1)
    prompt, arguments = model.prompts[0], model.arguments[0]
    assert prompt.count("[BEGIN]\n") == 4 and prompt.count("\n[DONE]\n\n") == 3 and prompt.endswith("[BEGIN]\n")
    assert arguments["until"] == ["[DONE]"] and arguments["do_sample"] is False
    assert "remove first and last occurrence" in prompt


def test_pass_at_k_of_several_samples(data):
    """64 samples a problem of which every fourth is right: 16 pass, so pass@2 = 1 - (48 * 47) / (64 * 63)."""
    model = Model(lambda doc, number: doc["canonical_solution"] if number % 4 == 0 else "    return 'wrong'\n")
    results = evaluate(model, "humaneval_64", limit=1)["results"]["humaneval_64"]
    assert results["pass@2,sandbox"] == pytest.approx(1 - 48 * 47 / (64 * 63))
    assert results["pass@64,sandbox"] == 1.0
    assert model.arguments[0]["temperature"] == 0.2 and model.arguments[0]["do_sample"] is True


def test_without_consent_nothing_is_generated(data):
    model = Model(lambda doc, _: pytest.fail("was asked"))
    with pytest.raises(ValueError, match="marked as unsafe"):
        evaluate(model, "humaneval", limit=1, confirm_run_unsafe_code=False)


def test_all_programs_of_a_task_are_run_in_one_go(data, monkeypatch):
    runs = []

    def run(programs):
        runs.append(programs)
        return run_programs(programs)

    monkeypatch.setattr(code_tasks.sandbox, "run_programs", run)
    evaluate(Model(lambda doc, _: ""), "humaneval", limit=5)
    assert [len(programs) for programs in runs] == [5]


def test_k_above_the_number_of_samples_is_an_error():
    with pytest.raises(UserError, match="pass@2: of 1 samples"):
        code_tasks.score([["passed"]], [1, 2])
    assert code_tasks.score([["passed", "error: x", "passed: not"]], 1) == {"pass@1": pytest.approx(1 / 3)}


def test_all_solutions_of_humaneval_pass(data):
    docs = benchmark_data.read_jsonl("humaneval.jsonl")
    outcomes = run_programs([humaneval.program(doc, doc["canonical_solution"]) for doc in docs])
    assert len(docs) == 164 and [d["task_id"] for d, o in zip(docs, outcomes, strict=True) if not o.passed] == []


def test_all_solutions_of_mbpp_pass_but_one_that_its_tests_do_not_fit(data):
    docs = mbpp.rows(mbpp.TEST_IDS)
    slow_machine = Limits(cpu_seconds=30, wall_seconds=60.0)  # one solution takes seconds
    outcomes = run_programs([mbpp.program(doc, doc["code"]) for doc in docs], slow_machine)
    failed = {doc["task_id"]: str(outcome) for doc, outcome in zip(docs, outcomes, strict=True) if not outcome.passed}
    assert len(docs) == 500 and failed == {NEEDS_SETUP: "error: NameError: name 'root' is not defined"}


def test_wrong_solutions_of_humaneval_fail(data):
    """Each problem with the next one's body, renamed by the prompt: what passes is not what is asked."""
    docs = benchmark_data.read_jsonl("humaneval.jsonl")
    bodies = [doc["canonical_solution"] for doc in docs[1:] + docs[:1]]
    programs = [humaneval.program(doc, body) for doc, body in zip(docs, bodies, strict=True)]
    assert sum(outcome.passed for outcome in run_programs(programs)) == 0


def test_missing_data_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MTP_DATA_DIR", str(tmp_path))
    for module, name in ((humaneval, "humaneval.jsonl"), (mbpp, "mbpp.jsonl")):
        with pytest.raises(UserError, match=f"^MTP_DATA_DIR={tmp_path}: has no {name}; put"):
            module.dataset(version=1.0)
    row = {"task_id": 11, "text": "", "code": "", "test_list": []}
    (tmp_path / "mbpp.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="mbpp.jsonl: has no task_id 12; put the full file"):
        mbpp.dataset()
