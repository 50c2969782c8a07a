"""Checks of the tensors of a folder against those of the model that its config.json describes."""

import re

import numpy as np

from mtp_jax.errors import UserError, and_more
from mtp_jax.interop import fp8, mxfp4
from mtp_jax.interop.families import OUTSIDE_BLOCKS
from mtp_jax.interop.json_fields import imported_with
from mtp_jax.interop.tensorfiles import TensorFolder
from mtp_jax.interop.weights import BLOCKS, SCALE, SCALES, Tensor, is_stored, read

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3")  # dtypes of a stored weight
DERIVED_SUFFIXES = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".masked_bias",
)  # buffers of old files, which follow from config.json
_MAIN_ALONE = f"for the main model alone {imported_with('--depth=0', 'depth=0')}"


def check_count(folder: TensorFolder, key: str, value: object, name: str, where: str) -> None:
    """Refuses a number in config.json that exceeds the one in the files, before anything is listed or built.

    Args:
      name: part of the tensor names with {} in place of the number, which counts from 0.

    Raises:
      UserError: states the number in config.json and the one in the files.
    """
    pattern = re.compile(re.escape(name).replace(r"\{\}", r"(\d{1,9})"))
    found = 1 + max((int(match[1]) for match in map(pattern.search, folder.infos) if match), default=-1)
    short = name.removeprefix("model.")
    if not found and short != name and any(each.startswith(short.partition("{}")[0]) for each in folder.infos):
        raise UserError(
            f"{where}: its tensors are named {short.format(0)}* and not {name.format(0)}*, as those of a model "
            "without its head; save the whole model (of the class ...ForCausalLM) and give that folder"
        )
    if isinstance(value, int) and value > found:
        raise UserError(
            f"{where}: field {key!r}={value} is more than the {found} in the files; one is of another model"
        )


def check_tensors(
    folder: TensorFolder, listed: list[Tensor], where: str, mtp_prefixes: tuple[str, ...], left_out: tuple[str, ...]
) -> None:
    """Refuses a folder whose tensors are not those of the model.

    Args:
      listed: the required tensors; repeated ones may be missing.
      mtp_prefixes: of the tensors of MTP layers. left_out: of the tensors that are not checked.

    Raises:
      UserError: a missing or additional tensor, one of another shape or of an unsupported dtype, or a repeated tensor
        that differs from its original.
    """
    missing = [t for t in listed if not is_stored(folder, t.name) and not t.repeats]
    if missing:
        name = missing[0].name
        hint = f"; {_MAIN_ALONE}" if "mtp" in missing[0].path else ""
        hint = "; is tie_word_embeddings missing there?" if name == OUTSIDE_BLOCKS["unembed"] else hint
        raise UserError(f"{where}: has no tensor {name}{and_more(missing)}, which its config.json implies{hint}")
    quantized = _check_mxfp4(folder, listed, where)
    for t in listed:
        if t.name in folder.infos and folder.infos[t.name].shape != t.shape:
            shape = folder.infos[t.name].shape
            raise UserError(
                f"{where}: tensor {t.name} is {shape}, its config.json implies {t.shape}; one is of another model"
            )
    kinds = [
        (n, i.dtype)
        for n, i in folder.infos.items()
        if i.dtype not in FLOATS and n not in quantized and not n.endswith(DERIVED_SUFFIXES)
    ]
    if kinds:
        name, dtype = kinds[0]
        raise UserError(f"{where}: tensor {name} is {dtype}{and_more(kinds)}; give a folder in bfloat16 or float32")
    known = {t.name for t in listed} | quantized
    for t in listed:
        if t.name in folder.infos and folder.infos[t.name].dtype == "F8_E4M3":
            wanted, scale = fp8.scale_shape(t.shape), folder.infos.get(t.name + SCALE)
            if scale is None or scale.shape != wanted:
                has = "is missing" if scale is None else f"is {scale.shape}"
                raise UserError(f"{where}: tensor {t.name + SCALE} {has}; fp8 {t.name} {t.shape} needs {wanted}")
            known.add(t.name + SCALE)
    unknown = (name for name in folder.infos if name not in known and not name.endswith(DERIVED_SUFFIXES))
    extra = [name for name in unknown if not name.startswith(left_out)]
    if extra:
        hint = ""
        if extra[0].startswith(mtp_prefixes):
            hint = f"; of MTP layers: set num_nextn_predict_layers there, or {_MAIN_ALONE}"
        raise UserError(f"{where}: has tensor {extra[0]}{and_more(extra)}, which its config.json does not imply{hint}")
    _check_repeated(folder, listed, where)


def _check_mxfp4(folder: TensorFolder, listed: list[Tensor], where: str) -> set[str]:
    """Returns the names of the tensors that store listed ones in mxfp4; raises UserError if one does not match."""
    found: set[str] = set()
    for t in listed:
        if t.name in folder.infos or t.name + BLOCKS not in folder.infos:
            continue
        experts, ins, out = t.shape if len(t.shape) == 3 else (0, 0, 0)
        groups = (experts, out, ins // mxfp4.BLOCK)
        for name, shape in ((t.name + BLOCKS, (*groups, mxfp4.BLOCK // 2)), (t.name + SCALES, groups)):
            info = folder.infos.get(name)
            if not t.stacked or ins % mxfp4.BLOCK or info is None or (info.dtype, info.shape) != ("U8", shape):
                has = f"is {info.dtype} {info.shape}" if info else "is missing"
                raise UserError(f"{where}: tensor {name} {has}; mxfp4 {t.name} {t.shape} needs U8 {shape}")
            found.add(name)
    return found


_ROWS = 4096  # rows compared at a time


def _check_repeated(folder: TensorFolder, listed: list[Tensor], where: str) -> None:
    """Refuses a repeated tensor that differs from its original: our model has one embedding and one head, so the
    difference would be lost.
    """
    own = {t.path: t for t in listed if not t.repeats}
    for t in listed:
        if not t.repeats or t.name not in folder.infos:
            continue
        original = own[t.path]
        for first in range(0, t.shape[0], _ROWS):
            rows = slice(first, first + _ROWS)
            if not np.array_equal(read(folder, t, rows), read(folder, original, rows)):
                raise UserError(
                    f"{where}: tensor {t.name} differs from {original.name}, which it should repeat; mtp_jax has one "
                    "embedding and one head for all depths"
                )
