"""Files for contributors: workflows that run the steps of .ci/run, links, versions that agree."""

import pathlib
import re
import shlex

import pytest
import yaml

import mtp_jax
from tests.conftest import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = [path for path in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) if path.stem != "config"]
# Words of a command that depend on the place where it runs.
PLACES = {"$PYTHON": "PYTHON", "$newest": "PYTHON", "$VENV": "VENV", "$scratch/venv": "VENV"}


def normalized(line):
    """A make or pytest command as a list of words, with comments removed and places replaced."""
    line = line.replace("${{ runner.temp }}", "$scratch")
    words = shlex.split(line, comments=True)
    for place, name in PLACES.items():
        words = [word.replace(f"={place}", f"={name}") for word in words]
    return [word for word in words if not word.startswith("MTP_JAX_CACHE=")]


def commands(text):
    """The make and pytest commands of a shell script, each as words."""
    joined = re.sub(r"\\\n\s*", "", text)
    wanted = re.compile(r"^\s*(\w+=\S+ )?(make|\.venv/bin/python -m (pytest|pip)) ")
    return [normalized(line) for line in joined.splitlines() if wanted.match(line)]


def steps(path):
    jobs = yaml.safe_load(path.read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def test_the_workflow_runs_what_ci_runs():
    run = [words for path in WORKFLOWS for step in steps(path) if "run" in step for words in commands(step["run"])]
    wanted = commands((ROOT / ".ci" / "run").read_text())
    assert len(wanted) >= 8
    missing = [words for words in wanted if words not in run]
    assert not missing, missing


def test_jobs_have_a_limit_and_use_what_exists():
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in WORKFLOWS:
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            assert job["timeout-minutes"] <= 90
            for step in job["steps"]:
                assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "a/b@v1"))
                for words in commands(step.get("run", "")):
                    if "make" in words:
                        target = words[words.index("make") + 1]
                        assert target in targets or target.startswith(".venv/")


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_for_issues_are_complete(path):
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= set(form)
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids) and all(field["attributes"]["label"] for field in form["body"])


def test_hooks_run_files_that_exist():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in repository["hooks"]:
        assert hook["language"] == "system" and hook["entry"].startswith(".venv/bin/")
        assert all((ROOT / word).exists() for word in hook["entry"].split() if word.startswith("tests/"))


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert citation["version"] == newest == mtp_jax.__version__
    assert citation["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= set(citation)


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "launch/README.md", "experiments/README.md"]
)
def test_links_of_pages_outside_docs_lead_to_files(name):
    """Those in docs/ are checked when the site is built."""
    page = ROOT / name
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / pathlib.PurePath(target)).exists(), f"{name} links to {target}"
