"""The command that chooses a draft vocabulary, and the vocabulary on its way through workdirs and folders."""

import gzip
import json
import shutil

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

import eval as evaluate
import mtp_jax
from mtp_jax.config import UserError
from mtp_jax.language_model import draft_vocabulary
from mtp_jax.tools import convert
from mtp_jax.tools import draft_vocabulary as command
from mtp_jax.training.init_from import copy_sides
from tests.commands import run_here
from tests.decoding.trained import sentences, train_small

SIZE = 24
PROMPTS = ["the station", "the café is"]
FILE = "draft_vocabulary.json"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir with a tokenizer.json, which no test changes: as many ids as the tokenizer of bytes, so that the
    programs are those of other tests."""
    folder = tmp_path_factory.mktemp("trained")
    names = ["<s>", "</s>", "<a>", "<b>", "<c>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(names[:5])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    longer = {"model.num_layers": 2, "training.num_steps": 80, "checkpoint.every": 80}
    return train_small(folder, **{"model.attention": "mla", **longer, "data.tokenizer": folder / "tokenizer.json"})


@pytest.fixture
def workdir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def texts(tmp_path):
    """Texts in two formats, one of them compressed, as a glob."""
    (tmp_path / "texts").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in sentences(20))
    (tmp_path / "texts" / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "texts" / "b.txt").write_text("the library is open", encoding="utf-8")
    return tmp_path / "texts" / "*"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command: exit code, stdout, stderr."""

    def command_here(*argv):
        capsys.readouterr()
        code = run_here(monkeypatch, command.main, *argv)
        return code, *capsys.readouterr()

    return command_here


def test_the_command_writes_what_load_and_eval_draft_from(monkeypatch, capsys, tmp_path, workdir, texts, run):
    code, out, err = run(f"--model={workdir}", f"--files={texts}", f"--size={SIZE}")
    assert (code, err) == (0, "")
    lm, whole = mtp_jax.load(workdir), mtp_jax.load(workdir, draft_vocabulary=False)
    vocab, tokenizer = lm.config.model.vocab_size, lm.tokenizer
    counts = np.zeros(vocab, int)
    for text in [*sentences(20), "the library is open"]:
        for i in [*tokenizer.encode(text).tolist(), tokenizer.eos_id]:
            counts[i] += 1
    assert counts[tokenizer.bos_id] == 0
    expected = sorted(sorted(range(vocab), key=lambda i: (i != tokenizer.eos_id, -counts[i], i))[:SIZE])
    assert lm.draft_vocabulary.tolist() == expected and whole.draft_vocabulary is None
    coverage = counts[expected].sum() / counts.sum()
    assert 0.3 < coverage < 1
    assert out == (
        f"{workdir}/hf/{FILE}: {SIZE} of {vocab} tokens cover {coverage:.2%} of {counts.sum():,} counted tokens; "
        f"a draft reads {SIZE / vocab:.1%} of the output head\n"
    )
    assert json.loads((workdir / "hf" / FILE).read_text())["coverage"] == coverage

    options = {"max_new_tokens": 24, "stop_tokens": ()}
    plain = lm.generate(PROMPTS, **options)
    drafted = lm.generate(PROMPTS, **options, speculative=True)
    from_all = whole.generate(PROMPTS, **options, speculative=True)
    assert drafted.texts == from_all.texts == plain.texts
    assert 0 < drafted.accepted.sum() and drafted.accepted.sum() / drafted.tested.sum() < 1
    outside = sum(int((~np.isin(tokens, lm.draft_vocabulary)).sum()) for tokens in plain.tokens)
    assert outside > 0 and drafted.num_forward_passes > from_all.num_forward_passes  # such tokens are never drafted

    flags = ["--tasks=speculative", "--max_new_tokens=8", "--limit=2", f"--output={tmp_path / 'out.json'}"]
    assert run_here(monkeypatch, evaluate.main, f"--workdir={workdir}", *flags) == 0
    assert f"\ndrafts from {SIZE} of {vocab} tokens\n" in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())["speculative"]
    assert (found["draft_vocabulary_size"], found["vocab_size"], found["num_same"]) == (SIZE, vocab, 2)


def test_a_draft_vocabulary_goes_through_init_from_export_and_import(monkeypatch, tmp_path, workdir, run):
    ids = draft_vocabulary.from_counts(workdir, np.arange(200), 50).ids.tolist()
    (tmp_path / "next").mkdir()
    copy_sides(str(workdir), str(tmp_path / "next"))  # of init_from: hf/ has this file alone
    assert draft_vocabulary.read(tmp_path / "next" / "hf", 400).tolist() == ids
    hf, imported, back = tmp_path / "folder", tmp_path / "imported", tmp_path / "back"
    assert run_here(monkeypatch, convert.main, "export", f"--workdir={workdir}", f"--hf={hf}") == 0
    assert run_here(monkeypatch, convert.main, "import", f"--hf={hf}", f"--workdir={imported}") == 0
    assert run_here(monkeypatch, convert.main, "export", f"--workdir={imported}", f"--hf={back}") == 0
    (tmp_path / "other").mkdir()
    copy_sides(str(hf), str(tmp_path / "other"))
    assert draft_vocabulary.read(tmp_path / "other" / "hf", 400).tolist() == ids
    found = [mtp_jax.load(path) for path in (workdir, hf, imported, back)]
    assert [lm.draft_vocabulary.tolist() for lm in found] == [ids] * 4
    assert mtp_jax.load(hf, draft_vocabulary=False).draft_vocabulary is None
    assert mtp_jax.load(hf, depth=0).draft_vocabulary is None  # nothing to draft with
    plain = found[0].generate(PROMPTS, 12)
    assert found[1].generate(PROMPTS, 12, speculative=True).texts == plain.texts


def test_the_command_changes_and_removes_the_file_of_a_folder(monkeypatch, tmp_path, workdir, texts, run):
    hf = tmp_path / "folder"
    assert run_here(monkeypatch, convert.main, "export", f"--workdir={workdir}", f"--hf={hf}") == 0
    for size in (30, 20):
        code, out, _ = run(f"--model={hf}", f"--files={texts}", f"--size={size}")
        assert code == 0 and out.startswith(f"{hf}/{FILE}: {size} of ")
        assert len(draft_vocabulary.read(hf, 400)) == size
    assert run(f"--model={hf}", "--size=0")[:2] == (0, f"{hf}: {FILE} removed; drafts from all\n")
    assert not (hf / FILE).exists()
    assert run(f"--model={hf}", "--size=0")[:2] == (0, f"{hf}: {FILE} is not there; drafts from all\n")


def test_of_prompts_the_answers_are_counted(tmp_path, workdir, run):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"question": "aaaa", "completion": "zzz"}) + "\n")
    overrides = ["--config.data.records=prompt", "--config.data.prompt_field=question"]
    code, _, err = run(f"--model={workdir}", f"--files={path}", "--size=3", *overrides)
    assert (code, err) == (0, "")
    lm = mtp_jax.load(workdir)
    assert lm.tokenizer.encode("z")[0] in lm.draft_vocabulary
    assert lm.tokenizer.encode("a")[0] not in lm.draft_vocabulary


def test_a_bad_file_is_an_error_of_load_and_no_error_without_it(workdir):
    (workdir / "hf").mkdir()
    (workdir / "hf" / FILE).write_text('{"ids": [5, 3]}')
    with pytest.raises(UserError, match=f"hf/{FILE}: field 'ids' has 3 after 5"):
        mtp_jax.load(workdir)
    assert mtp_jax.load(workdir, draft_vocabulary=False).draft_vocabulary is None


def test_unusable_arguments_are_one_line(tmp_path, workdir, texts, run):
    (tmp_path / "empty.txt").write_text("")
    vocab = mtp_jax.load(workdir).config.model.vocab_size
    files, size = f"--files={texts}", "--size=20"
    cases = [
        ([files, "--size=-1"], "--size=-1: must be at least 1"),
        ([files, f"--size={vocab}"], f"--size={vocab}: must be below the model's vocabulary of {vocab}"),
        ([size], "--files: is empty; give globs"),
        ([size, "--files=nowhere/*"], "data.files=nowhere/*: matches no file"),
        ([size, f"--files={tmp_path / 'empty.txt'}"], f"data.files={tmp_path / 'empty.txt'}: holds no text"),
        ([files, "--size=0"], f"{files}: is not read with --size=0"),
        ([size, files, "--config.seed=3"], "--config.seed=3: is no key of the texts"),
        ([size, files, "--config.data.source=synthetic"], f"{files}: of no effect with data.source=synthetic"),
        ([size, files, "--config.data.tokenizer=bytes"], "--config.data.tokenizer=bytes: is not the model's"),
    ]
    for argv, message in cases:
        code, out, err = run(f"--model={workdir}", *argv)
        assert (code, out) == (2, "") and err.startswith(f"error: {message}") and len(err.splitlines()) == 1, err
    assert not (workdir / "hf").exists()


def test_a_model_without_a_tokenizer_is_refused(monkeypatch, tmp_path, workdir, texts, run):
    hf = tmp_path / "folder"
    assert run_here(monkeypatch, convert.main, "export", f"--workdir={workdir}", f"--hf={hf}") == 0
    (hf / "tokenizer.json").unlink()
    code, out, err = run(f"--model={hf}", f"--files={texts}", "--size=20")
    assert (code, out) == (2, "") and err.startswith(f"error: --model={hf}: has no tokenizer.json")
