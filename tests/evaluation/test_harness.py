"""Values given to the harness equal those of a scorer without batches, caches or the harness: it reads
the files, makes the prompts by hand and computes the logits of whole rows."""

import argparse
import dataclasses
import json
import re
import string

import jax
import numpy as np
import pytest

from mtp_jax import sharding
from mtp_jax.config import MeshConfig, UserError
from mtp_jax.data import ByteTokenizer, load_tokenizer
from mtp_jax.decoding.generator import Generation, Generator
from mtp_jax.evaluation import benchmarks, decode_tasks, harness
from mtp_jax.language_model import LanguageModel
from mtp_jax.mtp import kind_of
from tests import real_data, sentencepiece
from tests.decoding.models import MLA, build, replace, sequential

pytest.importorskip("lm_eval")
CONTEXT, NUM_ITEMS, BOS, EOS = 384, 100, 256, 257
ROWS = 50  # scored at once by the tests' own scorer


@pytest.fixture(scope="module")
def lm():
    """Random weights; depth 1, so that answers can be drafted. Blocks that add little: drafts are often right."""
    built = build(replace(MLA, vocab_size=264), sequential(1), context=CONTEXT, blocks=0.1)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    return LanguageModel(built.config, built.params, built.biases, ByteTokenizer(), mesh)


@pytest.fixture(scope="module")
def main_logits(lm):
    """float[ROWS, T, V] of the next token after each of up to ROWS rows; T is one of three lengths, each a program."""

    def logits(rows):
        length = -(-(max(map(len, rows)) - 1) // 128) * 128
        tokens = np.zeros((ROWS, 1 + length + kind_of(lm.config).depth), int)
        for row, ids in zip(tokens, rows, strict=False):
            row[: len(ids)] = ids
        return lm.logits(tokens)[:, :, 0].astype(np.float64)

    return logits


@pytest.fixture
def evaluate(lm, monkeypatch, tmp_path):
    """(values, samples by task) of benchmarks.run with eval.py's flags, on the real files."""
    monkeypatch.setenv("MTP_DATA_DIR", str(real_data.find("bench")))
    monkeypatch.setattr("lm_eval.evaluator.TaskManager", None)  # the plan's own is used: another reads 13,000 files

    def run(*argv, model=lm):
        flags = argparse.ArgumentParser()
        flags.add_argument("--tasks")
        flags.add_argument("--limit", type=int)
        decode_tasks.add_flags(flags)
        benchmarks.add_flags(flags)
        args = flags.parse_args([*argv, f"--samples={tmp_path / 'samples.jsonl'}"])
        _, values = benchmarks.run(benchmarks.select(args, args.tasks.split(",")), args, model)
        samples = {}
        for line in (tmp_path / "samples.jsonl").read_text().splitlines():
            sample = json.loads(line)
            samples.setdefault(sample["task"], []).append(sample)
        return values, samples

    return run


def task_file(folder, name, text):
    (folder / f"{name}.yaml").write_text(text.strip() + "\n")
    return f"--tasks_dir={folder}"


def lines_of(name, num=NUM_ITEMS):
    text = real_data.find(f"bench/{name}").read_text()
    return [json.loads(line) for line in text.splitlines()[:num]]


def log_softmax(logits):
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def scores(logits, rows, nums_new):
    """log p of the last ids of each row, so many as are new; a row's end where it is too long."""
    rows = [row[-(CONTEXT + 1) :] for row in rows]
    order, out = sorted(range(len(rows)), key=lambda i: len(rows[i])), [0.0] * len(rows)
    for at in range(0, len(rows), ROWS):
        found = logits([rows[i] for i in order[at : at + ROWS]])
        for i, logits_TV in zip(order[at : at + ROWS], found, strict=False):
            new = np.arange(len(rows[i]) - nums_new[i], len(rows[i]))
            out[i] = log_softmax(logits_TV[new - 1])[np.arange(len(new)), [rows[i][n] for n in new]].sum()
    return out


def test_multiple_choice(evaluate, main_logits):
    """ARC-Easy, 100 questions: the log-likelihood of every answer, and both accuracies."""
    values, samples = evaluate("--tasks=arc_easy", f"--limit={NUM_ITEMS}")
    docs, rows, nums_new, right, right_norm = lines_of("arc_easy_test.jsonl"), [], [], [], []
    for doc in docs:
        context = f"Question: {doc['question']}\nAnswer:".encode()
        answers = [f" {text}".encode() for text in doc["choices"]["text"]]
        rows += [[BOS, *context, *answer] for answer in answers]
        nums_new += [len(answer) for answer in answers]
    all_expected = iter(scores(main_logits, rows, nums_new))
    for doc, sample in zip(docs, samples["arc_easy"], strict=True):
        answers = doc["choices"]["text"]
        expected = [next(all_expected) for _ in answers]
        found = [response[0] for response in sample["filtered_resps"]]
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        gold = doc["choices"]["label"].index(doc["answerKey"])
        right.append(np.argmax(expected) == gold)
        # the harness divides by the characters of the answer as the file has it
        right_norm.append(np.argmax([e / len(a) for e, a in zip(expected, answers, strict=True)]) == gold)
    metrics = values["arc_easy"]["metrics"]
    assert metrics["acc"]["value"] == pytest.approx(np.mean(right))
    assert metrics["acc_norm"]["value"] == pytest.approx(np.mean(right_norm))
    assert metrics["acc"]["stderr"] == pytest.approx(np.std(right, ddof=1) / np.sqrt(NUM_ITEMS))
    about = {name: values["arc_easy"][name] for name in ("main_metric", "kind", "num_docs", "num_fewshot", "group")}
    assert about == {"main_metric": "acc", "kind": "likelihood", "num_docs": NUM_ITEMS, "num_fewshot": 0, "group": None}


def test_rolling(evaluate, main_logits, tmp_path):
    """100 texts, some longer than the context, as bits per byte."""
    folder = task_file(
        tmp_path,
        "rolled",
        """
task: rolled
custom_dataset: !function mtp_jax.evaluation.benchmark_data.from_files
dataset_kwargs: {splits: {test: lambada_openai_test.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]
""",
    )
    values, samples = evaluate("--tasks=rolled", f"--limit={NUM_ITEMS}", folder)
    texts = [doc["text"].encode() for doc in lines_of("lambada_openai_test.jsonl")]
    windows, nums_new, owners = [], [], []
    for n, text in enumerate(texts):
        ids = [BOS, *text]
        for at in range(1, len(ids), CONTEXT):
            end = min(at + CONTEXT, len(ids))
            windows, nums_new, owners = [*windows, ids[:end]], [*nums_new, end - at], [*owners, n]
    expected = np.bincount(owners, scores(main_logits, windows, nums_new))
    found = [sample["filtered_resps"][0] for sample in samples["rolled"]]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert sum(len(text) > CONTEXT for text in texts) > 10
    total, num_bytes = expected.sum(), sum(map(len, texts))
    found = values["rolled"]["metrics"]
    assert found["bits_per_byte"]["value"] == pytest.approx(-total / num_bytes / np.log(2), rel=1e-4)
    assert found["byte_perplexity"]["value"] == pytest.approx(np.exp(-total / num_bytes), rel=1e-4)
    assert values["rolled"]["higher_is_better"] is False


GENERATIVE = """
task: written
custom_dataset: !function mtp_jax.evaluation.benchmark_data.from_files
dataset_kwargs: {splits: {validation: nq_open_validation.jsonl}}
output_type: generate_until
validation_split: validation
doc_to_text: "Q: {{question}}?\\nA:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["STOP", ","], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, ignore_case: true, ignore_punctuation: true}]
"""


def without_punctuation(text):
    return text.lower().translate(str.maketrans("", "", string.punctuation))


def test_generative(evaluate, lm, main_logits, tmp_path):
    """200 questions, greedily answered by the logits of whole rows, up to a stop string."""
    stop = "STOP"
    values, samples = evaluate("--tasks=written", f"--limit={NUM_ITEMS}", task_file(tmp_path, "written", GENERATIVE))
    docs = lines_of("nq_open_validation.jsonl")
    rows = [[BOS, *f"Q: {doc['question']}?\nA:".encode()] for doc in docs]
    starts = [len(row) for row in rows]
    for _ in range(8):
        for at in range(0, len(rows), ROWS):
            for row, logits in zip(rows[at : at + ROWS], main_logits(rows[at : at + ROWS]), strict=True):
                row.append(int(logits[len(row) - 1].argmax()))
    right = []
    for doc, row, start, sample in zip(docs, rows, starts, samples["written"], strict=True):
        written = row[start : row.index(EOS, start)] if EOS in row[start:] else row[start:]
        text = re.split(f"{stop}|,", lm.tokenizer.decode(written))[0]
        assert sample["resps"] == [[text]]
        right.append(any(without_punctuation(text) == without_punctuation(answer) for answer in doc["answer"]))
    assert values["written"]["metrics"]["exact_match"]["value"] == np.mean(right)
    assert len({sample["resps"][0][0] for sample in samples["written"]}) > 10  # they are not all the same
    assert values["written"]["kind"] == "generative" and values["written"]["tokens_per_forward"] == 1


def test_drafted_answers_are_the_same(evaluate, tmp_path):
    folder = task_file(tmp_path, "written", GENERATIVE)
    argv = ("--tasks=written", "--limit=60", folder, "--batch_size=8")
    _, plain = evaluate(*argv)
    values, drafted = evaluate(*argv, "--speculative", "--num_speculative_tokens=2")
    assert [s["resps"] for s in drafted["written"]] == [s["resps"] for s in plain["written"]]
    assert 1.02 < values["written"]["tokens_per_forward"] <= 3


def test_sampled_answers_repeat_and_differ(evaluate, tmp_path):
    """Repeats of a question are draws of their own; the same command draws the same."""
    sampled = GENERATIVE.replace("do_sample: false", "do_sample: true, temperature: 1.0") + "repeats: 3\n"
    sampled += (
        "filter_list: [{name: all, filter: [{function: take_first_k, k: 3}]}]\nprocess_results: !function own.none\n"
    )
    (tmp_path / "own.py").write_text("def none(doc, results):\n    return {'exact_match': len(set(results[0]))}\n")
    folder = task_file(tmp_path, "written", sampled)
    first, second = (evaluate("--tasks=written", "--limit=5", folder)[1]["written"] for _ in range(2))
    assert [s["resps"] for s in first] == [s["resps"] for s in second]
    assert all(len(set(s["resps"][0])) > 1 for s in first)


def test_answers_keep_the_blanks_they_begin_with(lm, monkeypatch, tmp_path):
    """The indentation of a program is the answer's, whatever the tokenizer makes of the beginning of a text."""
    sentencepiece.llama_style().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    ids = tokenizer.encode("def f():\n return 1  STOP at 3")
    num_before = len(tokenizer.encode("def f():\n"))

    def scripted(self, prompts, max_new_tokens, *, ends, **options):
        rows = [ids[num_before : num_before + max_new_tokens] for _ in prompts]
        rows = [row[: ends(b, row) or len(row)] for b, row in enumerate(rows)]
        return Generation(rows, np.ones(len(rows), int), *np.zeros((2, len(rows), 0), int), num_forward_passes=64)

    monkeypatch.setattr(Generator, "generate", scripted)
    told = harness.HarnessModel(dataclasses.replace(lm, tokenizer=tokenizer))

    def answer(context, until):
        request = harness.Instance("generate_until", {}, (context, {"until": until, "max_gen_toks": 64}), 0)
        return told.generate_until([request])[0]

    assert answer("def f():\n", ["STOP"]) == " return 1  "
    assert answer("def f():\n", [" re"]) == ""
    assert answer("", ["STOP"]) == "return 1  "  # after a bos alone it is the beginning of a text


def test_truncated_contexts_are_counted_and_keep_their_end(lm):
    told = harness.HarnessModel(lm)
    request = harness.Instance("generate_until", {}, ("x" * 500 + "end", {"max_gen_toks": 4}), 0)
    assert told._prompt(request.args[0], 4) == [*b"x" * (CONTEXT - 7), *b"end"] and told.num_truncated == 1
    assert told._prompt("", 4) == [BOS] and told.num_truncated == 1
    pairs = [("y" * 500, " a"), ("y" * 500, " b"), ("z" * 500, " a"), ("z", " a")]
    told.loglikelihood([harness.Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    assert told.num_truncated == 3  # of two contexts, one with two answers


@pytest.fixture(scope="module")
def short(lm):
    """A model whose context holds 64 tokens."""
    built = build(replace(MLA, vocab_size=264), sequential(1), context=64, blocks=0.1)
    return LanguageModel(built.config, built.params, built.biases, ByteTokenizer(), lm.mesh)


@pytest.mark.parametrize(
    ("num_prompt", "asked", "num_written", "num_kept"),
    [
        *[(5, 40, 40, 5), (5, 50, 50, 5), (5, 58, 58, 5), (5, 59, 59, 5)],  # both fit
        *[(5, 60, 59, 5), (5, 63, 59, 5), (5, 1000, 59, 5)],  # what is left behind the prompt
        *[(24, 40, 40, 24), (25, 40, 39, 25), (32, 40, 32, 32)],
        *[(60, 20, 20, 44), (60, 40, 32, 32), (500, 1000, 32, 32)],  # the prompt's end, half of the context at least
    ],
)
def test_an_answer_is_as_long_as_asked_or_as_the_context_holds(short, num_prompt, asked, num_written, num_kept):
    told, text = (
        harness.HarnessModel(short),
        "".join(chr(ord("a") + i % 26) for i in range(num_prompt - 1)),
    )  # and a bos
    arguments = (text, {"max_gen_toks": asked})
    answer = told.generate_until([harness.Instance("generate_until", {}, arguments, 0, ("t", 0, 1))])[0]
    assert told.passes["t"][0] == num_written
    assert told.num_shortened["t"] == (num_written < asked) and told.num_truncated == (num_kept < num_prompt)
    kept = [BOS, *text.encode()][-num_kept:]
    assert answer == short.generate([kept], num_written, seed=0).texts[0]


def test_shortened_answers_are_counted_in_the_results(evaluate, short, tmp_path):
    """Not those that a stop string ends, be it in the last token the context holds, or that are as long as asked."""
    long = GENERATIVE.replace("max_gen_toks: 8", "max_gen_toks: 200").replace('["STOP", ","]', "[]")
    values, samples = evaluate("--tasks=written", "--limit=6", task_file(tmp_path, "written", long), model=short)
    texts = [sample["resps"][0][0] for sample in samples["written"]]
    assert values["written"]["num_shortened"] == 6
    stop = texts[0][-1]
    stopped = long.replace("until: []", f"until: [{json.dumps(stop)}]")
    values, _ = evaluate("--tasks=written", "--limit=6", task_file(tmp_path, "written", stopped), model=short)
    assert values["written"]["num_shortened"] == sum(stop not in text for text in texts) < 6
    values, _ = evaluate("--tasks=written", "--limit=6", task_file(tmp_path, "written", GENERATIVE), model=short)
    assert values["written"]["num_shortened"] == 0


def test_a_model_that_cannot_draft_is_refused_at_once(lm):
    built = build(MLA)
    none = LanguageModel(built.config, built.params, built.biases, ByteTokenizer(), lm.mesh)
    with pytest.raises(UserError, match="mtp.kind=none"):
        harness.HarnessModel(none, speculative=True)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {"stop": [], "max_new_tokens": 256}),
        ({"until": "a", "max_gen_toks": 3}, {"stop": ["a"], "max_new_tokens": 3}),
        ({"until": ["a", ""], "temperature": 0.0, "do_sample": False}, {"stop": ["a"], "max_new_tokens": 256}),
        ({"do_sample": True}, {"stop": [], "max_new_tokens": 256, "temperature": 1.0}),
        ({"do_sample": False, "temperature": 0.7}, {"stop": [], "max_new_tokens": 256}),
        ({"do_sample": True, "temperature": 0.0, "top_p": 0.9}, {"stop": [], "max_new_tokens": 256}),
        ({"do_sample": True, "top_k": 0}, {"stop": [], "max_new_tokens": 256, "temperature": 1.0}),
        ({"temperature": 0.7, "top_p": 0.9}, {"stop": [], "max_new_tokens": 256, "temperature": 0.7, "top_p": 0.9}),
    ],
)
def test_generation_options(asked, expected):
    assert harness.generation_options(asked) == expected


@pytest.mark.parametrize("asked", [{"num_beams": 4}, {"repetition_penalty": 1.2}])
def test_unknown_generation_options_are_refused(asked):
    with pytest.raises(UserError, match=f"{next(iter(asked))}=.* is not supported"):
        harness.generation_options(asked)
