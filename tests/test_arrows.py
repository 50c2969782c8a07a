"""The layering of docs/design.md: modules import from lower layers only. Checked by walking the source with ast."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# From low to high; a unit imports from strictly lower layers, and freely inside itself.
LAYERS = [
    ["mtp_jax.errors", "mtp_jax.typing", "mtp_jax.signals", "mtp_jax.streams"],
    ["mtp_jax.storage"],
    ["mtp_jax.cli", "mtp_jax.lease"],
    ["mtp_jax.config", "mtp_jax.targets", "mtp_jax.distributed"],
    ["mtp_jax.data", "mtp_jax.sharding"],
    ["mtp_jax.kernels"],
    ["mtp_jax.layers"],
    ["mtp_jax.decoder", "mtp_jax.losses"],
    ["mtp_jax.mtp"],
    ["mtp_jax.model"],
    ["mtp_jax.decoding", "mtp_jax.interop"],
    ["mtp_jax.training"],
    ["mtp_jax.language_model"],
    ["mtp_jax.evaluation", "mtp_jax"],  # mtp_jax itself: what its __init__ offers
    ["mtp_jax.tools"],  # command lines over all of it
    ["configs"],
    ["train", "eval"],
]


def layer_numbers(layers):
    """Returns unit -> number of its layer, 0 for the lowest; raises ValueError for a unit in two layers."""
    units = [unit for layer in layers for unit in layer]
    twice = sorted({unit for unit in units if units.count(unit) > 1})
    if twice:
        raise ValueError(f"LAYERS lists {', '.join(twice)} twice; keep the lowest layer that its imports allow")
    return {unit: number for number, layer in enumerate(layers) for unit in layer}


LAYER_OF = layer_numbers(LAYERS)
FIRST_WITH_DATA = LAYER_OF["mtp_jax.training"]  # below it, model code does not import data
NEVER_IMPORTED = {"mtp_jax.tools"}
SCRIPT_OF = {"train": "mtp_jax.tools.train", "eval": "mtp_jax.tools.eval"}  # scripts that run one command line


def violations(root):
    """One line for each import under `root` that points up or sideways."""
    out = []
    for path in _source_files(root):
        module = _module_name(path, root)
        unit = unit_of(module)
        if unit is None:
            out.append(f"{path.relative_to(root)}: is in no layer of tests/test_arrows.py; add it to one")
            continue
        for line_number, imported in _imports(path, module, root):
            reason = "" if SCRIPT_OF.get(unit) == imported else _refusal(unit, unit_of(imported))
            if reason:
                out.append(f"{path.relative_to(root)}:{line_number}: {unit} imports {imported}: {reason}")
    return out


def unit_of(module):
    """The unit of LAYERS that holds a module; None for an mtp_jax module in no layer."""
    parts = module.split(".")
    if parts[0] != "mtp_jax":
        return parts[0]
    name = ".".join(parts[:2])
    return name if name in LAYER_OF else None


def _refusal(importer, imported):
    if imported == importer:
        return ""
    if imported is None:
        return "it is in no layer of tests/test_arrows.py; add it to one"
    if LAYER_OF[imported] >= LAYER_OF[importer]:
        return "imports point down only"
    if imported in NEVER_IMPORTED:
        return "no module imports the command lines"
    below_training = LAYER_OF["mtp_jax.layers"] <= LAYER_OF[importer] < FIRST_WITH_DATA
    if imported == "mtp_jax.data" and below_training:
        return "model code imports data from training on only"
    return ""


def _source_files(root):
    files = [*(root / "mtp_jax").rglob("*.py"), *(root / "configs").rglob("*.py")]
    files += [root / name for name in ("train.py", "eval.py") if (root / name).exists()]
    return sorted(files)


def _module_name(path, root):
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path, module, root):
    """(line, imported module of ours) of every import statement, those inside functions too."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]) if base else ".".join(parents)
            # `from mtp_jax import targets` imports mtp_jax.targets; `from mtp_jax import load` what __init__ offers
            names = {f"{base}.{a.name}" if _is_module(f"{base}.{a.name}", root) else base for a in node.names}
        else:
            continue
        yield from (
            (node.lineno, name)
            for name in sorted(names)
            if name.split(".")[0] in {"mtp_jax", "configs", "train", "eval"}
        )


def _is_module(name, root):
    path = root.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def test_a_unit_in_two_layers_is_refused():
    with pytest.raises(ValueError, match="LAYERS lists b twice"):
        layer_numbers([["a", "b"], ["c", "b"]])


def test_imports_point_down_only():
    found = violations(ROOT)
    assert not found, "\n".join(found)


def _source_tree(root, files):
    for name in ("config", "targets", "sharding", "decoder", "model", "language_model"):
        files.setdefault(f"mtp_jax/{name}.py", "")
    units = ("data", "kernels", "layers", "losses", "mtp", "decoding", "interop", "training", "evaluation", "tools")
    for name in units:
        files.setdefault(f"mtp_jax/{name}/__init__.py", "")
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mtp_jax/model.py", "from mtp_jax import config, targets\nfrom mtp_jax.decoder import Decoder\nimport jax"),
        ("mtp_jax/layers/block.py", "from . import norm\nfrom .mla import Attention\nfrom ..config import ModelConfig"),
        ("mtp_jax/training/loop.py", "from mtp_jax.data import pipeline\nfrom mtp_jax.model import Model"),
        ("mtp_jax/__init__.py", "def load(path):\n    from mtp_jax.language_model import load\n    return load(path)"),
        ("train.py", "from mtp_jax.training.loop import train\nimport eval_like_name"),
        ("train.py", "from mtp_jax.tools.train import command, main"),
        ("configs/tiny.py", "from configs.quickstart import get_config\nfrom mtp_jax.config import default_config"),
    ],
)
def test_imports_that_point_down_pass(tmp_path, name, text):
    assert violations(_source_tree(tmp_path, {name: text})) == []


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("mtp_jax/config.py", "from mtp_jax import targets", "point down only"),
        ("mtp_jax/data/pipeline.py", "from mtp_jax.model import Model", "point down only"),
        ("mtp_jax/data/pipeline.py", "import mtp_jax.sharding", "point down only"),
        ("mtp_jax/layers/block.py", "from .. import model", "point down only"),
        ("mtp_jax/layers/block.py", "def late():\n    from ..training import step", "point down only"),
        ("mtp_jax/decoder.py", "from mtp_jax.mtp import sequential", "point down only"),
        ("mtp_jax/mtp/sequential.py", "from mtp_jax.model import MTPModel", "point down only"),
        ("mtp_jax/model.py", "from mtp_jax import load", "point down only"),
        ("mtp_jax/layers/mla.py", "from mtp_jax.data.packing import pack", "from training on"),
        ("mtp_jax/losses/driver.py", "from mtp_jax import data", "from training on"),
        ("mtp_jax/interop/weights.py", "import mtp_jax.data.tokenizer", "from training on"),
        ("train.py", "from mtp_jax.tools import report", "no module imports"),
        ("eval.py", "from mtp_jax.tools.train import main", "no module imports"),
        ("mtp_jax/helpers.py", "", "is in no layer"),
        ("mtp_jax/model.py", "import mtp_jax.helpers", "is in no layer"),
        ("configs/tiny.py", "import train", "point down only"),
    ],
)
def test_an_import_that_points_up_is_found(tmp_path, name, text, reason):
    found = violations(_source_tree(tmp_path, {name: text}))
    assert len(found) == 1 and reason in found[0], found


# ---------------------------------------------------------------------------------------------------------------
# The names of the kinds of multi-token prediction occur in mtp_jax/mtp/ alone.

KIND_NAMES = {"parallel", "sequential", "nextlat"}  # "top" is a word of its own


def kinds_named(source):
    """Lines of a module that name a kind in a string, or compare `.kind` of an `mtp` with one."""
    tree, found = ast.parse(source), []
    docstrings = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and _has_docstring(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in KIND_NAMES and node not in docstrings:
            found.append(f"{node.lineno}: names {node.value!r}")
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(isinstance(s, ast.Attribute) and s.attr == "kind" and _is_mtp(s.value) for s in sides):
                found.append(f"{node.lineno}: compares mtp.kind")
    return found


def _has_docstring(node):
    first = node.body[0] if node.body else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)


def _is_mtp(node):
    return (isinstance(node, ast.Attribute) and node.attr == "mtp") or (isinstance(node, ast.Name) and node.id == "mtp")


def test_names_of_kinds_occur_in_their_package_only():
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in _source_files(ROOT)
        if path.is_relative_to(ROOT / "mtp_jax") and not path.is_relative_to(ROOT / "mtp_jax" / "mtp")
        for line in kinds_named(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    ["if config.mtp.kind == NONE:\n    pass", "x = mtp.kind in KINDS", "run({'parallel': 1})", "k = 'nextlat'"],
)
def test_the_name_of_a_kind_is_found(source):
    assert kinds_named(source)
