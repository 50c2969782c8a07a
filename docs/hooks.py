"""Hooks of mkdocs (mkdocs.yml): the site has the pages of docs/ as they are written for GitHub.

* Pages outside docs/ (README.md is the first page) are added, and so is every file that a page links to.
* Equations, a fence ```math or $`...`$ in a line, become MathML, which browsers draw without a script. The site has a
  font for them, the glyphs that its equations need of STIX Two Math (SIL Open Font License), since many devices have no
  font with a table of mathematics.
* List items are indented by four spaces, as Markdown in Python needs it.
* At the end of a line numbers keep their units and options their hyphens; pictures link to their files.
"""

import functools
import importlib.util
import io
import logging
import pathlib
import posixpath
import re
from collections.abc import Callable, Iterator
from html import unescape
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
# Pages of the repository outside docs/, by their path there -> path in the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "launch/README.md": "launch/README.md",
    "experiments/README.md": "experiments/README.md",
}
PAGES |= {source: source for source in sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("experiments/*/README.md"))}
FONT = "fonts/stix-two-math.woff2"  # as in docs/site.css
# Characters of the font whatever the equations are: letters and digits, and italic letters, which browsers draw for an
# identifier of one letter. Unicode has no U+03A2, and the italic h is U+210E instead of U+1D455.
LETTERS = {*range(0x20, 0x7F), *range(0x391, 0x3CA), 0x210E, *range(0x1D434, 0x1D468), *range(0x1D6E2, 0x1D71C)}
LETTERS -= {0x3A2, 0x1D455}
FILES = "files"  # folder of the site for all other files that pages link to
_SOURCES = {site: source for source, site in PAGES.items()}
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_FENCE = re.compile(r"^ *```")
_INLINE_MATH = re.compile(r"\$`([^`]+)`\$")
_ITEM = re.compile(r"^(\d+\.|[*-]) +")
_CODE = re.compile(r"(<pre.*?</pre>|<code.*?</code>|<math.*?</math>|<[^>]+>)", re.DOTALL)
_QUANTITY = re.compile(
    r"(?<=\d)[ \n](?=(?:%|ms|s|k|M|B|[KMGT]i?B|±)(?![\w-]))|(?<=±)[ \n](?=\d)"
    r"|(?<=\b[np]) (?==)|(?<=\b[np] =) (?=\d)"
)
_SLASH = re.compile(r"(?<=\w)/(?=\w)")
_LONG_NAME = re.compile(r"\w{12,}")
_OPTION = re.compile(r"(?<![\w-])(--?\w+)")
log = logging.getLogger("mkdocs.plugins.mtp_jax")


# ---------------------------------------------------------------------------------------------------------------
# Links


def site_path(source: str) -> str:
    """Returns the path in the site of a file of the repository, a path relative to its root."""
    if source in PAGES:
        return PAGES[source]
    return source.removeprefix("docs/") if source.startswith("docs/") else f"{FILES}/{source}"


def source_path(site: str) -> str:
    """Returns the file of the repository that a page of the site is made from."""
    if site.startswith(f"{FILES}/"):
        return site.removeprefix(f"{FILES}/")
    return _SOURCES.get(site, f"docs/{site}")


def outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """Applies a function to each line that is not in a fence."""
    lines, is_code = [], False
    for line in markdown.split("\n"):
        is_fence = bool(_FENCE.match(line))
        is_code ^= is_fence
        lines.append(line if is_code or is_fence else change(line))
    return "\n".join(lines)


def targets(markdown: str, source: str) -> Iterator[str]:
    """Yields the files of the repository that a page links to."""
    found: list[str] = []
    outside_code(markdown, lambda line: found.extend(m[2] for m in _LINK.finditer(line)) or line)
    for target in found:
        if not re.match(r"[a-z]+:|#", target):
            yield posixpath.normpath(posixpath.join(posixpath.dirname(source), target.partition("#")[0]))


def with_links_of_site(markdown: str, source: str) -> str:
    """Returns a page with links to paths of the site, relative to its own."""
    folder, own = posixpath.dirname(source), posixpath.dirname(site_path(source))

    def link(match: re.Match[str]) -> str:
        path, hash_mark, anchor = match[2].partition("#")
        if re.match(r"[a-z]+:", path) or not path:
            return match[0]
        target = site_path(posixpath.normpath(posixpath.join(folder, path)))
        return f"{match[1]}{posixpath.relpath(target, own or '.')}{hash_mark}{anchor}{match[3]}"

    return outside_code(markdown, lambda line: _LINK.sub(link, line))


# ---------------------------------------------------------------------------------------------------------------
# Lists and equations


def with_wide_items(markdown: str) -> str:
    """Returns a page whose list items have their further lines indented by four spaces.

    A blank line ends an item that has several paragraphs: without it the next item continues the last of them.
    """
    lines: list[str] = []
    width, is_code = 0, False
    has_blank = {"item": False, "nested": False}  # a blank line since the beginning of the innermost item of each level
    for line in markdown.split("\n"):
        item, indent = _ITEM.match(line), len(line) - len(line.lstrip())
        level = "item" if item else "nested" if width and _ITEM.match(line.lstrip()) else None
        if level and not is_code:
            if width and has_blank[level] and lines[-1]:
                lines.append("")
            has_blank = {"item": has_blank["item"] and not item, "nested": False}
        if item and not is_code:
            width = len(item[0])
        elif line.strip() and indent < width:
            width = 0
        if not line.strip():
            has_blank = {"item": True, "nested": True}
        is_code ^= bool(_FENCE.match(line))
        is_inside = width and not item and line.strip()
        lines.append(" " * max(0, 4 - width) + line if is_inside else line)
    return "\n".join(lines)


def without_math(markdown: str) -> tuple[str, list[str]]:
    """Returns a page with a mark in the place of each equation, and the equations as MathML."""
    found: list[str] = []

    def keep(tex: str, display: str) -> str:
        found.append(mathml(tex, display))
        return f"EQUATION{len(found) - 1}END"

    blocks = re.sub(r"^```math\n(.*?)\n```$", lambda m: keep(m[1], "block"), markdown, flags=re.MULTILINE | re.DOTALL)
    return outside_code(blocks, lambda line: _INLINE_MATH.sub(lambda m: keep(m[1], "inline"), line)), found


def mathml(tex: str, display: str) -> str:
    """Returns an equation as MathML; a command that the converter does not support is a warning, as in strict mode."""
    from latex2mathml.converter import convert

    made = convert(tex, display=display)
    if "\\" in made:
        log.warning("equation %r: a command is not supported", tex)
    return f'<div class="equation">{made}</div>' if display == "block" else made


def with_math(html: str, equations: list[str]) -> str:
    """Returns the HTML of a page with the equations in the place of their marks."""
    html = re.sub(r"<p>EQUATION(\d+)END</p>", lambda m: equations[int(m[1])], html)
    return re.sub(r"EQUATION(\d+)END", lambda m: equations[int(m[1])], html)


def characters(equations: list[str]) -> set[int]:
    """Returns the code points that browsers draw for equations in MathML, and `LETTERS`."""
    return LETTERS | {ord(c) for equation in equations for c in unescape(re.sub("<[^>]+>", "", equation))}


@functools.cache
def font(code_points: frozenset[int]) -> bytes:
    """Returns the glyphs of STIX Two Math for some characters, with all sizes of each, as a WOFF2 file."""
    from fontTools import subset

    package = importlib.util.find_spec("ziamath")  # a package that has the font; nothing else of it is used
    assert package is not None and package.origin is not None
    path = pathlib.Path(package.origin).parent / "fonts" / "STIXTwoMath-Regular.ttf"
    options = subset.Options(flavor="woff2", layout_features=["ssty", "dtls", "flac", "kern"], name_IDs=["*"])
    full = subset.load_font(str(path), options)
    if missing := code_points - full.getBestCmap().keys():
        log.warning("equations: %s has no %s", path.name, " ".join(f"U+{c:04X}" for c in sorted(missing)))
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=code_points)
    subsetter.subset(full)
    made = io.BytesIO()
    subset.save_font(full, made, options)
    full.close()
    return made.getvalue()


# ---------------------------------------------------------------------------------------------------------------
# Line breaks and pictures


def with_line_breaks(html: str) -> str:
    """Returns the HTML of a page with fewer and better places for line breaks.

    There is none inside "41.5 %", "0.70 ± 0.02", "n = 2" and the "--c" of "--config". Long names may break after "/" in
    code and after "_" elsewhere, since they can be wider than the columns of a phone.
    """

    def part(text: str) -> str:
        if code := re.fullmatch("<code>([^<]*)</code>", text):
            inside = _OPTION.sub(r'<span class="option">\1</span>', _SLASH.sub("/<wbr>", code[1]))
            return f"<code>{inside}</code>"
        if text.startswith("<"):
            return text
        return _LONG_NAME.sub(lambda name: name[0].replace("_", "_<wbr>"), _QUANTITY.sub("\N{NO-BREAK SPACE}", text))

    return "".join(map(part, _CODE.split(html)))


def with_links_to_pictures(html: str) -> str:
    """Returns the HTML of a page whose pictures link to their files, which a phone shows in full size.

    A picture of another host, a badge, becomes its text: pages make no request to other hosts.
    """
    html = re.sub(r'<img alt="([^"]*)" src="https?:[^>]*>', r"\1", html)
    return re.sub(r'<p>(<img [^>]*src="([^"]+)"[^>]*>)</p>', r'<p><a href="\2">\1</a></p>', html)


# ---------------------------------------------------------------------------------------------------------------
# Events of mkdocs


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages outside docs/, and the files that pages link to."""
    from mkdocs.structure.files import File

    pages = {source: (ROOT / source).read_text(encoding="utf-8") for source in PAGES}
    for source, text in pages.items():
        files.append(File.generated(config, PAGES[source], content=text))
    for page in ROOT.glob("docs/*.md"):
        pages[f"docs/{page.name}"] = page.read_text(encoding="utf-8")
    equations = [equation for text in pages.values() for equation in without_math(text)[1]]
    files.append(File.generated(config, FONT, content=font(frozenset(characters(equations)))))
    for source, text in pages.items():
        for target in targets(text, source):
            site = site_path(target)
            is_new = files.get_file_from_path(site) is None
            if is_new and (ROOT / target).is_file():
                files.append(File.generated(config, site, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Adapts a page from GitHub to the site."""
    text, page.equations = without_math(markdown)
    return with_wide_items(with_links_of_site(text, source_path(page.file.src_uri)))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Puts the equations of a page into its HTML; a page without sections has no table of contents beside it."""
    if not any(entry.children for entry in page.toc):
        page.meta["hide"] = ["toc"]
    return with_links_to_pictures(with_line_breaks(with_math(html, page.equations)))
