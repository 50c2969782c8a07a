"""Benchmarks with a chat template: requests are the harness's own, and their ids those of transformers."""

import argparse
import json

import jax
import numpy as np
import pytest

from mtp_jax import sharding
from mtp_jax.config import MeshConfig, UserError, with_values
from mtp_jax.data import load_tokenizer
from mtp_jax.evaluation import benchmarks, decode_tasks, harness
from mtp_jax.language_model import LanguageModel
from tests import real_data
from tests.data.chat_templates import SPECIAL, TEMPLATES
from tests.data.test_tokenizer import byte_level
from tests.decoding.models import MLA, build, replace

lm_eval = pytest.importorskip("lm_eval")

TASKS = {
    "written": """
output_type: generate_until
doc_to_text: "Q: {{question}}?"
doc_to_target: "{{answer[0]}}"
generation_kwargs: {until: ["STOP"], max_gen_toks: 8, do_sample: true, temperature: 3.0}
metric_list: [{metric: exact_match}]
""",
    "prefixed": """
output_type: generate_until
doc_to_text: "Q: {{question}}?"
doc_to_target: "{{answer[0]}}"
gen_prefix: "The answer is "
generation_kwargs: {until: ["STOP"], max_gen_toks: 2}
metric_list: [{metric: exact_match}]
""",
    "chosen": """
output_type: multiple_choice
doc_to_text: "Q: {{question}}?"
doc_to_choice: ["yes it is", "no"]
doc_to_target: 0
metric_list: [{metric: acc}]
""",
}
COMMON = """
task: {name}
description: "Answer. "
custom_dataset: !function mtp_jax.evaluation.benchmark_data.from_files
dataset_kwargs: {{splits: {{validation: nq_open_validation.jsonl}}}}
validation_split: validation
fewshot_split: validation
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("chat")
    byte_level(SPECIAL).save(str(made / "tokenizer.json"))
    (made / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    for name, text in TASKS.items():
        (made / f"{name}.yaml").write_text(COMMON.format(name=name) + text)
    return made


@pytest.fixture(scope="module")
def built():
    return build(replace(MLA, vocab_size=336), context=768)


@pytest.fixture
def model_of(folder, built):
    def make(name):
        (folder / "chat_template.jinja").write_text(TEMPLATES[name])
        config = with_values(built.config, {"data.tokenizer": str(folder)})
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        return LanguageModel(config, built.params, built.biases, load_tokenizer(str(folder)), mesh)

    return make


@pytest.fixture
def selected(folder, monkeypatch):
    monkeypatch.setenv("MTP_DATA_DIR", str(real_data.find("bench")))

    def select(*argv):
        flags = argparse.ArgumentParser()
        flags.add_argument("--tasks")
        flags.add_argument("--limit", type=int, default=3)
        decode_tasks.add_flags(flags)
        benchmarks.add_flags(flags)
        args = flags.parse_args([*argv, f"--tasks_dir={folder}"])
        return benchmarks.select(args, args.tasks.split(",")), args

    return select


@pytest.fixture
def theirs(folder):
    """A model of the harness that renders chats as its class of transformers models does, and keeps the requests."""
    transformers = pytest.importorskip("transformers")
    from lm_eval.api.model import LM

    class Theirs(Recorder, LM):
        tokenizer_name = "theirs"

        def __init__(self, template):
            super().__init__()
            file, tokens = str(folder / "tokenizer.json"), {"bos_token": "<s>", "eos_token": "</s>"}
            self.tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file, chat_template=template, **tokens)
            self.requests = []

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            end = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
            return self.tokenizer.apply_chat_template(chat_history, tokenize=False, **end)

        def loglikelihood_rolling(self, requests):
            raise NotImplementedError

    return Theirs


def evaluated(model, selection, args):
    """The requests that a model of the harness has received."""
    chat = args.apply_chat_template
    lm_eval.simple_evaluate(
        model=model,
        tasks=selection.tasks,
        task_manager=selection.manager,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        bootstrap_iters=0,
        torch_random_seed=None,
        system_instruction=args.system_instruction,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat and args.fewshot_as_multiturn is not False,
    )
    return model.requests


class Recorder:
    """Keeps the requests in place of answering them."""

    requests: list

    def generate_until(self, requests):
        self.requests += [request.args for request in requests]
        return ["" for _ in requests]

    def loglikelihood(self, requests):
        self.requests += [request.args for request in requests]
        return [(0.0, False) for _ in requests]


class Ours(Recorder, harness.HarnessModel):
    def __init__(self, model):
        super().__init__(model, chat=True)
        self.requests = []


ARGV = [
    ("--tasks=written", "--num_fewshot=2", "--system_instruction=Be brief."),
    ("--tasks=chosen", "--num_fewshot=1", "--fewshot_as_multiturn=false"),
    ("--tasks=prefixed",),
]


@pytest.mark.parametrize("template, argv", zip(["mistral", "chatml", "llama"], ARGV, strict=True))
def test_requests_are_the_harness_s_own(model_of, selected, theirs, argv, template):
    flags = (*argv, "--apply_chat_template")
    expected = evaluated(theirs(TEMPLATES[template]), *selected(*flags))
    found = evaluated(Ours(model_of(template)), *selected(*flags))
    assert found == expected and len(found) >= 3 and len({context for context, _ in found}) == 3


def test_the_flags_of_eval_reach_the_requests(model_of, selected, theirs, tmp_path):
    flags = (*ARGV[0], "--apply_chat_template", "--fewshot_as_multiturn=false")
    expected = evaluated(theirs(TEMPLATES["chatml"]), *selected(*flags))
    file = tmp_path / "samples.jsonl"
    text, _ = benchmarks.run(*selected(*flags, f"--samples={file}"), model_of("chatml"))
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    assert [sample["arguments"][0][0] for sample in samples] == [context for context, _ in expected]
    assert "prompts of the chat template" in text and "Be brief." in expected[0][0]


def test_scores_are_those_of_the_ids_of_transformers(model_of, theirs, selected):
    model, other = model_of("llama"), theirs(TEMPLATES["llama"])
    requests = evaluated(other, *selected("--tasks=chosen", "--apply_chat_template"))
    instances = [argparse.Namespace(args=request) for request in requests]
    found = harness.HarnessModel(model, chat=True).loglikelihood(instances)
    for (log_p, _), (context, continuation) in zip(found, requests, strict=True):
        kept = context.rstrip()
        ids = other.tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
        start = len(other.tokenizer(kept, add_special_tokens=False)["input_ids"])
        assert ids[0] == model.tokenizer.bos_id and ids.count(ids[0]) == 1
        ((expected, _),) = model.token_loglikelihood([np.array(ids, np.int32)], [start])
        assert log_p == pytest.approx(expected, rel=1e-4)


def test_answers_end_at_the_mark_and_follow_the_ids_of_the_template(model_of):
    model = model_of("chatml")
    asked = {"until": ["STOP"], "max_gen_toks": 40, "do_sample": True, "temperature": 5.0}
    context = model.chat_template.render([{"role": "user", "content": "?"}], add_generation_prompt=True)
    requests = [argparse.Namespace(args=(context, asked), task_name="t") for _ in range(48)]
    adapter = harness.HarnessModel(model, chat=True, batch_size=48)
    texts = adapter.generate_until(requests)
    ids = model.tokenizer.encode(context, special_tokens=True)
    whole = model.generate([ids] * 48, 40, temperature=5.0, stop="STOP")
    end, tokenizer = model.tokenizer.special_id("<|im_end|>"), model.tokenizer
    marked = [np.flatnonzero(tokens == end) for tokens in whole.tokens]
    assert 2 < sum(map(len, marked))
    for text, tokens, at in zip(texts, whole.tokens, marked, strict=True):
        assert text == tokenizer.decode(tokens[: at[0]] if len(at) else tokens)
    assert not adapter.num_shortened["t"]


def test_a_system_message_that_a_template_refuses_is_left_out(model_of, folder, capsys):
    model = model_of("chatml")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    adapter = harness.HarnessModel(model, chat=True)
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert adapter.apply_chat_template(chat) == "u" and adapter.chat_template(True).startswith("{% for")
    assert "system messages are left out" in capsys.readouterr().err and adapter.chat_template(False) is None
    assert adapter.tokenizer_name == str(folder).replace("/", "__")


def test_unusable_flags_and_models_are_one_line(model_of, folder, selected):
    with pytest.raises(UserError, match="--fewshot_as_multiturn=true: .*add --apply_chat_template"):
        selected("--tasks=written", "--fewshot_as_multiturn")
    model = model_of("chatml")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        benchmarks.run(*selected("--tasks=written", "--apply_chat_template"), model)
