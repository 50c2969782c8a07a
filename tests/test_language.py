"""Terms of docstrings, comments, documents, messages and names; each pattern matches one that earlier versions used."""

import ast
import io
import pathlib
import re
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parent.parent
_UNITS = "token|row|step|device|layer|second|chip|position|head|expert|depth|line|pass|run|slot|problem|process|host"
_COUNTED = (
    "tokens?|bytes|numbers?|rows?|rounds|blocks?|entry|entries|steps|layers|keys?|FLOPs?|milliseconds|ms|seconds|texts?|"
    "prompts?|drafts?|lines?|one|experts?|programs?|files?|folders?|items?|GiB|kB|MB"
)
TERMS = {  # pattern, the term to write
    r"\b[Cc]ut(s|ting)?\b": "shard, split, truncate, cut off",
    r"\b(house|jail|walls?)\b(?! clock)": "architecture, sandbox, isolation",
    r"\b[Tt]runks?\b": "decoder",
    r"\b[Ww]ir(ing|ed)\b": "conventions",
    r"\bspread\b": "dispatch, standard deviation",
    r"\b(draft\w*|speculative|decoding) rounds?\b": "speculative step",
    r"\b(says?|speaks?|asks?|knows?|wants?|meets?)\b": "state, report, require, support, connect",
    r"\b(cannot|can|be) (tell|told)\b": "distinguish",
    r"\bskeleton\b": "abstract model",
    r"\btake[ns]? apart\b": "unstack",
    r"\bsound\b": "valid",
    r"(?<!\.)\bbroken\b": "corrupt",
    r"\bforetell|\bforetold\b": "predict",
    r"\bways\b(?! of)": "conventions, directions",
    r"\b(is|are|was|be) said\b": "is stated, is reported",
    r"\b(who|nobody|somebody|everybody|anybody|whoever)\b": "name the subject",
    rf"\b({_COUNTED}) an? ({_UNITS})\b": "per",
    r"\bmosaic\b": "pallas_hopper",
    r"\brented?\b": "",
}
# Words of identifiers, between underscores. `trunk` itself is a name in the weights tree, which checkpoints keep.
NAMES = {
    "cut": "split, truncate",
    "cuts": "split, truncate",
    "trunk": "decoder",
    "ways": "conventions",
    "wiring": "conventions",
    "spread": "mean_and_std, dispatch",
    "spelled": "name, text",
    "sound": "valid",
    "skeleton": "abstract_model",
    "broken": "corrupt",
    "jail": "sandbox",
    "walls": "sandbox",
    "house": "layering",
}
IN_WEIGHTS = {"trunk"}
SEEDS = {"fim first cut", "fim second cut"}  # of random numbers, which another text would change
ALIASES = {"model.attention_kernel=mosaic is now pallas_hopper"}  # notices about earlier names
# Names in code and quotations of programs.
QUOTED = re.compile(r"`[^`]*`|\"[^\"]*\"|'[^'\s]*'")
# A docstring begins with a noun phrase or a verb.
QUESTION = re.compile(r"^(What|How|Which|Whether|Where|Who|Why|When)\b")


def texts(path):
    """Yields (line, text) of every docstring and comment or, for documents, of every line outside code blocks."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        is_code = False
        for number, line in enumerate(source.splitlines(), 1):
            is_code ^= line.startswith("```")
            if not is_code and not line.startswith("    "):
                yield number, line
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and ast.get_docstring(node):
                yield from enumerate(str(first.value.value).splitlines(), first.lineno)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def messages(path):
    """Yields (line, text) of every string of several words that is not a docstring, the parts of f-strings too.

    Strings of several lines are programs and data of tests.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    alone = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            if node not in alone and node.value not in SEEDS | ALIASES and "\n" not in node.value.strip():
                yield node.lineno, node.value


def identifiers(path):
    """Yields (line, name) of every variable, argument, attribute, function and class."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for field in ("id", "arg", "attr", "name"):
            name = getattr(node, field, None)
            if isinstance(name, str):
                yield getattr(node, "lineno", 1), name


def names_of_tests(path):
    """Yields (line, text) of the name of every test, its words between spaces."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and re.match(r"test_|Test", node.name):
            yield node.lineno, node.name.replace("_", " ")


def questions(path):
    """Yields (line, text) of docstrings that begin with a question word."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found = ast.get_docstring(node) or ""
            if QUESTION.match(found):
                yield getattr(node, "lineno", 1), found.splitlines()[0]


def findings(paths, root=ROOT):
    """Returns a line for each text or name with a term to replace, and for each docstring that is a question."""
    out = []
    for path in paths:
        is_python = path.suffix == ".py"
        for number, text in [*texts(path), *([*messages(path), *names_of_tests(path)] if is_python else ())]:
            plain = QUOTED.sub("", text)
            out += [
                f"{path.relative_to(root)}:{number}: {match.group()!r}, write {term!r}: {text.strip()}"
                for pattern, term in TERMS.items()
                if (match := re.search(pattern, plain))
            ]
        if is_python:
            out += [f"{path.relative_to(root)}:{number}: a question: {text}" for number, text in questions(path)]
            out += [
                f"{path.relative_to(root)}:{number}: name {name}, write {NAMES[word]!r}"
                for number, name in identifiers(path)
                for word in name.lower().split("_")
                if word in NAMES and name not in IN_WEIGHTS
            ]
    return out


PARTS = {
    **{f"mtp_jax/{name}": f"mtp_jax/{name}/**/*.py" for name in sorted(p.name for p in (ROOT / "mtp_jax").iterdir())},
    "mtp_jax": "mtp_jax/*.py",
    "commands": "*.py",
    "configs": "configs/**/*.py",
    "experiments": "experiments/**/*.py",
    "experiments, documents": "experiments/**/README.md",
    "benchmarks": "benchmarks/*.py",
    **{f"tests/{name}": f"tests/{name}/**/*.py" for name in sorted(p.name for p in (ROOT / "tests").iterdir())},
    "tests": "tests/*.py",
    "documents": "docs/*.md",
    "launch": "launch/*.md",
    "hooks of the site": "docs/*.py",
    "README": "README.md",
    "CONTRIBUTING": "CONTRIBUTING.md",
}


@pytest.mark.parametrize("part", [part for part in PARTS if "." not in part and not part.endswith("__")])
def test_texts_use_the_terms_of_the_field(part):
    left_out = ("log.md", pathlib.Path(__file__).name)
    found = findings(path for path in sorted(ROOT.glob(PARTS[part])) if path.name not in left_out)
    assert not found, "\n".join([f"{len(found)} texts", *found])


def test_terms_are_found():
    """Texts with a term to replace are found; texts without one, or with one in a quoted name, are not."""
    lines = ["the trunk is cut", "two rows a device", "nobody reads it", "what is said of it", "a broken file"]
    lines += ["--over: asks for a twice", "the wiring of depth 2", "each draft round", "which cannot be told"]
    for line in lines:
        assert any(re.search(pattern, line) for pattern in TERMS), line
    good = ["the decoder is sharded", "a token is read", "`trunk` in a name", "rows per device", "wall clock"]
    good += ["400.broken is a folder", "is not known", "rounds of the all-to-all"]
    assert not any(re.search(pattern, QUOTED.sub("", line)) for pattern in TERMS for line in good)


def test_messages_and_names_are_read(tmp_path):
    """Literals and parts of f-strings, of several words and not in docstrings; names by their words."""
    file = tmp_path / "module.py"
    file.write_text(
        '"""Docstring."""\nKEY = "trunk"\n\n\ndef f(num_cut, seed):\n'
        '    raise ValueError(f"{seed} asks for it")\n\n\nmodel.trunk = "fim first cut"\n'
    )
    found = findings([file], tmp_path)
    assert [line.partition(", write")[0] for line in found] == ["module.py:6: 'asks'", "module.py:5: name num_cut"]


def test_comments_and_names_of_tests_are_read(tmp_path):
    """Comments at the end of a line too; the names of tests by all terms, those of other functions by their words."""
    file = tmp_path / "test_module.py"
    file.write_text(
        "x = 1  # two rows a device\n\n\ndef test_the_file_says_so():\n"
        "    # the walls of x\n    rows_a_device = '# one'\n"
    )
    found = findings([file], tmp_path)
    assert [line.partition(", write")[0].partition(": ")[2] for line in found] == [
        "'rows a device'",
        "'walls'",
        "'says'",
    ]
