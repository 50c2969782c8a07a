"""Screenshots of the documentation site in headless Chromium, and what it finds wrong with the pages.

    make docs
    pip install playwright && playwright install chromium    # or an installed one: --chromium=/usr/bin/chromium
    python .ci/screenshots.py [--output=build/screenshots] [--pages=decoding,api]

Every page is drawn at the width of a phone and of a desktop, some in dark colours too. Problems are printed; the exit
code is 1: a page wider than its window, content outside it, a failed request, one to another host, a JavaScript error.
"""

import argparse
import functools
import http.server
import pathlib
import sys
import threading

from playwright.sync_api import Browser, sync_playwright

SITE = pathlib.Path(__file__).parent.parent / "build" / "site"
WINDOWS = {"phone": (390, 844), "desktop": (1280, 900)}
DARK_PAGES = ("index", "findings", "experiments/star_graph/index")
MAX_HEIGHT = 16_000  # of a picture; beyond the largest texture (16,384) Chromium repeats the page from its beginning

# Elements that end outside the window and are in none that scrolls.
OVERFLOW = """() => {
  const width = document.documentElement.clientWidth, found = [];
  if (document.documentElement.scrollWidth > width) found.push("the page is wider than the window");
  const scrolls = (e) =>
    e !== document.body && (getComputedStyle(e).overflowX !== "visible" || scrolls(e.parentElement));
  for (const e of document.querySelectorAll("article *"))
    if (e.getBoundingClientRect().right > width + 1 && !scrolls(e.parentElement)) found.push(`outside: ${e.outerHTML}`);
  return found.map((text) => text.slice(0, 120));
}"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


def draw(browser: Browser, root: str, page: str, window: str, scheme: str, output: pathlib.Path) -> list[str]:
    """Draws a page into a file of `output`, and returns its problems."""
    (width, height), problems = WINDOWS[window], []
    tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda r: r.url.startswith(root) or problems.append(f"request to another host: {r.url}"))
    tab.on("response", lambda r: r.ok or problems.append(f"{r.url} answers {r.status}"))
    tab.goto(f"{root}/{page}.html", wait_until="networkidle")
    problems += tab.evaluate(OVERFLOW)
    tall = min(MAX_HEIGHT, tab.evaluate("document.documentElement.scrollHeight"))
    path = output / f"{page.replace('/', '-')}.{window}.{scheme}.png"
    tab.screenshot(path=path, full_page=True, clip={"x": 0, "y": 0, "width": width, "height": tall})
    tab.close()
    return [f"{page} ({window}, {scheme}): {problem}" for problem in problems]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=pathlib.Path, default=SITE.parent / "screenshots")
    parser.add_argument("--chromium", help="an installed Chromium instead of playwright's own")
    parser.add_argument("--pages", help="names of pages, separated by commas; all by default")
    flags = parser.parse_args()
    pages = sorted(str(path.relative_to(SITE).with_suffix("")) for path in SITE.rglob("*.html"))
    pages = [page for page in pages if page != "404" and not page.startswith(("files/", "assets/"))]
    if flags.pages:
        pages = [page for page in pages if page in flags.pages.split(",")]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root, problems = f"http://127.0.0.1:{server.server_port}", []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=flags.chromium)
        for page in pages:
            for scheme in ("light", "dark") if page in DARK_PAGES else ("light",):
                for window in WINDOWS:
                    problems += draw(browser, root, page, window, scheme, flags.output)
        browser.close()
    print(f"{len(pages)} pages, pictures in {flags.output}", *problems, sep="\n")
    return 1 if problems or not pages else 0


if __name__ == "__main__":
    sys.exit(main())
