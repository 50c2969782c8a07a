"""The documentation site: pages written for GitHub become pages of mkdocs (docs/hooks.py); make docs builds them."""

import importlib.util
import re

import pytest

from tests.conftest import ROOT

SPEC = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
hooks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hooks)
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
        ("1. a\n   b\n\n       code\n2. c", "1. a\n    b\n\n        code\n2. c"),
        ("* a\n  b\n  * c\n    d\n\ntext\n\n    code", "* a\n    b\n    * c\n      d\n\ntext\n\n    code"),
        ("10. a\n    b\n\nc", "10. a\n    b\n\nc"),
        ("* a\n```\n* b\n  c\n```", "* a\n```\n* b\n  c\n```"),
    ],
)
def test_items_are_indented_by_four(page, found):
    assert hooks.with_wide_items(page) == found


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
