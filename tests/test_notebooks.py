"""notebooks/: nbclient runs each, with other values for some of the variables of its settings (`OVERRIDES`)."""

import importlib.metadata
import io
import json
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib

import numpy as np
import pytest

from tests.commands import QUICK
from tests.conftest import ROOT
from tests.interop import hf_models
from tests.test_language import QUOTED, TERMS

NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
NOTEBOOKS = {name: json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text()) for name in NAMES}
INSTALL = {
    name: "".join(cell["source"])
    for name, book in NOTEBOOKS.items()
    for cell in book["cells"]
    if cell["id"] == "install"
}
CODE = INSTALL["quickstart"]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
# name -> the oldest version that will do
REQUIRED = dict(re.findall(r"^([\w-]+)>=([\d.]+)", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE))
# Name -> variables that the tests change, beside the folder: fewer steps, tokens and variants, and a model that needs
# no download. {} is the notebook's own value.
SHORT = "'--config.training.eval_batches=2', '--config.data.sequence_length=128'"
OVERRIDES = {
    "quickstart": {"NUM_STEPS": "40", "NUM_TOKENS": "40", "SEEDS": "range(2)", "overrides": f"{{}} + [{SHORT}]"},
    "n_search": {
        **{"NUM_STEPS": "20", "NUM_LAYERS": "5", "VARIANTS": "'(none,1),(parallel,3),(sequential,1)'"},
        **{"SETTINGS": "{} + ['--config.optimizer.warmup_steps=5', '--config.training.eval_batches=2']"},
        "evaluation": "['--tasks=loss,acceptance', '--eval.limit=2']",
    },
    # The learning rate is what the notebook names for a model of this size; and MODEL is changed.
    "distillation": {"LEARNING_RATE": "3e-3", "ANSWER_TOKENS": "32", "ROW_TOKENS, BATCH_SIZE, NUM_STEPS": "128, 4, 80"},
}
PIP = [sys.executable, "-m", "pip", "install", "-q", "-r", str(ROOT / "requirements.txt")]


# ---------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_valid_and_without_outputs(name):
    book = NOTEBOOKS[name]
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert book["metadata"]["kernelspec"]["name"] == "python3"
    cells = book["cells"]
    kinds = [cell["cell_type"] for cell in cells]
    assert kinds == ["markdown", *["markdown", "code"] * (len(cells) // 2)]
    ids = [c["id"] for c in cells]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", i) for i in ids)
    for cell in cells:
        extra = {"outputs": [], "execution_count": None} if cell["cell_type"] == "code" else {}
        assert cell == {k: cell[k] for k in ("cell_type", "id", "metadata", "source")} | extra
        assert cell["source"] and all(isinstance(line, str) for line in cell["source"])


@pytest.mark.parametrize("name", NAMES)
def test_the_first_cell_has_a_badge_for_colab_and_the_others_the_terms_of_the_field(name):
    texts = ["".join(cell["source"]) for cell in NOTEBOOKS[name]["cells"] if cell["cell_type"] == "markdown"]
    target = REPOSITORY.replace("https://github.com", "https://colab.research.google.com/github")
    badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({target}"
    badge += f"/blob/main/notebooks/{name}.ipynb)"
    assert badge in texts[0] and badge in (ROOT / "docs" / "quickstart.md").read_text()
    assert f"(notebooks/{name}.ipynb)" in (ROOT / "README.md").read_text()
    for text in texts:
        found = [term for pattern, term in TERMS.items() if re.search(pattern, QUOTED.sub("", text))]
        assert not found, f"write {found}: {text}"
        for link in re.findall(r"\]\((\.\./[^)]+)\)", text):
            assert (ROOT / "notebooks" / link).exists(), link


# ---------------------------------------------------------------------------------------------------------------
# Runs


def with_line(source, start, line):
    """`source` with the one line that begins with `start` replaced."""
    changed, count = re.subn(rf"^{re.escape(start)}.*$", lambda _: line, source, flags=re.MULTILINE)
    assert count == 1, f"{count} lines begin with {start!r}"
    return changed


def execute(book, folder, **settings):
    """The printed text and the pictures of a notebook, after all its cells have run in one kernel without a network.

    settings: name of a variable -> its value in place of the notebook's, which is {} in it.
    """
    import nbclient
    import nbformat

    book = nbformat.from_dict(json.loads(json.dumps(book)))
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    for cell in cells:
        cell.source = "".join(cell.source)
    for name, value in settings.items():
        (cell,) = [c for c in cells if re.search(rf"^{name} = ", c.source, re.MULTILINE)]
        own = re.search(rf"^{name} = (.*)$", cell.source, re.MULTILINE)[1].partition("  #")[0]
        cell.source = with_line(cell.source, f"{name} = ", f"{name} = {value.replace('{}', own)}")
    for cell in book.cells:
        cell.source = "".join(cell.source)
    env = {**QUICK, "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1", "IPYTHONDIR": str(folder / "ipython")}
    place = {"metadata": {"path": str(ROOT / "notebooks")}}
    nbclient.NotebookClient(book, timeout=1800, kernel_name="python3", resources=place).execute(env=env)
    outputs = [output for cell in cells for output in cell.outputs]
    pictures = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    return "".join(o.text for o in outputs if o.output_type == "stream"), pictures


def folder_of(path):
    return f"pathlib.Path({str(path)!r})"


def num_colors(path):
    """The number of colours in a PNG; a panel without curves has few."""
    import matplotlib.image

    pixels = matplotlib.image.imread(io.BytesIO(path.read_bytes()))
    return len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0))


@pytest.mark.parametrize("line", ["assert 1 == 2", "raise SystemExit('one line')", "import no_such_module"])
def test_a_failing_cell_fails_the_run(tmp_path, line):
    nbclient = pytest.importorskip("nbclient")
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": [line], "outputs": [], "execution_count": None}
    with pytest.raises(nbclient.exceptions.CellExecutionError):
        execute({**NOTEBOOKS["quickstart"], "cells": [cell]}, tmp_path)


def test_quickstart_runs(tmp_path):
    text, pictures = execute(
        NOTEBOOKS["quickstart"], tmp_path, WORKDIR=repr(str(tmp_path / "run")), **OVERRIDES["quickstart"]
    )
    assert "step 40/40" in text and "installing" not in text
    greedy = re.search(r"40 tokens: (\d+) forward passes plain, (\d+) with drafts", text)
    assert greedy and int(greedy[1]) == 40 > int(greedy[2])
    assert re.search(r"^2 drafted: [12]\.\d\d tokens", text, re.MULTILINE) and len(pictures) == 2


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A folder as transformers writes it: a Llama trained on Python source for 10 s, and its tokenizer."""
    hf_models.needs_torch()
    import tokenizers
    import torch
    import transformers

    texts = [path.read_text() for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]]
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=384, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    ids = torch.tensor([i for text in texts for i in [*made.encode(text).ids, 0]])
    torch.manual_seed(0)
    torch.set_num_threads(1)  # many small operations: threads take ten times as long
    config = transformers.LlamaConfig(
        **{"vocab_size": made.get_vocab_size(), "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
        **{"tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.1},
    )
    model, num_steps, length = transformers.LlamaForCausalLM(config), 200, 96
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=num_steps, pct_start=0.1)
    for _ in range(num_steps):
        starts = torch.randint(0, len(ids) - length, (8,))
        rows = torch.stack([ids[start : start + length] for start in starts])
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    assert loss.item() < 4, "the model has learnt nothing"
    folder = tmp_path_factory.mktemp("tiny_llama")
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>").save_pretrained(folder)
    return folder


def test_distillation_runs(tiny_llama, tmp_path):
    settings = {"MODEL": repr(str(tiny_llama)), "WORKDIR": folder_of(tmp_path / "run")} | OVERRIDES["distillation"]
    text, pictures = execute(NOTEBOOKS["distillation"], tmp_path, **settings)
    per_pass = {}
    for kind in ("parallel", "sequential"):
        result = json.loads((tmp_path / "run" / kind / "distill.json").read_text())
        after = result["after"]["functions"]
        assert result["before"] is None  # the model drafts nothing
        assert after["num_prompts"] == 8 and len(after["acceptance"]) == 3 and after["acceptance"][0] > 0.1
        per_pass[kind] = after["tokens_per_forward"]
        assert f"{kind}: {per_pass[kind]:.2f} tokens per forward pass" in text
    assert per_pass["sequential"] > per_pass["parallel"] > 1.2 and "before: 1.00 tokens per forward pass" in text
    assert "the text of the model without heads: True" in text
    assert len(pictures) == 1 and num_colors(tmp_path / "run" / "acceptance.png") > 100
    is_exported = max(per_pass, key=per_pass.get) == "sequential"
    assert (tmp_path / "run" / "hf" / "config.json").is_file() == is_exported


def test_n_search_runs(tmp_path):
    text, pictures = execute(
        NOTEBOOKS["n_search"], tmp_path, WORKDIR=folder_of(tmp_path / "run"), **OVERRIDES["n_search"]
    )
    variants = json.loads((tmp_path / "run" / "n_search.json").read_text())["variants"]
    found = {(v["settings"]["mtp.kind"], v["n"]): v["measures"] for v in variants if v["num_finished"] == 1}
    assert sorted(found) == [("none", 1), ("parallel", 4), ("sequential", 2)]
    assert all(measures["bits_per_byte_main"]["mean"] < 5 for measures in found.values())
    assert found["none", 1]["expected_tokens"]["mean"] == 1
    assert min(found[key]["expected_tokens"]["mean"] for key in found if key[1] > 1) > 1
    assert "tokens per row: 129, 132, 130\n3 variants read the same 8 rows of 129 tokens" in text
    assert "search over n = 1 + depth" in text
    assert len(pictures) == 1 and num_colors(tmp_path / "run" / "n_search.png") > 100
    assert (tmp_path / "run" / "curves.png").is_file()


# ---------------------------------------------------------------------------------------------------------------
# Installation


def test_all_notebooks_install_in_the_same_way():
    assert list(INSTALL) == NAMES and set(INSTALL.values()) == {CODE}
    assert f'REPOSITORY = "{REPOSITORY}"' in CODE


def fake_versions(monkeypatch, versions):
    """Lets `importlib.metadata` find these distributions only."""

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.fixture
def install(monkeypatch):
    """Runs the first cell where all that is required is installed; returns the command lines it would have started."""
    fake_versions(monkeypatch, REQUIRED)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if pathlib.Path(p or ".").resolve() != ROOT])
    monkeypatch.setattr(shutil, "which", lambda _: None)
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)

    def install_from(folder):
        monkeypatch.chdir(folder)
        exec(compile(CODE, "install", "exec"), {})
        assert sys.path[0] == str(ROOT)
        return commands

    return install_from


@pytest.mark.parametrize("folder", [ROOT, ROOT / "notebooks", ROOT.parent], ids=["root", "notebooks", "above"])
def test_install_finds_the_clone_and_changes_nothing_that_is_installed(install, folder, monkeypatch):
    if folder == ROOT.parent:  # Colab's own folder, with the clone in it and whatever else is beside
        monkeypatch.setattr(pathlib.Path, "glob", lambda self, _: [folder / "other", ROOT])
    assert install(folder) == []


@pytest.mark.parametrize(
    ("plugins", "extras"),
    [
        ({}, []),
        ({"libtpu": "0.0.30"}, ["jax[tpu]"]),
        ({"jax-cuda12-plugin": "0.4.30"}, ["jax[cuda12]"]),
        ({"jax-cuda13-plugin": "0.9.0"}, ["jax[cuda13]"]),
    ],
    ids=["cpu", "tpu", "cuda12", "cuda13"],
)
@pytest.mark.parametrize("found", [None, "0.4.30"], ids=["missing", "old"])
def test_install_brings_a_jax_for_the_accelerator_if_there_is_none_that_works(
    install, monkeypatch, plugins, extras, found
):
    others = {name: version for name, version in REQUIRED.items() if name != "jax"}
    fake_versions(monkeypatch, {**others, **plugins, **({"jax": found, "jaxlib": found} if found else {})})
    assert install(ROOT) == [[*PIP, *extras]]


def test_install_brings_a_jax_for_the_gpu_to_a_machine_that_has_none(install, monkeypatch):
    fake_versions(monkeypatch, {name: version for name, version in REQUIRED.items() if name != "jax"})
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    assert install(ROOT) == [[*PIP, "jax[cuda12]"]]


@pytest.mark.parametrize(("name", "found"), [("grain", None), ("array_record", "0.7.2")])
@pytest.mark.parametrize("plugin", ["libtpu", "jax-cuda12-plugin"])
def test_install_keeps_a_jax_that_works(install, monkeypatch, name, found, plugin):
    versions = {**REQUIRED, "jax": "0.11.2", "jaxlib": "0.11.1", plugin: "0.11.1"}
    del versions[name]
    fake_versions(monkeypatch, versions | ({name: found} if found else {}))
    assert install(ROOT) == [[*PIP, "jax==0.11.2", "jaxlib==0.11.1"]]


def test_colab_clones_the_project(install, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "google.colab", object())
    clone = subprocess.run

    def run(command, **options):
        if command[0] == "git":
            (tmp_path / "mtp_jax").symlink_to(ROOT)
        return clone(command, **options)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(CODE, "install", "exec"), names)
    assert names["root"] == tmp_path / "mtp_jax" and sys.path[0] == str(tmp_path / "mtp_jax")
    failed = subprocess.CompletedProcess([], 128, "", "fatal: repository not found\n")
    (tmp_path / "mtp_jax").unlink()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match=f"^{REPOSITORY}: git clone failed: fatal: repository not found$"):
        exec(compile(CODE, "install", "exec"), {})


def test_outside_of_a_clone_one_line_is_the_error(install, tmp_path):
    with pytest.raises(SystemExit, match="clone the project and open its notebooks/ from there") as stop:
        install(tmp_path)
    assert "\n" not in str(stop.value)


def test_failing_pip_is_reported(install, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0")
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no network\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit, match="^pip failed: ERROR: no network$"):
        install(ROOT)
