"""The documentation site: pages written for GitHub become pages of mkdocs (docs/hooks.py); make docs builds them."""

import ast
import dataclasses
import importlib.util
import inspect
import io
import re
import sys
import types

import pytest

from mtp_jax.config import schema
from tests.conftest import ROOT


def load(name):
    """Returns a module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load("hooks")
PAGES = [*hooks.PAGES, *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize(
    ("source", "link", "found"),
    [
        ("README.md", "docs/data.md#rows", "data.md#rows"),
        ("README.md", "LICENSE", "files/LICENSE"),
        ("docs/data.md", "chat.md", "chat.md"),
        ("docs/data.md", "../launch/README.md", "launch/README.md"),
        ("docs/data.md", "../README.md", "index.md"),
        ("launch/README.md", "../docs/running.md", "../running.md"),
        ("experiments/README.md", "star_graph/README.md", "star_graph/README.md"),
        (
            "experiments/star_graph/README.md",
            "results/curves.png",
            "../../files/experiments/star_graph/results/curves.png",
        ),
        ("docs/data.md", "https://example.org/a.md", "https://example.org/a.md"),
        ("docs/data.md", "#rows", "#rows"),
    ],
)
def test_links_lead_to_pages_of_the_site(source, link, found):
    assert hooks.with_links_of_site(f"see [it]({link}).", source) == f"see [it]({found})."
    assert hooks.source_path(hooks.site_path(source)) == source
    assert hooks.with_links_of_site(f"```\n[it]({link})\n```", source) == f"```\n[it]({link})\n```"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    for target in hooks.targets((ROOT / page).read_text(), page):
        assert (ROOT / target).exists(), f"{page} links to {target}"


def test_every_page_is_in_the_navigation():
    config = (ROOT / "mkdocs.yml").read_text()
    navigation = set(re.findall(r"^ +- (?:[^:\n]+: )?(\S+\.md)$", config.partition("\nnav:")[2], re.MULTILINE))
    assert navigation == {hooks.site_path(page) for page in PAGES}


@pytest.mark.parametrize(
    ("page", "found"),
    [
        ("1. a\n   b\n\n       code\n2. c", "1. a\n    b\n\n        code\n\n2. c"),
        ("* a\n\n  b\n* c\n  d\n* e", "* a\n\n    b\n\n* c\n    d\n* e"),
        ("* a\n\n  b\n  * c\n  * d\n* e", "* a\n\n    b\n\n    * c\n    * d\n\n* e"),
        ("* a\n  b\n  * c\n    d\n\ntext\n\n    code", "* a\n    b\n    * c\n      d\n\ntext\n\n    code"),
        ("10. a\n    b\n\nc", "10. a\n    b\n\nc"),
        ("* a\n```\n* b\n  c\n```", "* a\n```\n* b\n  c\n```"),
    ],
)
def test_items_are_indented_by_four_and_end_their_paragraphs(page, found):
    assert hooks.with_wide_items(page) == found


def test_lines_break_between_words_of_names_not_inside_quantities_and_options():
    space = "\N{NO-BREAK SPACE}"
    assert hooks.with_line_breaks(
        '<td title="4 %">41.5 % of 2 M, n = 2, 0.70\n± 0.02, a_b, max_position_embeddings</td>, 3 kinds, '
        "<code>a-b --config.x=c/d 4 % -n</code>"
        "<pre><code>--c 4 %</code></pre>"
    ) == (
        f'<td title="4 %">41.5{space}% of 2{space}M, n{space}={space}2, 0.70{space}±{space}0.02, a_b, '
        "max_<wbr>position_<wbr>embeddings</td>, 3 kinds, "
        '<code>a-b <span class="option">--config</span>.x=c/<wbr>d 4 % <span class="option">-n</span></code>'
        "<pre><code>--c 4 %</code></pre>"
    )


def test_pictures_link_to_their_files():
    picture = '<img alt="a" src="files/a.png" />'
    assert hooks.with_links_to_pictures(f"<p>{picture}</p>") == f'<p><a href="files/a.png">{picture}</a></p>'
    assert hooks.with_links_to_pictures(f"<p>see {picture}</p>") == f"<p>see {picture}</p>"
    badge = '<a href="https://a.org"><img alt="Open" src="https://b.org/c.svg" /></a>'
    assert hooks.with_links_to_pictures(f"<td>{badge}</td>") == '<td><a href="https://a.org">Open</a></td>'


def test_equations_are_replaced_and_put_back(monkeypatch):
    monkeypatch.setattr(hooks, "mathml", lambda tex, display: f"<{display}>{tex}</{display}>")
    page = "With $`a_1`$ and $`b`$:\n\n```math\nx\n= y\n```\n\n```\n$`code`$\n```"
    text, equations = hooks.without_math(page)
    assert equations == ["<block>x\n= y</block>", "<inline>a_1</inline>", "<inline>b</inline>"]
    assert "math" not in text and text.endswith("```\n$`code`$\n```")
    html = hooks.with_math("<p>With EQUATION1END</p><p>EQUATION0END</p>", equations)
    assert html == f"<p>With {equations[1]}</p>{equations[0]}"


def test_equations_of_the_pages_are_supported(caplog):
    pytest.importorskip("latex2mathml")
    for page in PAGES:
        _, equations = hooks.without_math((ROOT / page).read_text())
        assert all(equation.startswith(("<math", '<div class="equation"><math')) for equation in equations)
    assert not caplog.records
    hooks.mathml(r"\nosuchcommand{x}", "inline")
    assert "not supported" in caplog.text


def test_the_font_of_equations_has_their_characters(caplog):
    assert f'url("{hooks.FONT}")' in (ROOT / "docs" / "site.css").read_text()
    found = hooks.characters(["<math><mo>&#x2211;</mo><mi>\u03b2</mi></math>", "<math><mo>&lt;</mo></math>"])
    assert found == hooks.LETTERS | {0x2211, 0x3B2, ord("<")}
    pytest.importorskip("ziamath")
    tables = pytest.importorskip("fontTools.ttLib")
    made = tables.TTFont(io.BytesIO(hooks.font(frozenset(found))))
    assert found <= made.getBestCmap().keys() and "MATH" in made and not caplog.records
    assert "SIL Open Font License" in made["name"].getDebugName(13)
    hooks.font(frozenset({0x10FFFF}))
    assert "has no U+10FFFF" in caplog.text


def test_settings_are_shown_with_their_defaults_and_comments(monkeypatch):
    monkeypatch.setitem(sys.modules, "griffe", types.SimpleNamespace(Extension=object, Class=object))
    settings = load("griffe_settings")
    source = inspect.getsource(schema)
    found = {}
    for section in ast.parse(source).body:
        for field in section.body if isinstance(section, ast.ClassDef) else ():
            if isinstance(field, ast.AnnAssign) and field.value is not None:
                text = settings.comment(source.split("\n"), field.lineno - 1, field.end_lineno - 1)
                found[section.name, field.target.id] = settings.default(ast.unparse(field.value)), text
    sections = [value for value in vars(schema).values() if dataclasses.is_dataclass(value)]
    fields = {(c.__name__, f.name): f for c in sections for f in dataclasses.fields(c) if f.name in c.__annotations__}
    for key, field in fields.items():
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            assert key not in found
        else:
            default = field.default_factory() if field.default is dataclasses.MISSING else field.default
            assert eval(found[key][0], vars(schema)) == default
    assert found["YarnConfig", "mscale_all_dim"][1] == "0: YaRN's own attention factor, 0.1 ln(factor) + 1"
    assert found["ModelConfig", "matmul_precision"][1].endswith("The router and the head are the same in all.")
    assert found["ModelConfig", "embed_dim"][1] == ""
    assert found["LocalConfig", "sinks"][1] == "model.sinks of the local layers"
