"""Opening, checking and writing of a Hugging Face folder as a model.

The other files of a folder are kept with the model, in `hf/` of a workdir: config.json, the tokenizer, remote code, and
mtp_jax.json (`Origin`), which describes the imported files so that an export can reproduce them.
"""

import collections
import dataclasses
import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from mtp_jax import storage
from mtp_jax.config import MAX_DEPTH, Config, UserError, with_values
from mtp_jax.errors import warn_once
from mtp_jax.interop import config_json, folder_checks, layouts, weights
from mtp_jax.interop.families import FAMILIES, OUTSIDE_BLOCKS
from mtp_jax.interop.json_fields import REMEDY
from mtp_jax.interop.tensorfiles import DTYPES, TensorFolder, write_folder
from mtp_jax.interop.weights import BIAS_DTYPE, Tensor
from mtp_jax.mtp import kind_of
from mtp_jax.storage import read_json
from mtp_jax.typing import JsonObject, Tree

SIDE_FOLDER = "hf"  # in a workdir
ORIGIN_FILE = "mtp_jax.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
CHAT_FILES = ("chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json")  # beside a tokenizer
_LARGEST_SIDE_FILE = 128 * 2**20
EXPORT_DTYPES = {"float32": "F32", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Origin:
    """Properties of the files of an imported model.

    depth: number of MTP layers loaded. dtype: of most of the bytes (fp8 and mxfp4 count as BF16, to which they are
      converted). others: dtype by name of the tensors with another dtype, and of router biases. repeated: kinds of
      repeated embeddings and heads in the files.
    """

    model_type: str
    depth: int
    dtype: str
    others: dict[str, str]
    repeated: list[str]


@dataclass(frozen=True)
class HFModel:
    """Model in an opened folder; no file is kept open.

    values: of config.json. arrays: {"params": ..., "biases": ...} with lazy leaves in `config.model.param_dtype`.
    """

    path: epath.Path
    config: Config
    values: JsonObject
    origin: Origin
    arrays: Tree


def is_hf_folder(path: storage.AnyPath) -> bool:
    """True if config.json is Hugging Face's: it has a model_type, ours does not; raises UserError if unreadable."""
    file = storage.path(path) / "config.json"
    return storage.is_file(file) and "model_type" in read_json(file, REMEDY)


def open_model(
    path: storage.AnyPath,
    family: str | None = None,
    ignore: tuple[str, ...] = (),
    depth: int | None = None,
    param_dtype: Literal["float32", "bfloat16"] | None = None,
    is_checked: bool = False,
) -> HFModel:
    """Opens a folder as a model and checks it; reads only headers, and tensors that should repeat others.

    Args:
      path: a local folder, or a URL of one in an object store.
      family: required family; None accepts the one in config.json.
      ignore: unknown fields of config.json that are known to have no effect.
      depth: MTP depth to keep; 0 drops the MTP layers. None keeps the depth of config.json, or 0 (with a warning) if
        the files have no tensors of MTP layers, as in folders that transformers saved.
      param_dtype: "float32" or "bfloat16"; None: float32 if any weight has more precision than bfloat16, else bfloat16.
      is_checked: the folder was opened before; its tensors are not checked again.

    Raises:
      UserError: a folder that is not a model of a known family; states the file, tensor or field, and the remedy.
    """
    folder = storage.path(path)
    values = config_json.read_config(folder)
    where, model_type = str(folder / "config.json"), values["model_type"]
    layout = config_json.family_named(model_type, where)
    if family is not None and not _admits(family, model_type):
        raise UserError(f"--family={family}: {where} has model_type={model_type}; give that one")
    files = TensorFolder(folder)
    blocks = layout.layer.format(layer="{}")
    folder_checks.check_count(files, "num_hidden_layers", values.get("num_hidden_layers"), blocks, where)
    config = config_json.to_config(values, where, ignore, depth)
    if config.model.num_experts and not layout.stacked:
        folder_checks.check_count(files, layout.keys["num_experts"], config.model.num_experts, ".experts.{}.", where)
    mtp = tuple(layout.module_layer.format(layer=config.model.num_layers + k, depth=k) for k in range(MAX_DEPTH))
    if depth is None and kind_of(config).depth and not any(name.startswith(mtp) for name in files.infos):
        warn_once(f"{where} states {kind_of(config).depth} MTP layer(s) and the files have none: loaded at depth 0")
        depth, config = 0, config_json.to_config(values, where, ignore, 0)
    if layout.left_out and any(name.startswith(layout.left_out) for name in files.infos):
        warn_once(f"{folder}: tensors {layout.left_out[0]}* are left out: {layout.left_out_because}")
    listed = weights.tensors(config, model_type)
    if not is_checked:
        left_out = (*layout.left_out, *(mtp if depth == 0 else ()))
        folder_checks.check_tensors(files, listed, str(folder), mtp, left_out)
    origin = _origin(files, listed, config, model_type)
    dtypes = {weights.stored_dtype(files, t.name) for t in listed if t.path[0] == "params" and not t.repeats}
    dtype = param_dtype or ("bfloat16" if dtypes <= {"BF16", "F8_E4M3", weights.MXFP4} else "float32")
    model = dataclasses.replace(config.model, param_dtype=dtype, compute_dtype=dtype)
    if not layout.has_router_bias:
        model = with_values(model, {"router.bias_rate": 0.0})  # updated biases could not be exported
    config = dataclasses.replace(config, model=model)
    return HFModel(folder, config, values, origin, weights.lazy_arrays(files, config, listed))


def _origin(files: TensorFolder, listed: list[Tensor], config: Config, model_type: str) -> Origin:
    dtypes = {t.name: weights.stored_dtype(files, t.name) for t in listed if weights.is_stored(files, t.name)}
    dtypes = {name: "BF16" if dtype in ("F8_E4M3", weights.MXFP4) else dtype for name, dtype in dtypes.items()}
    num_bytes: collections.Counter[str] = collections.Counter()
    for name, dtype in dtypes.items():
        num_bytes[dtype] += sum(i.stop - i.start for i in map(files.infos.get, (name, name + weights.BLOCKS)) if i)
    main = num_bytes.most_common(1)[0][0]
    biases = {t.name for t in listed if t.path[0] == "biases"}
    others = {name: dtype for name, dtype in dtypes.items() if dtype != main or name in biases}
    repeated = {_kind(t, model_type) for t in listed if t.repeats and t.name in files.infos}
    return Origin(model_type, kind_of(config).depth, main, others, sorted(repeated))


def _kind(tensor: Tensor, model_type: str) -> str:
    """Kind of a repeated tensor, the same for all layers."""
    return next((s for s in FAMILIES[model_type].repeated if tensor.name.endswith("." + s)), tensor.name)


def write_model(
    target: storage.AnyPath,
    config: Config,
    arrays: Tree,
    sides: storage.AnyPath | None = None,
    family: str | None = None,
    dtype: str | None = None,
    tokenizer: storage.AnyPath | None = None,
    progress: Callable[[int], None] = lambda num_elements: None,
) -> tuple[str, str]:
    """Writes a model as a Hugging Face folder, which appears complete or not at all.

    Args:
      target: the folder to create.
      arrays: {"params": ..., "biases": ...} of arrays that are read by indexing.
      sides: `hf/` of the workdir, if the model was imported or given a tokenizer.
      family: the layout to write; None: the imported one, or else one that represents the model.
      dtype: a key of EXPORT_DTYPES; None: as imported, or the config's param_dtype. Router biases stay float32.
      tokenizer: tokenizer.json or SentencePiece .model that the model was trained with, if `sides` does not contain it;
        `CHAT_FILES` beside it come with it.
      progress: called with the number of elements of each tensor written.

    Returns:
      The model_type written, and the dtype of most weights.

    Raises:
      UserError: a model that no layout represents, a target that exists or cannot be written, too little disk space.
    """
    base, origin = _read_sides(sides)
    model_type, values, origin = _laid_out(config, base, origin, family)
    listed = [t for t in weights.tensors(config, model_type) if _is_written(t, origin)]
    _refuse_lost_biases(arrays["biases"], listed, model_type)
    dtypes = _export_dtypes(listed, config, origin, dtype)
    _set_dtype(values, dtypes, base if origin else None)
    specs = {t.name: (dtypes[t.name], t.shape) for t in listed}
    num_bytes = sum(math.prod(shape) * DTYPES[kind].itemsize for kind, shape in specs.values())
    with storage.fresh_folder(target, num_bytes) as partial:
        _copy_sides(sides, partial)
        if tokenizer is not None:
            name = "tokenizer.model" if str(tokenizer).endswith(".model") else "tokenizer.json"
            storage.remove(partial / name)
            storage.copy(tokenizer, partial / name)
            for name in CHAT_FILES:
                beside = storage.path(tokenizer).parent / name
                if storage.is_file(beside) and not storage.is_file(partial / name):
                    _check_side_file(beside)
                    storage.copy(beside, partial / name, _LARGEST_SIDE_FILE)

        def counted() -> Iterator[tuple[str, np.ndarray]]:
            written = weights.their_arrays(arrays, listed, {n: DTYPES[d] for n, d in dtypes.items()})
            repeats = {t.name for t in listed if t.repeats}
            for name, array in written:
                yield name, array
                progress(0 if name in repeats else array.size)

        write_folder(partial, specs, counted())
        storage.write_text(partial / "config.json", json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    return model_type, _main_dtype(dtypes)


def _laid_out(
    config: Config, base: JsonObject | None, origin: Origin | None, family: str | None
) -> tuple[str, JsonObject, Origin | None]:
    """Returns (model_type, config.json, origin if it is of that type, else None).

    An imported model keeps its layout as long as that represents it: a MiMo without its MTP layer is still a MiMo.
    """
    if origin is not None and (family is None or _admits(family, origin.model_type)):
        try:
            return origin.model_type, config_json.from_config(config, origin.model_type, base), origin
        except UserError as error:  # changed since the import, to a model that this layout cannot represent
            if family is not None:
                raise
            print(f"note: no longer {origin.model_type}, so the imported config.json is left out: {error}")
    model_type = layouts.layout_of(config)
    if family is not None and not _admits(family, model_type):
        model_type = family  # `from_config` states why it cannot represent the model
    return model_type, config_json.from_config(config, model_type), None


def _admits(family: str, model_type: str) -> bool:
    """True if `--family=family` accepts a folder of that model_type; raises UserError for an unknown family."""
    if family not in FAMILIES:
        raise UserError(f"--family={family}: is not known; there are {', '.join(FAMILIES)}")
    return model_type in (family, *FAMILIES[family].accepts)


def _is_written(tensor: Tensor, origin: Origin | None) -> bool:
    """True if the tensor is written: repeated tensors as they were imported. Without a record of that, those of MTP
    layers are written and a tied head is not.
    """
    if not tensor.repeats:
        return True
    is_of_mtp = tensor.name != OUTSIDE_BLOCKS["unembed"]
    if origin is None or (is_of_mtp and not origin.depth):
        return is_of_mtp
    return _kind(tensor, origin.model_type) in origin.repeated


def _refuse_lost_biases(biases: Tree, listed: list[Tensor], model_type: str) -> None:
    named = {t.path for t in listed}
    for path, leaf in flatten_dict({"biases": biases}).items():
        if path not in named and np.any(np.asarray(leaf[...])):
            raise UserError(
                f"{'.'.join(path)}: is not zero and the {model_type} layout has no place for it; "
                "train with model.router.bias_rate=0, or with model.router.score=sigmoid for deepseek_v3"
            )


def _export_dtypes(listed: list[Tensor], config: Config, origin: Origin | None, dtype: str | None) -> dict[str, str]:
    main, others = EXPORT_DTYPES[dtype or config.model.param_dtype], {}
    if dtype is None and origin is not None:
        main, others = origin.dtype, origin.others
    return {t.name: others.get(t.name, BIAS_DTYPE if t.path[0] == "biases" else main) for t in listed}


def _set_dtype(values: JsonObject, dtypes: dict[str, str], base: JsonObject | None) -> None:
    key = "dtype" if base is not None and "dtype" in base else "torch_dtype"
    if base is None or values.get(key) is not None:
        values[key] = _main_dtype(dtypes)


def _main_dtype(dtypes: dict[str, str]) -> str:
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
    return names[collections.Counter(dtypes.values()).most_common(1)[0][0]]


def _read_sides(folder: storage.AnyPath | None) -> tuple[JsonObject | None, Origin | None]:
    """Returns config.json and `Origin` of an imported model; (None, None) if the model was not imported."""
    if folder is None or not storage.is_file(storage.path(folder) / ORIGIN_FILE):
        return None, None
    sides = storage.path(folder)
    try:
        origin = Origin(**read_json(sides / ORIGIN_FILE, REMEDY))
    except TypeError as error:
        raise UserError(f"{sides / ORIGIN_FILE}: cannot be read ({error}); restore it, or remove the folder") from error
    return config_json.read_config(sides), origin


def save_sides(source: HFModel | storage.AnyPath, workdir: storage.AnyPath) -> None:
    """Writes `hf/` of a workdir: the other files of an opened folder and its `Origin`, or a copy of another workdir's
    `hf/`. An existing `hf/` is kept.

    Raises:
      UserError: a file cannot be copied, or is a link that leads out of its folder.
    """
    target = storage.path(workdir) / SIDE_FOLDER
    if storage.is_file(target / "config.json") or storage.names(target):
        return
    if not isinstance(source, HFModel):
        if storage.is_dir(source):
            with storage.fresh_folder(target) as partial:
                _copy_sides(source, partial, with_origin=True)
        return
    with storage.fresh_folder(target) as partial:
        _copy_sides(source.path, partial)
        text = json.dumps(dataclasses.asdict(source.origin), indent=1)
        storage.write_text(partial / ORIGIN_FILE, text + "\n")
        storage.copy(source.path / "config.json", partial / "config.json")


def _copy_sides(source: storage.AnyPath | None, target: epath.Path, with_origin: bool = False) -> None:
    """Copies tokenizer, generation settings, remote code and licence: the files directly in the folder except weights,
    config.json and files above 128 MiB.
    """
    if source is None:
        return
    folder = storage.path(source)
    for name in sorted(storage.names(folder), key=lambda name: name == storage.COMPLETE):  # config.json comes last
        path = folder / name
        is_ours = name in (ORIGIN_FILE, "config.json") and not with_origin
        if name.startswith(".") or name.endswith((*_WEIGHTS, ".index.json")) or is_ours or storage.is_dir(path):
            continue
        try:
            _check_side_file(path)
            storage.copy(path, target / name, _LARGEST_SIDE_FILE)
        except OSError as error:
            raise UserError(f"{path}: cannot be copied ({storage.reason(error)}); restore or remove it") from error


def _check_side_file(path: epath.Path) -> None:
    """Refuses what would bring files from elsewhere into a workdir and from there into an export.

    A link may lead to a file of the same folder, or of the same model in a download cache: there a snapshot has links
    to ../../blobs.

    Raises:
      UserError: a link out of the folder, or no regular file.
    """
    if not storage.is_local(path):
        return
    real, folder = os.path.realpath(path), os.path.realpath(path.parent)
    blobs = os.path.join(os.path.dirname(os.path.dirname(folder)), "blobs")
    is_in_cache = os.path.basename(os.path.dirname(folder)) == "snapshots" and os.path.dirname(real) == blobs
    if os.path.dirname(real) != folder and not is_in_cache:
        raise UserError(f"{path}: is a link to {real}, outside its folder; replace it with a copy, or remove it")
    if not stat.S_ISREG(os.stat(real).st_mode):
        raise UserError(f"{path}: is not a regular file; remove it")
