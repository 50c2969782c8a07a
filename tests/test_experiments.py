"""The experiments: their configs can be used, their data is as documented, and their results are there."""

import importlib.util
import itertools
import json
import os
import random
import re
import subprocess

import numpy as np
import pytest

from mtp_jax.config import load_config, validate
from mtp_jax.data import tokenizer as tokenizers
from tests.conftest import ROOT

FOLDERS = sorted(path.parent for path in (ROOT / "experiments").glob("*/run.sh"))


def module_of(name):
    path = ROOT / "experiments" / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def graphs():
    return module_of("star_graph/graphs.py")


@pytest.fixture(scope="module")
def formulas():
    return module_of("sat/formulas.py")


@pytest.fixture(scope="module")
def questions():
    return module_of("generative_against_likelihood/questions.py")


@pytest.fixture(scope="module")
def stories():
    return module_of("induction/stories.py")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_configs_can_be_used_and_results_are_there(folder):
    config = load_config(str(folder / "config.py"))
    validate(config, 1, 261)
    results = json.loads((folder / "results" / "table.json").read_text())
    if "sweep.sh" in (folder / "run.sh").read_text():
        assert all(run["state"] == "done" and run["evaluation"] for run in results["runs"])
        longest = max(run["last"]["step"] for run in results["runs"])
        assert longest == config.training.num_steps  # not of an older config
    assert results
    text = (folder / "README.md").read_text()
    assert "results/curves.png" in text and "Obtained" in text and "Expected" in text
    assert re.search(r"^\*\*Verdict\.\*\*", text, re.MULTILINE)


def sweep(**settings):
    command = ". experiments/sweep.sh; sweep --config=FILE"
    return subprocess.run(["bash", "-c", command], cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)


def test_runs_of_a_sweep_share_one_gpu():
    on_gpu = sweep(PYTHON="echo", SIZE="gpu", JOBS="3")
    lines = [f"-m mtp_jax.tools.sweep --share={i}/3 --config=FILE" for i in range(3)]
    assert sorted(on_gpu.stdout.splitlines()) == lines
    assert sweep(PYTHON="echo", JOBS="2").stdout == "-m mtp_jax.tools.sweep --jobs=2 --config=FILE\n"
    assert on_gpu.returncode == 0 and sweep(PYTHON="false", SIZE="gpu", JOBS="2").returncode == 1


def test_a_sweep_on_a_gpu_that_is_told_to_stop_tells_its_shares(tmp_path):
    share = tmp_path / "share"
    share.write_text("#!/bin/sh\ntrap 'echo stopped; exit 1' TERM\necho started\nwhile :; do sleep 0.1; done\n")
    share.chmod(0o755)
    command = ["bash", "-c", ". experiments/sweep.sh; sweep"]
    env = os.environ | {"PYTHON": str(share), "SIZE": "gpu", "JOBS": "2"}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert [process.stdout.readline() for _ in range(2)] == ["started\n"] * 2
        process.terminate()
        assert process.stdout.read() == "stopped\n" * 2
    assert process.returncode != 0


VERDICTS = ("confirmed", "same direction", "not confirmed", "not measurable")
DEVIATIONS = re.compile(r"(-?\d+\.\d+)\s?±\s?(\d+\.\d+)")


def findings():
    """Returns {folder: its rows of the table in docs/findings.md} and {heading: text of its section}."""
    head, *parts = re.split(r"^## ", (ROOT / "docs" / "findings.md").read_text(), flags=re.MULTILINE)
    rows = {}
    for row in re.findall(r"^\| \[.*$", head, re.MULTILINE):
        rows.setdefault(re.search(r"\.\./experiments/(\w+)/README\.md", row)[1], []).append(row)
    return rows, {heading: text for heading, _, text in (part.partition("\n") for part in parts)}


def test_findings_have_a_verdict_and_a_section_for_every_experiment():
    rows, sections = findings()
    with_results = {path.parent.parent.name for path in (ROOT / "experiments").glob("*/results/table.json")}
    assert with_results == set(rows) == set(sections) - {"Limits"}
    for folder in with_results:
        assert f"experiments/{folder}/run.sh" in sections[folder] and re.search(r"\d{4}-\d\d-\d\d", sections[folder])
        assert all(row.split("|")[5].strip().startswith(VERDICTS) for row in rows[folder])


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_means_in_findings_and_readme_are_those_of_the_results(folder):
    """Each mean with a deviation is in a table of the same experiment."""
    rows, sections = findings()
    table = [pair for path in folder.glob("results*/*.md") for pair in DEVIATIONS.findall(path.read_text())]
    for text in ["\n".join(rows[folder.name]), sections[folder.name], (folder / "README.md").read_text()]:
        found = set(DEVIATIONS.findall(text)) - set(table)
        assert not found, f"{folder.name}: {sorted(found)}"


def test_rates_of_distillation_are_those_of_the_results():
    _, sections = findings()
    folder = ROOT / "experiments" / "distillation"
    results = [
        r for domains in json.loads((folder / "results" / "table.json").read_text()).values() for r in domains.values()
    ]
    rates = {tuple(f"{100 * rate:.0f}" for rate in each["acceptance"]) for each in results}
    lengths = {f"{each['tokens_per_forward']:.2f}" for each in results}
    for text in (sections["distillation"], (folder / "README.md").read_text().partition("One seed")[0]):
        found = re.findall(r"(\d\d) / (\d\d) / (\d\d) %", text)
        assert len(found) >= 4 and not set(found) - rates
        assert len(set(re.findall(r"\b\d\.\d\d\b", text)) & lengths) > 10


def test_agreement_over_training_is_the_mean_of_windows(tmp_path):
    """The last window of each seed is the mean of the batches logged within it; seeds are not mixed."""
    agreement = module_of("acceptance_over_training/agreement.py")
    for seed in (0, 1):
        folder = tmp_path / f"seed={seed}"
        folder.mkdir()
        settings = {"kind": "sequential", "depth": 1}
        config = {"mtp": settings, "training": {"num_steps": 40}, "seed": seed, "model": {"vocab_size": 264}}
        (folder / "config.json").write_text(json.dumps(config))
        rows = [{"step": i, "loss_main": 2.0, "agreement_mtp_1": i / 40 + seed} for i in range(1, 41)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = agreement.over_training(agreement.variants_of(agreement.load_runs([], [str(tmp_path)])))
    points = curves["sequential"]["agreement_mtp_1"]
    assert [point["step"] for point in points] == list(range(2, 41, 2))
    assert points[-1]["values"] == pytest.approx([39.5 / 40, 39.5 / 40 + 1])
    assert "| sequential modules, agreement, depth 1 |" in agreement.table(curves)
    assert "1.488 ± 0.707" in agreement.table(curves)


def test_run_scripts_are_shell():
    for folder in FOLDERS:
        subprocess.run(["bash", "-n", str(folder / "run.sh")], check=True)
        assert os.access(folder / "run.sh", os.X_OK)


def test_a_star_graph_has_one_answer(graphs):
    """The path's edges are all there, it begins and ends as asked, and the other arm would be another answer."""
    for question, path, _ in itertools.islice(graphs.graphs(), 300):
        edges, ends = question.removesuffix("=").split("/")
        edges = edges.split("|")
        assert len(edges) == len(set(edges)) == 4 and all(a + b in edges for a, b in itertools.pairwise(path))
        assert path[0] + path[-1] == ends and len(set("".join(edges))) == 5
        assert sum(edge[0] == path[0] for edge in edges) == 2  # two edges leave the centre


def test_questions_about_code_are_answered_by_the_text():
    questions = module_of("code_search/questions.py")
    text = "".join(f"def function_{i:03}(argument):\n    return argument + {i}  + offset\n\n" for i in range(60))
    lines = list(questions.next_lines(text, random.Random(0)))
    names = list(questions.identifiers(text, random.Random(0)))
    assert len(lines) > 30 and len(names) > 60
    for row in lines + names:
        assert len(row["question"]) == questions.CONTEXT and row["question"] + row["answer"] in text
    assert all(row["question"].endswith("\n   ") and row["answer"].startswith(" return") for row in lines)
    assert {row["answer"].strip() for row in names} == {"argument"}  # the names of functions occur once
    assert questions.score_line(lines[0], [lines[0]["answer"].strip()]) == {"exact": 1.0}
    assert questions.score_line(lines[0], [lines[0]["answer"] + "1"]) == {"exact": 0.0}
    assert questions.score_identifier(names[0], [" argument):"]) == {"exact": 1.0}
    assert questions.score_identifier(names[0], ["arguments"]) == {"exact": 0.0}


@pytest.mark.parametrize(("arms", "length"), [(2, 5), (5, 5)])
def test_a_large_star_graph_has_one_answer_and_fills_a_row(arms, length, monkeypatch, tmp_path):
    monkeypatch.setenv("STAR_GRAPH", f"{arms},{length},100")
    large = module_of("star_graph/graphs.py")
    large.write(tmp_path, 50)
    tokenizer = tokenizers.load(str(tmp_path / "tokenizer.json"))
    for line in (tmp_path / "train.jsonl").read_text().splitlines():
        each = json.loads(line)
        edges, ends = each["prompt"].removesuffix(" =").split(" / ")
        edges, path = edges.split(" | "), each["completion"].split()
        assert len(set(edges)) == arms * (length - 1) and len(path) == length
        assert all(f"{a} {b}" in edges for a, b in itertools.pairwise(path)) and ends == f"{path[0]} {path[-1]}"
        assert sum(edge.split()[0] == path[0] for edge in edges) == arms
        ids = tokenizer.encode(each["prompt"] + each["completion"])
        assert 0 not in ids and tokenizer.decode(ids[-length:]).split() == path  # 0: unknown
        assert len(ids) + 2 == 3 * arms * (length - 1) + 3 + length + 2  # as run.sh has it, with bos and eos


def test_no_test_question_is_in_the_training_data(graphs, tmp_path):
    pytest.importorskip("datasets")
    graphs.write(tmp_path, 3000)
    trained = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    held_out = graphs.test_set(version=1)["test"]["question"][:]
    assert len(trained) == 3000 and len(set(held_out)) == len(held_out) == 500
    assert not {each["prompt"] for each in trained} & set(held_out)
    assert {len(each["prompt"] + each["completion"]) for each in trained} == {
        18
    }  # with bos and eos a row of the config


def holds(clause, values):
    """Returns whether a clause such as aBd is true where variable v has values[v]: not a, or b, or not d."""
    return any(values[letter.lower()] == letter.isupper() for letter in clause)


def test_an_answer_satisfies_its_formula(formulas):
    """All assignments are tried; those that satisfy the formula are the ones that the verifier accepts."""
    seen = set()
    for question, answer, _ in itertools.islice(formulas.formulas(), 40):
        clauses = question.removesuffix("=").split()
        assert len(clauses) == len(set(clauses)) == formulas.NUM_CLAUSES
        assert all(len(set(clause.lower())) == 3 for clause in clauses)
        variables = formulas.VARIABLES[: formulas.NUM_VARIABLES]
        solutions = []
        for values in itertools.product((False, True), repeat=len(variables)):
            assigned = dict(zip(variables, values, strict=True))
            text = " ".join(v.upper() if assigned[v] else v for v in variables)
            is_solution = all(holds(clause, assigned) for clause in clauses)
            assert formulas.is_satisfied(question, text) == is_solution
            solutions += [text] if is_solution else []
        assert answer in solutions
        seen.add(solutions.index(answer))
    assert len(seen) > 2  # not always the first one


def test_the_verifier_requires_a_whole_assignment(formulas):
    question = "abC aBd bCD ="
    assert formulas.is_satisfied(question, "a B c D") and formulas.is_satisfied(question, " a b C D ")
    assert not formulas.is_satisfied(question, "A b c D")  # abC holds, aBd does not
    for answer in ("", "a B C", "a B C D d", "B a C D", "a A B C D", "aBCD", "a B C ="):
        assert not formulas.is_satisfied(question, answer), answer


def test_no_test_formula_is_in_the_training_data(formulas, tmp_path):
    pytest.importorskip("datasets")
    formulas.write(tmp_path, 1000, formulas.NUM_VARIABLES, formulas.NUM_CLAUSES)
    trained = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    held_out = formulas.test_set(version=1)["test"]["question"][:]
    assert len(trained) == 1000 and len(set(held_out)) == 500

    def clauses(text):
        return frozenset(text.split())

    assert not {clauses(each["prompt"]) for each in trained} & {clauses(text) for text in held_out}
    # Small formulas recur, with their clauses in another order: 4960 sets of three clauses of four variables.
    small = [(clauses(text), is_test) for text, _, is_test in itertools.islice(formulas.formulas(4, 3), 3000)]
    tested, others = ({key for key, is_test in small if is_test == wanted} for wanted in (True, False))
    assert len(tested) == 500 and len(others) > 1000 and not tested & others
    tokenizer = tokenizers.load(str(tmp_path / "tokenizer.json"))
    config = load_config(str(ROOT / "experiments/sat/config.py"))
    for each in trained[:50]:
        ids = tokenizer.encode(each["prompt"] + each["completion"])
        assert 2 + len(ids) == config.data.sequence_length + 1  # with bos and eos a row
        assert tokenizer.decode(ids).split() == (each["prompt"] + each["completion"]).split()


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_a_question_has_one_right_option(size, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("SIZE", size)
    questions = module_of("generative_against_likelihood/questions.py")
    assert questions.SIZE == questions.SIZES[size]
    for family in questions.FAMILIES:
        rows = questions.test_set(family=family, version=1)["test"]
        assert len(rows) == len(set(rows["question"][:])) == questions.NUM_TEST
        for row in rows:
            assert len(set(row["options"])) == 4 and row["options"][row["place"]] == row["answer"]
            is_right = {option: answers(questions, family, row["question"], option) for option in row["options"]}
            assert [option for option, right in is_right.items() if right] == [row["answer"]], row
            # A wrong option that begins the answer would be at least as likely as the answer.
            assert not any(row["answer"].startswith(wrong) for wrong in row["options"] if wrong != row["answer"])
        assert len(set(rows["place"][:])) == 4


def answers(questions, family, question, option):
    """Returns whether an option answers the question, found from the question's text alone (or the knowledge base)."""
    text, _, key = question.partition(" =")
    name, _, asked = text.partition(" ")
    assert name == family
    if family == "copy":
        return option == asked[::-1]
    if family == "sum":
        return int(option.replace(" ", "")) == sum(int(number) for number in asked.replace(" ", "").split("+"))
    if family == "lookup":
        words = asked.split()
        triples = [words[i : i + 3] for i in range(0, len(words), 3)]
        assert len(set(words)) == len(words)
        return [*key.split(), *option.split()] in triples
    person, _, attribute = asked.rpartition(" ")
    return questions.knowledge_base()[person][attribute] == option


def test_no_test_question_is_asked_in_training_and_every_fact_is_stated(questions, tmp_path):
    pytest.importorskip("datasets")
    questions.write(tmp_path, 3000, 1200)  # each fact once
    trained = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    stated = [json.loads(line)["text"] for line in (tmp_path / "facts.jsonl").read_text().splitlines()]
    tests = {family: questions.test_set(family=family)["test"] for family in questions.FAMILIES}
    held_out = {text for rows in tests.values() for text in rows["question"]}
    assert len(trained) == 3000 and not {each["prompt"] for each in trained} & held_out
    for each in trained:
        family = each["prompt"].split()[0]
        assert answers(questions, family, each["prompt"], each["completion"].removeprefix(" "))
    tokenizer = tokenizers.load(str(tmp_path / "tokenizer.json"))
    config = load_config(str(ROOT / "experiments/generative_against_likelihood/config.py"))
    for text in [each["prompt"] + each["completion"] for each in trained[:60]] + stated[:60]:
        ids = tokenizer.encode(text)
        assert 0 not in ids and tokenizer.decode(ids).split() == text.split()  # 0: unknown
        assert 2 + len(ids) <= config.data.sequence_length + 1  # with bos and eos it fits a row
    for row in tests["fact"]:
        name, attribute = row["question"].removeprefix("fact ").removesuffix(" =").rsplit(" ", 1)
        assert not any(each["prompt"].startswith(f"fact {name} ") for each in trained)  # about none of their attributes
        forms = (f"{name} {attribute} : ", f"{attribute} of {name} : ", f"{name} has {attribute} ")
        assert any(f"{form}{row['answer']} ." in stated for form in forms)


def value_of(expressions, question):
    """Returns the text of a question's value; numpy's polynomials over the integers, reduced after each operation."""
    operations = {"+": lambda a, b: a + b, "*": lambda a, b: a * b, "@": lambda a, b: a(b)}
    stack, coefficients = [], []
    for symbol in question.removesuffix("="):
        if symbol in "-+*@":
            b = stack.pop()
            value = -b if symbol == "-" else operations[symbol](stack.pop(), b)
            low = [int(round(c)) % expressions.PRIME for c in value.coeffs[::-1][: expressions.DEGREE]]
            stack.append(np.poly1d(low[::-1]))
        else:
            power, coefficient = divmod(expressions.SYMBOLS.index(symbol), expressions.PRIME)
            assert power == len(coefficients)
            coefficients.append(coefficient)
        if len(coefficients) == expressions.DEGREE:
            stack.append(np.poly1d(coefficients[::-1]))
            coefficients = []
    (value,) = stack
    padded = [*(int(c) for c in value.coeffs[::-1]), *[0] * expressions.DEGREE][: expressions.DEGREE]
    return "".join(expressions.SYMBOLS[k * expressions.PRIME + c] for k, c in enumerate(padded))


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_the_value_of_an_expression_is_that_of_numpy(size, monkeypatch):
    monkeypatch.setenv("SIZE", size)
    expressions = module_of("polynomials/expressions.py")
    assert (expressions.PRIME, expressions.DEGREE) == expressions.SIZES[size]
    draw, answers = random.Random(0), set()
    for m in (0, 1, 3, 8) * 60:
        question, value = expressions.expression(draw, m)
        assert sum(symbol in "-+*@" for symbol in question) == m
        answer = expressions.text_of(value)
        assert value_of(expressions, question) == answer
        answers.add(answer)
    assert len(answers) >= 4


def test_no_test_expression_of_two_or_more_operations_is_in_the_training_data(tmp_path):
    pytest.importorskip("datasets")
    expressions = module_of("polynomials/expressions.py")
    expressions.write(tmp_path, 5000)
    trained = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    rows = [*expressions.test_set(first=1, last=5)["test"], *expressions.test_set(first=6, last=8)["test"]]
    for m in range(1, expressions.MAX_TESTED + 1):
        questions = [row["question"] for row in rows if row["num_operations"] == m]
        assert len(questions) == expressions.NUM_TEST
        assert m == 1 or len(set(questions)) == len(questions)
        assert m == 1 or not set(questions) & {each["prompt"] for each in trained}
    config = load_config(str(ROOT / "experiments/polynomials/config.py"))
    longest = max(len(each["prompt"] + each["completion"]) for each in trained)
    assert 2 + longest <= config.data.sequence_length + 1  # with bos and eos it fits a row
    row = rows[-1]
    assert expressions.score(row, [row["answer"] + "+"]) == {"exact": 1.0, "exact_8": 1.0}
    assert expressions.score(row, [row["answer"][:-1]]) == {"exact": 0.0, "exact_8": 0.0}


def test_the_second_token_of_a_name_can_only_be_copied(stories, tmp_path):
    """The question has the whole name before, ends with its first token, and no training story has that name."""
    pytest.importorskip("datasets")
    stories.write(tmp_path, 2000)
    trained = [json.loads(line)["text"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(trained) == 2000 and len(stories.FIRST) == len(stories.SECOND) == 64
    assert not set(stories.FIRST) & set(stories.SECOND)
    followed = {pair for text in trained for pair in itertools.pairwise(text.split()) if pair[0] in stories.FIRST}
    tokenizer = tokenizers.load(str(tmp_path / "tokenizer.json"))
    rows = stories.test_set(version=1)["test"]
    assert len(rows) == stories.NUM_TEST
    for row in rows:
        *before, start = row["question"].split()
        assert (start, row["answer"]) in itertools.pairwise(before)
        assert {word for word, following in itertools.pairwise(before) if following == row["answer"]} == {start}
        assert (start, row["answer"]) not in followed
        assert stories.score(row, [f" {row['answer']} "]) == {"second_token": 1.0}
        assert stories.score(row, [""]) == {"second_token": 0.0}
        ids = tokenizer.encode(f"{row['question']} {row['answer']}")
        assert 0 not in ids and len(ids) == len(before) + 2  # one token per word, none unknown
    assert not any(
        word not in tokenizer.decode(tokenizer.encode(word)) for text in trained[:20] for word in text.split()
    )
