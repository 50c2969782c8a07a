"""Safetensors files: headers first, tensors where they are asked for; written as they come.

A file is the header's length (u64, little-endian), a JSON header {name: {dtype, shape, data_offsets: [begin, end]},
"__metadata__": {...}} and the tensors' bytes without holes, offsets counted from the header's end. Our own reader and
writer, because the safetensors package's numpy functions do not read fp8, map the file so that resident memory grows
with it, and hold a whole shard to write it.
"""

import collections
import functools
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from mtp_jax.config import UserError
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
_METADATA = {"format": "pt"}  # transformers refuses files that do not say it
_MAX_HEADER = 100_000_000  # the library's own limit
_MAX_OPEN = 32  # files; an index may name hundreds
_READ_BYTES = 1 << 30  # of one system call: macOS refuses 2 GiB, Linux cuts there
_WRITE_BYTES = 1 << 26  # copied at one time where an array is not contiguous


class TensorInfo(NamedTuple):
    """Where a tensor lies: bytes start..stop of the file `path`, counted from the file's first."""

    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    path: pathlib.Path
    start: int
    stop: int


class TensorFolder(AbstractContextManager["TensorFolder"]):
    """The tensors of a Hugging Face folder, read where they are asked for.

    They are in model.safetensors, or in the shards that model.safetensors.index.json names, or, where neither exists,
    in all of the folder's *.safetensors files. Threads may read at the same time.

    Attributes:
      infos: name -> TensorInfo, in order of file and offset.
      num_bytes: of all tensors together.

    Raises:
      UserError: no such folder or files in it; an index or header that is broken or disagrees with what is there.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = pathlib.Path(folder)
        self.infos: dict[str, TensorInfo] = {}
        self._stamps: dict[pathlib.Path, tuple[int, int]] = {}
        self._open = functools.lru_cache(_MAX_OPEN)(_OpenFile)
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
        """A tensor, or rows of its first dim, by plain reads: nothing is mapped, so memory is what is returned.

        Args:
          name: a key of `infos`.
          rows: with step 1; as in Python, what lies beyond the tensor is left out. A scalar has no rows to choose.

        Returns:
          A new array of the tensor's own dtype (of ml_dtypes for bf16 and fp8).

        Raises:
          KeyError: no such tensor.
          ValueError: rows with a step, or of a scalar.
          UserError: the file cannot be read, or is not what it was when its header was read.
        """
        info = self.infos[name]
        dtype, shape, start = DTYPES[info.dtype], info.shape, info.start
        if rows != slice(None):
            if not shape or rows.step not in (None, 1):
                raise ValueError(f"tensor {name!r} of shape {list(shape)} has no {rows}; give rows with step 1")
            begin, end, _ = rows.indices(shape[0])
            start += begin * math.prod(shape[1:]) * dtype.itemsize
            shape = (max(0, end - begin), *shape[1:])
        out = np.empty(shape, dtype)
        self._read_into(out.reshape(-1).view(np.uint8).data, info.path, start, name)
        return out

    def close(self) -> None:
        """Close the files; a later `read` opens its file again."""
        self._open.cache_clear()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_into(self, view: memoryview, path: pathlib.Path, start: int, name: str) -> None:
        try:
            file = self._open(path)
            done = 0
            while done < len(view) and (count := os.preadv(file.fd, [view[done : done + _READ_BYTES]], start + done)):
                done += count
            stamp = _stamp(file.fd)  # after reading: what changed meanwhile is seen too
        except OSError as error:
            raise UserError(f"{path}: tensor {name!r} cannot be read ({error.strerror}); check the file") from error
        if stamp != self._stamps[path] or done < len(view):
            sizes = f"{self._stamps[path][0]} bytes then, {stamp[0]} now"
            raise UserError(f"{path}: changed since its header was read ({sizes}), before tensor {name!r}; start again")

    def _check_index(self, shard_of: dict[str, str]) -> None:
        index = self.folder / _INDEX
        for name, shard in shard_of.items():
            if name not in self.infos or self.infos[name].path.name != shard:
                raise UserError(f"{index}: puts tensor {name!r} into {shard}, which has it not; download both again")
        for name, info in self.infos.items():
            if name not in shard_of:
                raise UserError(f"{index}: does not name tensor {name!r} of {info.path.name}; download both again")


def write_folder(
    folder: str | os.PathLike[str],
    specs: Mapping[str, tuple[str, tuple[int, ...]]],
    arrays: Iterable[tuple[str, np.ndarray]],
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write tensors as they come into model.safetensors, or into shards and model.safetensors.index.json.

    Headers are written from `specs` before the data, so one tensor is in memory at a time. Not atomic: write into a
    temporary folder and rename that.

    Args:
      folder: is made if missing; must hold none of the files to be written.
      specs: name -> (key of DTYPES, shape).
      arrays: (name, array) in the order of specs; any byte order and strides.
      shard_bytes: of tensors in a file; a larger tensor has its own.

    Raises:
      ValueError: arrays that are not what specs say; too few or too many.
      FileExistsError: a file is already there.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _split(specs, shard_bytes)
    width = max(5, len(str(len(shards))))
    files = [f"model-{i + 1:0{width}}-of-{len(shards):0{width}}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = [_FILE]
    stream = iter(arrays)
    for file_name, names in zip(files, shards, strict=True):
        with open(folder / file_name, "xb") as file:
            file.write(_header({name: specs[name] for name in names}))
            for name in names:
                _write_next(file, stream, name, *specs[name])
            _sync(file)
    for name, _ in stream:
        raise ValueError(f"array {name!r} comes after the last of {len(specs)} specs")
    if len(shards) > 1:
        total = sum(_num_bytes(*spec) for spec in specs.values())
        weight_map = {name: file_name for file_name, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        with open(folder / _INDEX, "xb") as file:
            file.write(json.dumps(index, indent=2, sort_keys=True).encode() + b"\n")
            _sync(file)


class _OpenFile:
    """A descriptor that is closed when nobody has it: not before a thread has read, whatever leaves the cache."""

    def __init__(self, path: pathlib.Path):
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


def _stamp(fd: int) -> tuple[int, int]:
    """(size, time of the last change)"""
    stat = os.fstat(fd)
    return stat.st_size, stat.st_mtime_ns


def _find_files(folder: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str] | None]:
    """(the files in order, the index's tensor -> file if there is an index)"""
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a folder; give one that has {_FILE} or its shards")
    single, index = folder / _FILE, folder / _INDEX
    if index.is_file():
        shard_of = _read_index(index)
        files = sorted(set(shard_of.values()))
        if single.is_file() and _FILE not in files:
            raise UserError(f"{folder}: has {_FILE} and {_INDEX}, which does not name it; remove one of them")
        return [folder / name for name in files], shard_of
    if single.is_file():
        return [single], None
    paths = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))
    if paths:
        return paths, None
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
    if pickled:
        raise UserError(f"{folder}: has {pickled[0]} and no *.safetensors; pickled weights are not read, convert them")
    raise UserError(f"{folder}: has no *.safetensors file; give a folder that has {_FILE} or its shards")


def _read_index(path: pathlib.Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_bytes().decode(), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not readable JSON ({error}); download it again") from error
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not shard_of:
        raise UserError(f"{path}: has no weight_map of tensors to files; download it again")
    for name, shard in shard_of.items():
        if not isinstance(shard, str) or pathlib.PurePath(shard).name != shard:  # nothing outside the folder is read
            raise UserError(f"{path}: puts tensor {name!r} into {shard!r}, which is no file name; download it again")
        if not (path.parent / shard).is_file():
            raise UserError(f"{path}: puts tensor {name!r} into {shard!r}, which is missing; download that file")
    return shard_of


def _unique(pairs: list[tuple[str, object]]) -> JsonObject:
    """A JSON object, where Python would take the last of equal keys without a word."""
    content = dict(pairs)
    if len(content) < len(pairs):
        (key, _), *_ = collections.Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{key!r} is there twice")
    return content


def _read_header(path: pathlib.Path) -> tuple[tuple[int, int], dict[str, TensorInfo]]:
    """(stamp, tensors by offset) of a file, whose bytes they cover exactly."""
    try:
        with open(path, "rb") as file:
            stamp = _stamp(file.fileno())
            start = file.read(8)
            length = int.from_bytes(start, "little") if len(start) == 8 else len("{}")
            text = file.read(length) if length <= _MAX_HEADER else b""
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the file") from error
    if length > _MAX_HEADER:
        limit = f"at most {_MAX_HEADER} are allowed"
        raise UserError(f"{path}: is no safetensors file (a header of {length} bytes, {limit}); download it again")
    if stamp[0] < 8 + length:
        raise UserError(f"{path}: has {stamp[0]} of {8 + length} bytes of its header; download it again")
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its header is not readable JSON ({error}); download it again") from error
    if not isinstance(header, dict):
        raise UserError(f"{path}: its header is no JSON object; download it again")
    header.pop("__metadata__", None)
    infos = [(name, _parse(path, name, entry, 8 + length)) for name, entry in header.items()]
    infos.sort(key=lambda item: (item[1].start, item[1].stop))
    _check_coverage(path, infos, 8 + length, stamp[0])
    return stamp, dict(infos)


def _parse(path: pathlib.Path, name: str, entry: object, data_start: int) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]}:
            if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
                raise UserError(f"{path}: tensor {name!r} has sizes that are no counts ({entry}); convert it again")
        case _:
            raise UserError(f"{path}: tensor {name!r} has no dtype, shape and data_offsets ({entry}); convert it again")
    if dtype not in DTYPES:
        raise UserError(f"{path}: tensor {name!r} has dtype {dtype!r}, not one of {', '.join(DTYPES)}; convert it")
    if end - begin != _num_bytes(dtype, shape):
        sizes = f"data_offsets [{begin}, {end}], but {dtype} of shape {shape} has {_num_bytes(dtype, shape)} bytes"
        raise UserError(f"{path}: tensor {name!r} has {sizes}; convert it again")
    return TensorInfo(dtype, tuple(shape), path, data_start + begin, data_start + end)


def _check_coverage(path: pathlib.Path, infos: list[tuple[str, TensorInfo]], data_start: int, size: int) -> None:
    position = data_start
    for name, info in infos:
        if info.start != position:
            what = "overlaps the one before it" if info.start < position else "leaves a hole before it"
            places = f"begins at byte {info.start}, not {position}"
            raise UserError(f"{path}: tensor {name!r} {what} ({places}); convert it again")
        position = info.stop
    if size < position:
        name = next(name for name, info in infos if info.stop > size)
        raise UserError(f"{path}: has {size} of {position} bytes, too few from tensor {name!r} on; download it again")
    if size > position:
        last = f"last tensor {infos[-1][0]!r}" if infos else "header"
        raise UserError(f"{path}: has {size} bytes, but its {last} ends at {position}; download it again")


def _num_bytes(dtype: str, shape: Iterable[int]) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize


def _split(specs: Mapping[str, tuple[str, tuple[int, ...]]], shard_bytes: int) -> list[list[str]]:
    """The names of each file: as many as go into shard_bytes, at least one file."""
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
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8, as the library has it
    return len(text).to_bytes(8, "little") + text


def _write_next(
    file: BinaryIO, stream: Iterator[tuple[str, np.ndarray]], name: str, dtype: str, shape: tuple[int, ...]
) -> None:
    """One array; in a function of its own so that it is gone before the next is made."""
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


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
