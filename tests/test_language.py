"""Terms of docstrings, comments and documents; each pattern matches one that earlier versions used."""

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
    r"\b[Tt]runk\b": "decoder",
    r"\bskeleton\b": "abstract model",
    r"\btake[ns]? apart\b": "unstack",
    r"\bsound\b": "valid",
    r"\bforetell|\bforetold\b": "predict",
    r"\bways\b(?! of)": "conventions, directions",
    r"\b(is|are|was|be) said\b": "is stated, is reported",
    r"\b(who|nobody|somebody|everybody|anybody|whoever)\b": "name the subject",
    rf"\b({_COUNTED}) an? ({_UNITS})\b": "per",
    r"\bmosaic\b": "pallas_hopper",
    r"\brented?\b": "",
}
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


def questions(path):
    """Yields (line, text) of docstrings that begin with a question word."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found = ast.get_docstring(node) or ""
            if QUESTION.match(found):
                yield getattr(node, "lineno", 1), found.splitlines()[0]


def findings(paths):
    """Returns a line for each text of `paths` with a term to replace, and for each docstring that is a question."""
    out = []
    for path in paths:
        for number, text in texts(path):
            plain = QUOTED.sub("", text)
            out += [
                f"{path.relative_to(ROOT)}:{number}: {match.group()!r}, write {term!r}: {text.strip()}"
                for pattern, term in TERMS.items()
                if (match := re.search(pattern, plain))
            ]
        if path.suffix == ".py":
            out += [f"{path.relative_to(ROOT)}:{number}: a question: {text}" for number, text in questions(path)]
    return out


PARTS = {
    **{f"mtp_jax/{name}": f"mtp_jax/{name}/**/*.py" for name in sorted(p.name for p in (ROOT / "mtp_jax").iterdir())},
    "mtp_jax": "mtp_jax/*.py",
    "commands": "*.py",
    "configs": "configs/**/*.py",
    "experiments": "experiments/**/*.py",
    "benchmarks": "benchmarks/*.py",
    "documents": "docs/*.md",
    "README": "README.md",
}


@pytest.mark.parametrize("part", [part for part in PARTS if "." not in part and not part.endswith("__")])
def test_texts_use_the_terms_of_the_field(part):
    found = findings(path for path in sorted(ROOT.glob(PARTS[part])) if path.name != "log.md")
    assert not found, "\n".join([f"{len(found)} texts", *found])


def test_terms_are_found():
    """Texts with a term to replace are found; texts without one, or with one in a quoted name, are not."""
    lines = ["the trunk is cut", "two rows a device", "nobody reads it", "what is said of it"]
    assert all(any(re.search(pattern, line) for pattern in TERMS) for line in lines)
    good = ["the decoder is sharded", "a token is read", "`trunk` in a name", "rows per device", "wall clock"]
    assert not any(re.search(pattern, QUOTED.sub("", line)) for pattern in TERMS for line in good)
