"""Blocks of README and documents: every command and Python block runs, shortened as tests/document_runs.py states.

A block that is neither run nor listed there with a reason is an error; so is an entry without a block.
"""

import ast
import doctest
import importlib
import re
import shlex
import sys
import textwrap
from typing import NamedTuple

import pytest

from mtp_jax import cli
from mtp_jax.config import UserError, current_key, key_hints, load_config
from mtp_jax.config.schema import Config
from tests.conftest import ROOT, use_one_device
from tests.document_runs import QUICKSTART, RUNS

PAGES = ["README.md", "CONTRIBUTING.md", "launch/README.md", "experiments/README.md"]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
COMMAND = re.compile(r"^(\$ )?(\w+=\S* )*(make|python3?|mtp-[\w-]+|pip|bash|sbatch|kubectl|git|\S+\.sh) ", re.MULTILINE)


class Block(NamedTuple):
    page: str
    line: int
    text: str

    @property
    def kind(self):
        """The block as "command", "session" (lines with >>>), "code" or "text"."""
        if COMMAND.search(self.text):
            return "command"
        if re.search(r"^>>> ", self.text, re.MULTILINE):
            return "session"
        try:
            nodes = ast.walk(ast.parse(textwrap.dedent(self.text)))
        except SyntaxError:
            return "text"
        runs = (ast.Import, ast.ImportFrom, ast.Assign, ast.Call, ast.ClassDef, ast.FunctionDef)
        return "code" if any(isinstance(node, runs) for node in nodes) else "text"


def blocks(page, text):
    """The blocks of a page: between fences, or indented by four spaces or more after a blank line."""
    out, lines, fence, is_after_blank = [], [], None, True
    for number, line in enumerate([*text.splitlines(), "end"], 1):
        if line.lstrip().startswith("```"):
            if fence is not None:
                out.append(Block(page, fence, "\n".join(lines)))
            fence, lines = (number if fence is None else None), []
        elif fence is not None:
            lines.append(line)
        elif (line.startswith("    ") and (lines or is_after_blank)) or (lines and not line.strip()):
            lines.append(line)
        elif lines:
            block = textwrap.dedent("\n".join(lines)).strip("\n")
            out.append(Block(page, number - len(lines), block))
            lines = []
        is_after_blank = not line.strip()
    return out


BLOCKS = {page: [b for b in blocks(page, (ROOT / page).read_text()) if b.kind != "text"] for page in PAGES}


def entry_of(block):
    """The entry of a block in RUNS; fails if there is not exactly one."""
    found = [run for run in RUNS.get(block.page, ()) if run.part in block.text]
    assert len(found) == 1, f"{block.page}:{block.line}: {len(found)} entries in tests/document_runs.py:\n{block.text}"
    return found[0]


def changed(text, run):
    for old, new in run.changes:
        assert old in text, f"{run.part}: has no {old!r}"
        text = text.replace(old, new)
    return text


def commands(text):
    """The command lines of a block as lists of words, without comments and prompts."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [words for line in joined.splitlines() if (words := shlex.split(line.removeprefix("$ "), comments=True))]


def parsed(words):
    """(name of a module of mtp_jax.tools, its arguments) of a command."""
    if words[0].startswith("mtp-"):
        return words[0].removeprefix("mtp-").replace("-", "_"), words[1:]
    if words[:2] == ["python", "-m"]:
        return words[2].removeprefix("mtp_jax.tools."), words[3:]
    assert words[0] == "python" and words[1] in ("train.py", "eval.py"), words
    return words[1].removesuffix(".py"), words[2:]


def run_commands(text, run, monkeypatch):
    """Runs the commands of a block in this process."""
    for words in commands(changed(text, run)):
        name, argv = parsed(words)
        argv += run.adds.get(name, ())
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [name, *argv])
            if run.num_devices == 1:
                use_one_device(patch)
            try:
                cli.run(importlib.import_module(f"mtp_jax.tools.{name}").main)
            except SystemExit as stop:
                assert stop.code in (0, None), f"{shlex.join(words)}: exit code {stop.code}"


def run_python(text, run, kind, monkeypatch):
    """Runs a Python block, or the lines of a session one by one."""
    text, names = changed(text, run), {}
    with monkeypatch.context() as patch:
        use_one_device(patch)
        exec(run.before, names)
        for source in [e.source for e in doctest.DocTestParser().get_examples(text)] if kind == "session" else [text]:
            exec(source, names)
        exec(run.after, names)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with `configs` and the run of the quickstart, for all pages."""
    root = tmp_path_factory.mktemp("documents")
    (root / "configs").symlink_to(ROOT / "configs")
    (block,) = [b for b in BLOCKS["docs/quickstart.md"] if QUICKSTART.part in b.text]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        run_commands(block.text, QUICKSTART, patch)
    return root


TO_RUN = [
    (page, block)
    for page in PAGES
    for block in BLOCKS[page]
    if not any(run.reason for run in RUNS.get(page, ()) if run.part in block.text)
]


@pytest.mark.parametrize(("page", "block"), TO_RUN, ids=[f"{block.page}:{block.line}" for _, block in TO_RUN])
def test_a_block_runs(page, block, folder, monkeypatch, capfd):
    run = entry_of(block)
    monkeypatch.chdir(folder)
    if block.kind == "command":
        run_commands(block.text, run, monkeypatch)
    else:
        run_python(block.text, run, block.kind, monkeypatch)
    assert "error:" not in capfd.readouterr().err


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_listed_with_a_reason(page):
    used = [entry_of(block).part for block in BLOCKS[page]]
    assert sorted(used) == sorted(run.part for run in RUNS.get(page, ())), "an entry has no block, or several"


def items_before_blocks(page, text):
    """The list items that a block indented by four spaces follows: it is shown as a paragraph of the item."""
    lines = text.splitlines()
    for block in [block for block in blocks(page, text) if block.kind != "text"]:
        before = [line for line in lines[: block.line - 1] if line.strip()][-1:]
        indent = len(lines[block.line - 1]) - len(lines[block.line - 1].lstrip())
        if 4 <= indent < 6 and before and re.match(r"([*-]|\d+\.)? +\S|[*-] ", before[0]):
            yield before[0]


@pytest.mark.parametrize("page", PAGES)
def test_no_command_becomes_a_paragraph_of_a_list(page):
    assert not list(items_before_blocks(page, (ROOT / page).read_text()))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("* item\n\n    make x\n", 1),
        ("* item\n  goes on\n\n    make x\n", 1),
        ("1. item\n\n    make x\n", 1),
        ("* item\n\ntext\n\n    make x\n", 0),
        ("* item\n\n      make x\n", 0),
    ],
)
def test_commands_after_list_items_are_found(text, count):
    assert len(list(items_before_blocks("page", text))) == count


def test_reasons_name_files_that_exist():
    assert set(RUNS) <= set(PAGES)
    for run in (run for runs in RUNS.values() for run in runs):
        assert not (run.reason and (run.changes or run.adds or run.before)), run
        for file in re.findall(r"tests/[\w/]+\.py", run.reason):
            assert (ROOT / file).is_file(), run


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("a\n\n    make x\n\nb", ["command"]),
        ("```\n$ python -m mtp_jax.tools.plan --a=1\nout\n```", ["command"]),
        ("```sh\nA=1 mtp-train --b\n```\n\n    >>> f(1)\n", ["command", "session"]),
        ("    from a import b\n", ["code"]),
        ("    x[i] = y[i] if z\n\ntext\n    no block: a paragraph", ["text"]),
        ("1. item\n\n       f(x)\n", ["code"]),
        ('```json\n{"a": [1]}\n```', ["text"]),
    ],
)
def test_blocks_are_found(text, kinds):
    assert [block.kind for block in blocks("page", text)] == kinds


def test_a_block_without_an_entry_is_an_error():
    with pytest.raises(AssertionError, match="README.md:3: 0 entries"):
        entry_of(Block("README.md", 3, "make coffee"))


# ---------------------------------------------------------------------------------------------------------------
# Settings in the text

FLAG = re.compile(r"--config\.([\w.\[\]]+)=('[^']*'|[^\s`'|\])]*)")
HINTS = key_hints(Config)


# The log has commands as they were given, also with settings of earlier versions.
WITH_SETTINGS = [page for page in PAGES if "--config." in (ROOT / page).read_text() and page != "docs/log.md"]


@pytest.mark.parametrize("page", WITH_SETTINGS)
def test_settings_on_the_page_exist(page):
    """Each --config.KEY=VALUE names a key, and its value is of the key's type unless it is a placeholder."""
    for key, value in set(FLAG.findall((ROOT / page).read_text())):
        if key in ("section.key", "a.b", "data.KEY"):
            continue
        assert current_key(re.sub(r"\[\d+\]", "[0]", key), Config) in HINTS, f"{page}: --config.{key}"
        if value and not re.search(r"\b[A-Z]+\b|\.\.\.|\[", f"{key}={value}"):
            try:
                load_config("tiny", [f"--config.{key}={value.strip(chr(39))}"])
            except UserError as error:
                pytest.fail(f"{page}: --config.{key}={value}: {error}")


def test_a_setting_that_does_not_exist_is_found(monkeypatch):
    assert FLAG.findall("`--config.mtp.kind=none` and --config.data.files='a b'") == [
        ("mtp.kind", "none"),
        ("data.files", "'a b'"),
    ]
    assert current_key("mtp.kinds", Config) not in HINTS
