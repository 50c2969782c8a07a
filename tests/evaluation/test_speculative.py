"""Values that eval.py reports of self-speculation, and the sources of the advice on draft lengths."""

import json
import math

import numpy as np
import pytest

import eval as evaluate
import mtp_jax
from mtp_jax.decoding import draft_length
from mtp_jax.decoding.draft_length import Advice, Cost
from mtp_jax.decoding.samplers import make_sampler
from mtp_jax.evaluation import decode_tasks, speculative
from tests.commands import run_here


@pytest.fixture(scope="module")
def workdir(small_workdir):
    return small_workdir


def run_eval(monkeypatch, capsys, *argv):
    """(exit code, stdout, stderr) of eval.py in this process."""
    code = run_here(monkeypatch, evaluate.main, *argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("prompts", ["held out", "lines", "jsonl"])
def test_eval_reports_acceptance_tokens_times_and_the_cache(monkeypatch, capsys, tmp_path, workdir, prompts):
    output, argv = tmp_path / "out.json", []
    if prompts == "lines":
        (tmp_path / "p.txt").write_text("the café is open\n\nthe library\nthe station is\n")
        argv = [f"--prompts={tmp_path / 'p.txt'}"]
    elif prompts == "jsonl":
        lines = [{"prompt": "the café\n"}, {"prompt": "the library is"}, {"prompt": "the"}]
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        argv = [f"--prompts={tmp_path / 'p.jsonl'}"]
    flags = ["--max_new_tokens=24", "--batch_size=2", "--limit=3", f"--output={output}", *argv]
    code, out, err = run_eval(
        *(monkeypatch, capsys, f"--workdir={workdir}", "--tasks=loss,speculative,acceptance", *flags)
    )
    assert (code, err) == (0, "")
    values = json.loads(output.read_text())
    found = values["speculative"]
    assert set(values) == {"step", "loss", "acceptance", "speculative"}
    assert (found["num_prompts"], found["num_same"], found["num_tokens"]) == (3, 3, 72)
    assert found["num_speculative_tokens"] == 2 and len(found["acceptance"]) == 2
    assert 0.5 < found["acceptance"][0] <= 1 and 1.5 < found["tokens_per_forward"] <= 3
    # Two rows and one, 24 tokens each: a batch takes the steps of its slowest row.
    assert 2 * 24 / 3 <= found["num_steps"] <= 2 * 24
    assert found["num_steps"] >= found["num_tokens"] / found["batch_size"] / found["tokens_per_forward"]
    assert found["speed_up"] == pytest.approx(found["tokens_per_second"] / found["plain_tokens_per_second"])
    assert found["cache_bytes"] == 1 * 2 * (24 + 24) * 4  # layers, heads, key and value, float32
    assert found["draft_vocabulary_size"] == found["vocab_size"] == 264 and "\ndrafts from all 264 tokens\n" in out
    assert "3 of 3 texts equal those of plain decoding" in out
    assert f"cache: {found['cache_bytes']} bytes per token" in out
    assert "main" in out and "speed-up" in out


def test_advice_is_printed_for_every_batch_size(monkeypatch, capsys, tmp_path, workdir):
    monkeypatch.setattr("mtp_jax.evaluation.decode_tasks.BATCH_SIZES", (1, 3))
    monkeypatch.setattr(draft_length, "BEYOND_DEPTH", 1)
    monkeypatch.setattr(draft_length, "ITERATIONS", 2)
    output = tmp_path / "out.json"
    argv = [f"--workdir={workdir}", "--tasks=advice", "--limit=2", "--max_new_tokens=12", f"--output={output}"]
    code, out, err = run_eval(monkeypatch, capsys, *argv)
    assert (code, err) == (0, "")
    found = json.loads(output.read_text())["advice"]
    assert [(c["batch_size"], c["num_speculative_tokens"]) for c in found["costs"]] == [
        (b, k) for b in (1, 3) for k in (1, 2, 3)
    ]
    assert all(c["draft_ms"] > 0 and c["verify_ms"] > 0 and c["plain_ms"] > 0 for c in found["costs"])
    assert [a["batch_size"] for a in found["advice"]] == [1, 3]
    assert len(found["acceptance"]) == 3
    assert "K=1" in out and "speculation" in out.splitlines()[-1]


def test_the_number_of_drafts_can_be_chosen_by_measurement(monkeypatch, workdir):
    """Once per batch size; the text is the plain one, and the model chosen for speed drafts as many as were best."""
    monkeypatch.setattr(draft_length, "BEYOND_DEPTH", 0)
    monkeypatch.setattr(draft_length, "ITERATIONS", 2)
    chosen = []
    advise = draft_length.advise
    monkeypatch.setattr(draft_length, "advise", lambda *args: chosen.append(advise(*args)) or chosen[-1])
    lm, prompts = mtp_jax.load(workdir), ["the café is open", "the library", "the station"]
    plain = lm.generate(prompts, 24)
    for _ in range(2):
        found = lm.generate(prompts, 24, speculative=True, num_speculative_tokens="auto")
        assert found.texts == plain.texts
    ((advice,),) = chosen
    assert advice.batch_size == 4 and found.tested.shape[1] == advice.num_speculative_tokens <= 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompts=nowhere.txt"], "error: --prompts=nowhere.txt: no such file"),
        (["--num_speculative_tokens=0"], "error: --num_speculative_tokens=0: must be at least 1"),
        (["--temperature=-1"], "error: temperature=-1.0: must be 0 (greedy) or a positive number"),
        (["--top_p=0.5"], "error: top_p=0.5: changes nothing at temperature=0"),
        (["--min_confidence=1.5"], "error: --min_confidence=1.5: must lie between 0 and 1"),
        (["--batch_size=0"], "error: --batch_size=0: must be at least 1"),
        (["--max_new_tokens=0"], "error: --max_new_tokens=0: must be at least 1"),
    ],
)
def test_unusable_flags_are_one_line(monkeypatch, capsys, workdir, argv, message):
    code, out, err = run_eval(monkeypatch, capsys, f"--workdir={workdir}", "--tasks=speculative", *argv)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith(message)


GIVEN = {"prompts": "p.txt", "max_new_tokens": "8", "temperature": "0.0", "top_k": "3", "top_p": "0.5"}
GIVEN["min_confidence"] = "0.5"


@pytest.mark.parametrize("tasks", ["loss,acceptance", "gsm8k", "loss,humaneval_64"])
@pytest.mark.parametrize("name", decode_tasks.OWN_FLAGS)
def test_flags_that_no_task_would_read_are_refused(monkeypatch, capsys, workdir, tasks, name):
    """A benchmark's temperature is part of what is measured and said by its file: another would go unnoticed."""
    argv = [f"--tasks={tasks}", f"--{name}={GIVEN[name]}"]
    code, out, err = run_eval(monkeypatch, capsys, f"--workdir={workdir}", *argv)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith(f"error: {argv[1]}: is read by --tasks=speculative,advice only; benchmarks generate")


@pytest.mark.parametrize("tasks", ["loss,acceptance", "gsm8k"])
def test_a_draft_length_without_drafts_is_refused(monkeypatch, capsys, workdir, tasks):
    code, out, err = run_eval(
        monkeypatch, capsys, f"--workdir={workdir}", f"--tasks={tasks}", "--num_speculative_tokens=2"
    )
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith(
        "error: --num_speculative_tokens=2: is read by --tasks=speculative,advice, and by benchmarks with --spec"
    )


@pytest.mark.parametrize("task", ["speculative", "advice"])
def test_beside_a_task_that_reads_them_such_flags_are_taken(monkeypatch, capsys, tmp_path, workdir, task):
    (tmp_path / "p.txt").write_text("the café")
    given = GIVEN | {"temperature": "0.7", "prompts": str(tmp_path / "p.txt")}
    argv = [f"--workdir={workdir}", f"--tasks=loss,{task}", "--check_only", *(f"--{k}={v}" for k, v in given.items())]
    assert run_eval(monkeypatch, capsys, *argv) == (0, "", "")


def test_the_temperature_given_is_the_one_that_texts_are_written_at(monkeypatch, capsys, tmp_path, workdir):
    found = []
    monkeypatch.setattr(speculative, "measure", lambda *args, sampler, **options: found.append(sampler) or 1 / 0)
    argv = [f"--workdir={workdir}", "--tasks=speculative"]
    run_eval(monkeypatch, capsys, *argv, "--temperature=0.7", "--top_k=3")
    run_eval(monkeypatch, capsys, *argv)
    assert found == [make_sampler(0.7, top_k=3), make_sampler(0.0)]


@pytest.mark.parametrize("content", ['{"text": "a"}\n', "no json\n", "", "[1]\n", '{"prompt": ["a"]}\n'])
def test_a_file_without_prompts_is_one_line(monkeypatch, capsys, tmp_path, workdir, content):
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    argv = [f"--workdir={workdir}", "--tasks=speculative", f"--prompts={path}"]
    code, out, err = run_eval(monkeypatch, capsys, *argv)
    assert (code, out) == (2, "") and err.startswith(f"error: --prompts={path}: ") and len(err.splitlines()) == 1


def test_a_prompt_is_named_by_its_line_and_its_place(monkeypatch, capsys, tmp_path, workdir):
    lines, words = tmp_path / "p.jsonl", tmp_path / "p.txt"
    lines.write_text('{"prompt": "a"}\n\n\n{"prompt": null}\n')
    words.write_text("the\n\ncafé\n" + "a" * 200)
    for path, message in ((lines, "line 4 is no JSON"), (words, "prompt 2: has 201 tokens")):
        argv = [f"--workdir={workdir}", "--tasks=speculative", f"--prompts={path}"]
        code, out, err = run_eval(monkeypatch, capsys, *argv)
        assert (code, out) == (2, "") and message in err, err


def test_a_hugging_face_folder_needs_prompts(monkeypatch, capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    code, out, err = run_eval(monkeypatch, capsys, f"--workdir={tmp_path}", "--tasks=speculative")
    assert (code, out) == (2, "") and "give --prompts=FILE" in err, err


def test_waiting_prompts_are_sampled_with_draws_of_their_own(workdir):
    import mtp_jax

    prompt = np.arange(97, 107)
    options = {"max_new_tokens": 20, "sampler": make_sampler(1.5), "num_speculative_tokens": 0}
    first, second = mtp_jax.load(workdir).decoder.generate([prompt, prompt], batch_size=1, **options).tokens
    assert not np.array_equal(first, second)


def test_held_out_prompts_are_parts_of_validation_documents(workdir):
    from mtp_jax import data
    from mtp_jax.training.workdir import read_config

    config = read_config(workdir)
    corpus = data.prepare(config)
    prompts = speculative.held_out_prompts(config, 5, 20)
    assert len(prompts) == 5 and {len(p) for p in prompts} == {20}
    (part,) = corpus.sources
    first = part.store.document(int(part.validation[0]))
    np.testing.assert_array_equal(prompts[0], first[:20])
    many = speculative.held_out_prompts(config, 10_000, 20)
    held_out = [document.tobytes() for document in corpus.held_out_documents()]
    assert len(many) > len(part.validation)  # later parts of long documents as well
    assert all(any(p.astype(np.asarray(first).dtype).tobytes() in d for d in held_out) for p in many)


def test_the_best_draft_length_weighs_tokens_against_time():
    # A draft costs 1 ms, a plain step 10, verification a tenth more for each token; accepted 80 % and 50 %.
    costs = [Cost(1, k, 1.0 * k, 10.0 + k, 10.0) for k in (1, 2, 3)]
    costs += [Cost(8, k, 9.0 * k, 10.0 + 9 * k, 10.0) for k in (1, 2, 3)]
    rates = [0.8, 0.5, math.nan]
    assert draft_length.speed_up(rates, costs[0]) == pytest.approx(1.8 * 10 / 12)
    assert draft_length.speed_up(rates, costs[1]) == pytest.approx(2.2 * 10 / 14)
    assert draft_length.speed_up(rates, costs[2]) == pytest.approx(2.2 * 10 / 16)  # what was never judged gains nothing
    best = draft_length.advise(rates, costs)
    assert best == [Advice(1, 2, pytest.approx(22 / 14)), Advice(8, 0, 1.0)]
    assert draft_length.stops_paying(best) == 8
    assert draft_length.stops_paying(best[:1]) is None
    lines = draft_length.text(rates, costs, best).splitlines()
    assert lines[2].split() == ["1", "10.000", "1.50x", "1.57x", "1.38x", "2"]
    assert lines[3].split()[-1] == "plain" and lines[-1] == "from batch size 8 on speculation does not pay"


def test_where_speculation_pays_again_at_larger_batches_it_does_not_stop_before():
    rows = [Advice(1, 0, 1.0), Advice(2, 1, 1.1), Advice(4, 0, 1.0), Advice(8, 0, 1.0)]
    assert draft_length.stops_paying(rows) == 4
    costs = [Cost(b, 1, 1.0, 10.0, 10.0) for b in (1, 2)]
    for rows, said in (
        ([Advice(1, 1, 1.5), Advice(2, 1, 1.5)], "speculation pays at every batch size up to 2"),
        ([Advice(1, 0, 1.0), Advice(2, 1, 1.5)], "speculation pays at batch size 2, but not at all below"),
    ):
        assert draft_length.text([0.5], costs, rows).splitlines()[-1] == said
