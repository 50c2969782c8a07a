"""Safetensors files: headers are read first, tensors on request; tensors are written as they arrive.

A file is the header's length (u64, little-endian), a JSON header {name: {dtype, shape, data_offsets: [begin, end]},
"__metadata__": {...}} and the tensors' bytes without gaps, at offsets counted from the end of the header. The
safetensors library checks a file. Its numpy functions do not read fp8, map the file so that resident memory grows with
it, and hold a whole shard in memory to write it, so bytes are read and written here.
"""

import contextlib
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from mtp_jax import storage
from mtp_jax.config import UserError
from mtp_jax.interop.json_fields import REMEDY
from mtp_jax.storage import read_json
from mtp_jax.typing import JsonObject

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_METADATA = {"format": "pt"}  # transformers refuses files without it
_LONGEST_HEADER = 100_000_000  # the library refuses longer ones
_WRITE_BYTES = 1 << 26  # copied at a time if an array is not contiguous


class TensorInfo(NamedTuple):
    """Location of a tensor: bytes start..stop of the file `path`, counted from the beginning of the file."""

    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    path: epath.Path
    start: int
    stop: int


class TensorFolder:
    """The tensors of a Hugging Face folder, read on request; no file is kept open.

    They are in model.safetensors, or in the shards that model.safetensors.index.json names, or, if neither exists, in
    all *.safetensors files of the folder. Several threads may read at the same time. In an object store only the bytes
    of what is read are fetched, so neither a disk nor memory for a whole file is needed.

    Attributes:
      infos: name -> TensorInfo, in order of file and offset.
      num_bytes: of all tensors together.

    Raises:
      UserError: no such folder or no files in it; an index or header that is corrupt or contradicts the files.
    """

    def __init__(self, folder: storage.AnyPath):
        self.folder = storage.path(folder)
        self.infos: dict[str, TensorInfo] = {}
        self._stamps: dict[epath.Path, list[int | str]] = {}  # versions of the files
        paths, shard_of = _find_files(self.folder)
        for path in paths:
            self._stamps[path], infos = _read_header(path)
            for name in sorted(infos.keys() & self.infos.keys()):
                both = f"{self.infos[name].path.name} and in {path.name}"
                raise UserError(f"{self.folder}: tensor {name!r} is in {both}; remove one of the files")
            self.infos |= infos
        if shard_of is not None:
            self._check_index(shard_of)
        self.num_bytes = sum(info.stop - info.start for info in self.infos.values())

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Returns a tensor, or rows of its first dim. The file is not mapped, so only the result is in memory.

        Args:
          name: a key of `infos`.
          rows: a slice with step 1; as in Python, rows beyond the tensor are left out. A scalar has no rows.

        Returns:
          A new array of the tensor's dtype (one of ml_dtypes for bf16 and fp8).

        Raises:
          KeyError: no such tensor.
          ValueError: rows with a step, or rows of a scalar.
          UserError: the file cannot be read, or has changed since its header was read.
        """
        info = self.infos[name]
        dtype, shape, start = DTYPES[info.dtype], info.shape, info.start
        if rows != slice(None):
            if not shape or rows.step not in (None, 1):
                raise ValueError(f"tensor {name!r} of shape {list(shape)} has no {rows}; give rows with step 1")
            begin, end, _ = rows.indices(shape[0])
            start += begin * math.prod(shape[1:]) * dtype.itemsize
            shape = (max(0, end - begin), *shape[1:])
        num_bytes = math.prod(shape) * dtype.itemsize
        try:
            data = _read(info.path, start, num_bytes)
            stamp = storage.version(info.path)  # after reading, to detect changes during the read
        except OSError as error:
            raise UserError(
                f"{info.path}: tensor {name!r} cannot be read ({storage.reason(error)}); check the file"
            ) from error
        if stamp != self._stamps[info.path] or data.size < num_bytes:
            sizes = f"{self._stamps[info.path][0]} bytes then, {stamp[0]} now"
            raise UserError(
                f"{info.path}: changed since its header was read ({sizes}), before tensor {name!r}; start again"
            )
        return data.view(dtype).reshape(shape)

    def _check_index(self, shard_of: dict[str, str]) -> None:
        index = self.folder / _INDEX
        for name, shard in shard_of.items():
            if name not in self.infos or self.infos[name].path.name != shard:
                raise UserError(f"{index}: puts tensor {name!r} into {shard}, which has it not; download both again")
        for name, info in self.infos.items():
            if name not in shard_of:
                raise UserError(f"{index}: does not name tensor {name!r} of {info.path.name}; download both again")


def _read(path: epath.Path, start: int, num_bytes: int) -> np.ndarray:
    """Returns bytes of a file, uint8[at most num_bytes]."""
    if not storage.is_local(path):
        return np.frombuffer(bytearray(storage.read_bytes(path, start, start + num_bytes)), np.uint8)
    with open(path, "rb") as file:
        return np.fromfile(file, np.uint8, num_bytes, offset=start)


def write_folder(
    folder: storage.AnyPath,
    specs: Mapping[str, tuple[str, tuple[int, ...]]],
    arrays: Iterable[tuple[str, np.ndarray]],
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes tensors as they arrive to model.safetensors, or to shards and model.safetensors.index.json.

    Headers are written from `specs` before the data, so one tensor is in memory at a time. Not atomic: write to a
    temporary folder and rename it.

    Args:
      folder: created if missing; must not contain any of the files to be written.
      specs: name -> (key of DTYPES, shape).
      arrays: (name, array) in the order of specs; any byte order and strides.
      shard_bytes: maximum number of tensor bytes per file; a larger tensor has a file of its own.

    Raises:
      ValueError: arrays that do not match specs; too few or too many.
      FileExistsError: a file already exists.
    """
    target = storage.path(folder)
    storage.make_folder(target)
    shards = _split(specs, shard_bytes)
    width = max(5, len(str(len(shards))))
    files = [f"model-{i + 1:0{width}}-of-{len(shards):0{width}}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = [_FILE]
    stream = iter(arrays)
    for file_name, names in zip(files, shards, strict=True):
        with storage.writing(target / file_name) as file:
            file.write(_header({name: specs[name] for name in names}))
            for name in names:
                _write_next(file, stream, name, *specs[name])
    for name, _ in stream:
        raise ValueError(f"array {name!r} comes after the last of {len(specs)} specs")
    if len(shards) > 1:
        total = sum(_num_bytes(*spec) for spec in specs.values())
        weight_map = {name: file_name for file_name, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        with storage.writing(target / _INDEX) as file:
            file.write(json.dumps(index, indent=2, sort_keys=True).encode() + b"\n")


def _find_files(folder: epath.Path) -> tuple[list[epath.Path], dict[str, str] | None]:
    """Returns (the files in order, the index's tensor -> file, or None without an index)."""
    if not storage.is_dir(folder):
        raise UserError(f"{folder}: is not a folder; give one that has {_FILE} or its shards")
    single, index = folder / _FILE, folder / _INDEX
    if storage.is_file(index):
        shard_of = _read_index(index)
        files = sorted(set(shard_of.values()))
        if storage.is_file(single) and _FILE not in files:
            raise UserError(f"{folder}: has {_FILE} and {_INDEX}, which does not name it; remove one of them")
        return [folder / name for name in files], shard_of
    if storage.is_file(single):
        return [single], None
    names = storage.names(folder)
    found = [name for name in names if name.endswith(".safetensors") and not name.startswith(".")]
    if found:
        return [folder / name for name in found], None
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if pickled:
        raise UserError(f"{folder}: has {pickled[0]} and no *.safetensors; pickled weights are not read, convert them")
    raise UserError(f"{folder}: has no *.safetensors file; give a folder that has {_FILE} or its shards")


def _read_index(path: epath.Path) -> dict[str, str]:
    shard_of = read_json(path, REMEDY).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise UserError(f"{path}: has no weight_map of tensors to files; download it again")
    there = set(storage.names(path.parent))
    for name, shard in shard_of.items():
        if not isinstance(shard, str) or pathlib.PurePath(shard).name != shard:  # nothing outside the folder is read
            raise UserError(f"{path}: puts tensor {name!r} into {shard!r}, which is no file name; download it again")
        if shard not in there:
            raise UserError(f"{path}: puts tensor {name!r} into {shard!r}, which is missing; download that file")
    return shard_of


def _read_header(path: epath.Path) -> tuple[list[int | str], dict[str, TensorInfo]]:
    """Returns (stamp, tensors by offset) of a file, whose bytes they cover exactly: the library refuses all others."""
    try:
        stamp = storage.version(path)
        with _local_header(path) as local, open(local, "rb") as file:
            with safetensors.safe_open(local, framework="np"):
                start = 8 + int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(start - 8))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({storage.reason(error)}); check the file") from error
    except safetensors.SafetensorError as error:
        message = " ".join(str(error).split())
        raise UserError(
            f"{path}: is not a valid safetensors file ({message}; it has {stamp[0]} bytes); download it again"
        ) from error
    header.pop("__metadata__", None)
    infos = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            known = ", ".join(DTYPES)
            raise UserError(f"{path}: tensor {name!r} has dtype {entry['dtype']!r}, not one of {known}; convert it")
        begin, end = entry["data_offsets"]
        infos[name] = TensorInfo(entry["dtype"], tuple(entry["shape"]), path, start + begin, start + end)
    return stamp, infos


@contextlib.contextmanager
def _local_header(path: epath.Path) -> Iterator[str]:
    """Yields a local file with the header and the size of `path`, which the library needs to check them: the file
    itself, or of an object a sparse one without the tensors.
    """
    if storage.is_local(path):
        yield os.fspath(path)
        return
    size = storage.size(path)
    length = int.from_bytes(storage.read_bytes(path, 0, min(8, size)), "little")
    with tempfile.NamedTemporaryFile(prefix="mtp_jax_header_") as file:
        file.write(storage.read_bytes(path, 0, min(8 + min(length, _LONGEST_HEADER), size)))
        file.truncate(size)
        file.flush()
        yield file.name


def _num_bytes(dtype: str, shape: Iterable[int]) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize


def _split(specs: Mapping[str, tuple[str, tuple[int, ...]]], shard_bytes: int) -> list[list[str]]:
    """Returns the tensor names of each file: as many as fit into shard_bytes, in at least one file."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + _num_bytes(*spec) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _num_bytes(*spec)
    return shards


def _header(specs: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    header: JsonObject = {"__metadata__": _METADATA}
    position = 0
    for name, (dtype, shape) in specs.items():
        if name == "__metadata__":
            raise ValueError("__metadata__ cannot be the name of a tensor")
        end = position + _num_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8, as in the library's files
    return len(text).to_bytes(8, "little") + text


def _write_next(
    file: BinaryIO, stream: Iterator[tuple[str, np.ndarray]], name: str, dtype: str, shape: tuple[int, ...]
) -> None:
    """Writes one array; a separate function, so that the array is freed before the next one is made."""
    got, array = next(stream, (None, np.empty(0)))
    if got is None:
        raise ValueError(f"no more arrays; {name!r} is the next of specs")
    if got != name:
        raise ValueError(f"array {got!r} comes where specs have {name!r}; give them in one order")
    if array.dtype.newbyteorder("=") != DTYPES[dtype] or array.shape != tuple(shape):
        raise ValueError(f"array {name!r} is {array.dtype}{list(array.shape)}; specs have {dtype}{list(shape)}")
    rows = array[None] if array.ndim == 0 else array
    step = max(1, _WRITE_BYTES * len(rows) // max(1, array.nbytes))
    for begin in range(0, len(rows), step):
        band = np.ascontiguousarray(rows[begin : begin + step], DTYPES[dtype].newbyteorder("<"))
        file.write(band.reshape(-1).view(np.uint8).data)
