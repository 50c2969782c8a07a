"""Safetensors files: against the library in both directions, what is refused, and what is in memory."""

import concurrent.futures
import importlib
import json
import os
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest

from mtp_jax.config import UserError
from mtp_jax.interop import tensorfiles
from mtp_jax.interop.tensorfiles import DTYPE_NAMES, DTYPES, TensorFolder, write_folder

BF16, F8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def needed(module):
    """A package that may be missing on a machine, but not where all tests must run."""
    if os.environ.get("CI") == "true":
        importlib.import_module(module)
    return pytest.importorskip(module)


def random_array(dtype, shape, seed=0):
    """Random bits, NaNs among them."""
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return np.random.default_rng(seed).integers(0, 2, shape).astype(bool)
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    return np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8).view(dtype).reshape(shape)


def every_dtype():
    """One tensor of each dtype, an empty and a scalar one; sizes that leave the next unaligned."""
    arrays = {f"a.{name}": random_array(dtype, (5, 3), i) for i, (name, dtype) in enumerate(DTYPES.items())}
    return arrays | {
        "empty": np.empty((0, 7), np.float32),
        "none": np.empty((7, 0), BF16),
        "scalar": np.array(2.5, "f4"),
    }


def specs_of(arrays):
    return {name: (DTYPE_NAMES[array.dtype], array.shape) for name, array in arrays.items()}


def write(folder, arrays, **settings):
    write_folder(folder, specs_of(arrays), arrays.items(), **settings)
    return folder


def assert_same(a, b):
    assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def file_bytes(header, num_data_bytes, pad=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(num_data_bytes) + pad


def entry(begin, end, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def refusal(folder):
    with pytest.raises(UserError) as caught:
        TensorFolder(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message and "; " in message
    return message


# ---- round trips


@pytest.mark.parametrize("shard_bytes", [10**9, 50])
def test_what_is_written_is_read(tmp_path, shard_bytes):
    arrays = every_dtype()
    folder = TensorFolder(write(tmp_path, arrays, shard_bytes=shard_bytes))
    assert list(folder.infos) == list(arrays)
    assert folder.num_bytes == sum(array.nbytes for array in arrays.values())
    for name, array in arrays.items():
        read = folder.read(name)
        assert_same(read, array)
        assert read.flags.writeable and folder.infos[name].shape == array.shape


@pytest.mark.parametrize("framework", ["np", "pt"])
def test_the_library_reads_what_is_written(tmp_path, framework):
    safetensors = needed("safetensors")
    torch = needed("torch") if framework == "pt" else None
    left_out = {"F8_E8M0"} | ({"F8_E4M3", "F8_E5M2"} if framework == "np" else {"U16", "U32", "U64"})
    arrays = {name: array for name, array in every_dtype().items() if name[2:] not in left_out}
    write(tmp_path, arrays)
    with safetensors.safe_open(tmp_path / FILE, framework=framework) as file:
        assert set(file.keys()) == set(arrays) and file.metadata() == {"format": "pt"}
        for name, array in arrays.items():
            theirs = file.get_tensor(name)
            if torch:
                assert tuple(theirs.shape) == array.shape
                assert str(theirs.dtype).removeprefix("torch.") == {"bool": "bool"}.get(
                    str(array.dtype), array.dtype.name
                )
                theirs = theirs.reshape(-1).view(torch.uint8).numpy()
            else:
                assert_same(theirs, array)
            assert theirs.tobytes() == array.tobytes()


def library_arrays():
    """Arrays that save_file of torch can write: bf16 and fp8 too, in the library's own order."""
    torch = needed("torch")
    kinds = {"z": torch.float32, "b": torch.bfloat16, "f": torch.float8_e4m3fn, "i": torch.int64, "t": torch.bool}
    tensors = {name: (torch.arange(15).reshape(5, 3) % 2).to(kind) for name, kind in kinds.items()}
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}


def assert_reads(folder, tensors):
    torch = needed("torch")
    assert set(folder.infos) == set(tensors)
    for name, tensor in tensors.items():
        array = folder.read(name)
        assert array.shape == tuple(tensor.shape) and array.dtype.name == str(tensor.dtype).removeprefix("torch.")
        assert array.tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_what_the_library_writes_is_read(tmp_path):
    library, tensors = needed("safetensors.torch"), library_arrays()
    library.save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    assert_reads(TensorFolder(tmp_path), tensors)


def test_shards_of_the_library_with_an_index_and_without(tmp_path):
    library, tensors = needed("safetensors.torch"), library_arrays()
    shards = {f"model-0000{i + 1}-of-00003.safetensors": list(tensors)[i::3] for i in range(3)}
    for shard, names in shards.items():
        library.save_file({name: tensors[name] for name in names}, tmp_path / shard)
    assert_reads(TensorFolder(tmp_path), tensors)
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    library.save_file(tensors, tmp_path / "consolidated.safetensors")  # which the index does not name
    folder = TensorFolder(tmp_path)
    assert_reads(folder, tensors)
    paths = [info.path.name for info in folder.infos.values()]
    starts = [(info.path, info.start) for info in folder.infos.values()]
    assert set(paths) == set(shards) and starts == sorted(starts)


def test_transformers_way_to_read_shards(tmp_path):
    """Each tensor from the file the index names, with torch."""
    library = needed("safetensors.torch")
    arrays = {f"w{i}": random_array(BF16, (4, 4), i) for i in range(5)}
    write(tmp_path, arrays, shard_bytes=64)
    for name, shard in json.loads((tmp_path / INDEX).read_text())["weight_map"].items():
        tensor = library.load_file(tmp_path / shard)[name]
        assert tensor.view(needed("torch").uint8).numpy().tobytes() == arrays[name].tobytes()


# ---- reading


@pytest.mark.parametrize(
    "rows",
    [slice(None), slice(0, 0), slice(0, 1), slice(2, 5), slice(9, 10), slice(10, 10), slice(3, None), slice(None, 4)]
    + [slice(0, 10, 1), slice(8, 99), slice(20, 30), slice(5, 2), slice(-3, None), slice(-4, -2)],
)
def test_rows_are_what_numpy_would_give(tmp_path, rows):
    arrays = {
        "first": random_array(np.uint8, (3,)),
        "x": random_array(BF16, (10, 3, 2)),
        "last": random_array(F8, (5,)),
    }
    folder = TensorFolder(write(tmp_path, arrays))
    for name, array in arrays.items():
        assert_same(folder.read(name, rows), array[rows])


def test_rows_that_do_not_exist_are_refused(tmp_path):
    folder = TensorFolder(write(tmp_path, {"x": np.ones((4, 2)), "s": np.float32(1).reshape(())}))
    for name, rows in [("x", slice(0, 4, 2)), ("x", slice(None, None, -1)), ("s", slice(0, 1))]:
        with pytest.raises(ValueError, match=f"{name!r} of shape"):
            folder.read(name, rows)
    with pytest.raises(KeyError, match="absent"):
        folder.read("absent")


def num_open():
    return len(os.listdir("/dev/fd"))


def test_many_shards_and_threads_with_no_file_left_open(tmp_path):
    arrays = {f"w{i:02}": random_array(np.float32, (50, 4), i) for i in range(40)}
    write(tmp_path, arrays, shard_bytes=1)
    before = num_open()
    folder = TensorFolder(tmp_path)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        for _ in range(5):
            for array, read in zip(arrays.values(), threads.map(folder.read, arrays), strict=True):
                assert_same(read, array)
    assert num_open() == before


def test_a_file_that_changed_is_refused(tmp_path):
    arrays = {"x": np.ones((100, 4), np.float32), "y": np.ones((100, 4), np.float32)}
    path = write(tmp_path, arrays) / FILE
    size = path.stat().st_size
    opened, unopened = TensorFolder(tmp_path), TensorFolder(tmp_path)
    opened.read("x")
    os.truncate(path, size - 8)
    for folder in (opened, unopened):
        for name in arrays:
            with pytest.raises(
                UserError, match=rf"{FILE}: changed .*\({size} bytes then, {size - 8} now\).*'{name}'; "
            ):
                folder.read(name)
    path.unlink()
    with pytest.raises(UserError, match=f"{FILE}: tensor 'x' cannot be read"):
        unopened.read("x")


def test_a_file_of_the_same_size_with_other_content_is_refused(tmp_path):
    path = write(tmp_path, {"x": np.ones(4)}) / FILE
    folder = TensorFolder(tmp_path)
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(0, 0))
    with pytest.raises(UserError, match="changed since"):
        folder.read("x")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_what_is_returned(tmp_path):
    """VmHWM, because ru_maxrss of a child begins at its parent's."""
    rows, columns = 2000, 100_000
    content = file_bytes({"x": entry(0, rows * columns, "F8_E4M3", [rows, columns])}, 0)
    (tmp_path / FILE).write_bytes(content)
    os.truncate(tmp_path / FILE, len(content) + rows * columns)
    program = """
        import pathlib, re, sys
        from mtp_jax.interop.tensorfiles import TensorFolder
        peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
        folder, before = TensorFolder(sys.argv[1]), peak()
        total = sum(folder.read("x", slice(i, i + 50)).nbytes for i in range(0, 2000, 50))
        print(total, peak() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)]
    total, rise = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert total == 200_000_000 and rise < 20_000_000


# ---- writing


def test_shards_are_filled_in_order_and_named_in_the_index(tmp_path):
    sizes = {"a": 40, "b": 60, "c": 1, "d": 500, "e": 0, "f": 99, "g": 1, "h": 1}
    write(tmp_path, {name: np.zeros(size, np.uint8) for name, size in sizes.items()}, shard_bytes=100)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    shards = [
        "".join(n for n in sizes if index["weight_map"][n] == f"model-0000{i}-of-00005.safetensors")
        for i in range(1, 6)
    ]
    assert shards == ["ab", "c", "d", "efg", "h"]
    assert {p.name for p in tmp_path.iterdir()} == {*index["weight_map"].values(), INDEX}


@pytest.mark.parametrize(("shard_bytes", "is_single"), [(100, True), (99, False)])
def test_one_file_up_to_the_limit(tmp_path, shard_bytes, is_single):
    write(tmp_path, {"a": np.zeros(50, np.uint8), "b": np.zeros(50, np.uint8)}, shard_bytes=shard_bytes)
    assert (tmp_path / FILE).exists() == is_single == (not (tmp_path / INDEX).exists())


@pytest.mark.parametrize("arrays", [{"big": np.zeros(50)}, {}])
def test_a_single_large_tensor_or_none_is_one_file(tmp_path, arrays):
    write(tmp_path, arrays, shard_bytes=1)
    assert [p.name for p in tmp_path.iterdir()] == [FILE]
    assert list(TensorFolder(tmp_path).infos) == list(arrays)
    with needed("safetensors").safe_open(tmp_path / FILE, framework="np") as file:
        assert list(file.keys()) == list(arrays)


@pytest.mark.parametrize("length", range(1, 10))
def test_data_begins_at_a_multiple_of_8(tmp_path, length):
    folder = TensorFolder(write(tmp_path, {"n" * length: np.ones(2)}))
    assert folder.infos["n" * length].start % 8 == 0


def test_any_byte_order_and_strides(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorfiles, "_WRITE_BYTES", 40)  # in several pieces
    base = np.arange(60, dtype=np.float32).reshape(6, 10)
    arrays = {
        "big": base.astype(">f4"),
        "big_scalar": np.array(3, ">i8"),
        "transposed": base.T,
        "strided": base[::2, ::3],
        "reversed": base.astype(BF16)[::-1],
        "broadcast": np.broadcast_to(np.float16(3), (5, 4)),
        "fp8": base.astype(F8).T,
    }
    specs = {name: (DTYPE_NAMES[array.dtype.newbyteorder("=")], array.shape) for name, array in arrays.items()}
    write_folder(tmp_path, specs, arrays.items())
    folder = TensorFolder(tmp_path)
    for name, array in arrays.items():
        read = folder.read(name)
        assert read.dtype.isnative and read.shape == array.shape
        np.testing.assert_array_equal(read.astype(np.float64), array.astype(np.float64))


def test_one_array_is_in_memory_at_a_time(tmp_path):
    alive = 0

    class Counted(np.ndarray):
        def __del__(self):
            nonlocal alive
            if self.base is None:
                alive -= 1

    def arrays():
        nonlocal alive
        for i in range(6):
            assert alive == 0
            alive += 1
            yield str(i), Counted((10, 4), np.float32)

    write_folder(tmp_path, {str(i): ("F32", (10, 4)) for i in range(6)}, arrays(), shard_bytes=320)
    assert alive == 0 and len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([("a", np.ones(2, "f4"))], "no more arrays; 'b'"),
        ([("b", np.ones(2, "f4")), ("a", np.ones(2, "f4"))], "'b' comes where specs have 'a'"),
        ([("a", np.ones(2, "f8"))], r"'a' is float64\[2\]; specs have F32\[2\]"),
        ([("a", np.ones(2, "i4"))], r"'a' is int32\[2\]"),
        ([("a", np.ones((2, 1), "f4"))], r"'a' is float32\[2, 1\]; specs have F32\[2\]"),
        ([("a", np.ones(2, "f4")), ("b", np.ones(2, "f4")), ("c", np.ones(2, "f4"))], "'c' comes after the last of 2"),
    ],
)
def test_arrays_that_are_not_the_specs_are_refused(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        write_folder(tmp_path, {"a": ("F32", (2,)), "b": ("F32", (2,))}, arrays)


def test_every_file_is_on_the_disk_before_it_is_closed(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append((os.fstat(fd).st_ino, os.fstat(fd).st_size)))
    write(tmp_path, {"a": np.ones(2), "b": np.ones(2)}, shard_bytes=1)
    assert sorted(synced) == sorted((p.stat().st_ino, p.stat().st_size) for p in tmp_path.iterdir())
    assert len(synced) == 3


def test_what_is_there_is_not_written_over(tmp_path):
    write(tmp_path / "new" / "folder", {"a": np.ones(2)})
    with pytest.raises(FileExistsError):
        write(tmp_path / "new" / "folder", {"a": np.zeros(2)})
    with pytest.raises(ValueError, match="__metadata__ cannot be the name"):
        write_folder(tmp_path, {"__metadata__": ("F32", (2,))}, [])


# ---- refused


def test_a_folder_without_safetensors(tmp_path):
    assert "absent: is not a folder; give" in refusal(tmp_path / "absent")
    assert "has no *.safetensors file; give a folder" in refusal(tmp_path)
    (tmp_path / "._model.safetensors").write_bytes(b"of macOS")
    assert "has no *.safetensors file; give a folder" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert "pytorch_model.bin and no *.safetensors; pickled weights are not read, convert" in refusal(tmp_path)


INVALID = "is not a valid safetensors file"
HEADERS = {
    "empty": (b"", f"{INVALID} .*header too small; it has 0 bytes"),
    "short": (b"\x08\0\0\0", f"{INVALID} .*header too small; it has 4 bytes"),
    "cut": (file_bytes({"w": entry(0, 8)}, 8)[:30], f"{INVALID} .*header length; it has 30 bytes"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", f"{INVALID} .*header too large"),
    "json": (file_bytes(b'{"w": nonsense}', 8), f"{INVALID} .*invalid JSON .*column 8"),
    "utf16": (file_bytes(json.dumps({"w": entry(0, 8)}).encode("utf-16"), 8), f"{INVALID} .*invalid UTF-8"),
    "deep": (file_bytes(b"[" * 100_000, 0), f"{INVALID} .*invalid JSON"),
    "list": (file_bytes([1], 0), f"{INVALID} .*invalid JSON"),
    "twice": (
        file_bytes({"w": entry(0, 8)}, 16).replace(b"}}", b'}, "w": {"dtype": "F32", '),
        f"{INVALID} .*invalid JSON",
    ),
    "fields": (file_bytes({"w": {"dtype": "F32", "shape": [2]}}, 8), f"{INVALID} .*missing field `data_offsets`"),
    "no_dict": (file_bytes({"w": 3}, 8), f"{INVALID} .*integer `3`"),
    "negative": (file_bytes({"w": entry(0, 8, shape=[-2, -1])}, 8), f"{INVALID} .*integer `-2`"),
    "float": (file_bytes({"w": entry(0, 8, shape=[2.0])}, 8), f"{INVALID} .*floating point `2.0`"),
    "bool": (file_bytes({"w": entry(0, 4, shape=[True])}, 4), f"{INVALID} .*boolean `true`"),
    "before": (file_bytes({"w": entry(-8, 0, shape=[2])}, 8), f"{INVALID} .*integer `-8`"),
    "size": (file_bytes({"w": entry(0, 8, shape=[3])}, 8), f"{INVALID} .*invalid shape, data type, or offset"),
    "backward": (file_bytes({"w": entry(8, 0, shape=[2])}, 8), f"{INVALID} .*invalid offset for tensor `w`"),
    "huge": (file_bytes({"w": entry(0, 8, shape=[2**62, 4])}, 8), f"{INVALID} .*overflow"),
    "overlap": (file_bytes({"v": entry(4, 12), "w": entry(0, 8)}, 12), f"{INVALID} .*invalid offset for tensor `v`"),
    "hole": (file_bytes({"w": entry(0, 8), "v": entry(12, 20)}, 20), f"{INVALID} .*invalid offset for tensor `v`"),
    "late": (file_bytes({"w": entry(4, 8)}, 8), f"{INVALID} .*invalid offset for tensor `w`"),
    "range": (file_bytes({"w": entry(0, 8), "v": entry(8, 80)}, 8), f"{INVALID} .*not fully covered"),
    "truncated": (file_bytes({"w": entry(0, 8), "v": entry(8, 16)}, 16)[:-12], f"{INVALID} .*not fully covered"),
    "trailing": (file_bytes({"w": entry(0, 8)}, 8, b"x"), f"{INVALID} .*not fully covered"),
    "only_trailing": (file_bytes({}, 1), f"{INVALID} .*not fully covered; it has 11 bytes"),
    "newline": (file_bytes({"w\n": entry(4, 8)}, 8), f"{INVALID} .*invalid offset for tensor `w `"),
    "dtype": (
        file_bytes({"w": entry(0, 8, "F4", [16])}, 8),
        "tensor 'w' has dtype 'F4', not one of BOOL.* F64; convert",
    ),
    "unknown_dtype": (file_bytes({"w": entry(0, 8, "F5", [16])}, 8), f"{INVALID} .*unknown variant `F5`"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_corrupt_file_is_refused_in_one_line(tmp_path, kind):
    content, message = HEADERS[kind]
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(UserError, match=f"{FILE}: .*{message}"):
        TensorFolder(tmp_path)
    assert refusal(tmp_path)


def test_the_error_of_a_truncated_file_has_its_size(tmp_path):
    path = write(tmp_path, {"w": np.ones(100), "v": np.ones(100)}) / FILE
    size = path.stat().st_size
    os.truncate(path, size - 1)
    assert f"not fully covered; it has {size - 1} bytes); download" in refusal(tmp_path)


def test_a_file_that_cannot_be_opened(tmp_path):
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "gone")
    assert "a.safetensors: cannot be read (No such file" in refusal(tmp_path)


@pytest.fixture
def sharded(tmp_path):
    """(folder of tensors a and b in a shard each, a function that writes another index)"""
    write(tmp_path, {"a": np.ones(2), "b": np.ones(2)}, shard_bytes=1)

    def index(**weight_map):
        names = {"1": "model-00001-of-00002.safetensors", "2": "model-00002-of-00002.safetensors"}
        content = {"weight_map": {name: names.get(shard, shard) for name, shard in weight_map.items()}}
        (tmp_path / INDEX).write_text(json.dumps(content))

    return tmp_path, index


def test_an_index_that_is_not_what_is_there(sharded):
    folder, index = sharded
    index(a="1", b="2")
    assert list(TensorFolder(folder).infos) == ["a", "b"]
    index(a="1", b="3.safetensors")
    assert f"{INDEX}: puts tensor 'b' into '3.safetensors', which is missing; download" in refusal(folder)
    index(a="1", b="2", c="2")
    assert f"{INDEX}: puts tensor 'c' into model-00002-of-00002.safetensors, which has it not; " in refusal(folder)
    index(a="2", b="2")
    assert f"{INDEX}: puts tensor 'a' into model-00002-of-00002.safetensors, which has it not; " in refusal(folder)
    index(a="2", b="1")
    assert "puts tensor 'a' into model-00002-of-00002.safetensors, which has it not" in refusal(folder)
    index(a="1", b="1")
    assert "puts tensor 'b' into model-00001-of-00002.safetensors, which has it not" in refusal(folder)
    (folder / "model-00002-of-00002.safetensors").write_bytes(file_bytes({"b": entry(0, 8), "c": entry(8, 16)}, 16))
    index(a="1", b="2")
    assert f"{INDEX}: does not name tensor 'c' of model-00002-of-00002.safetensors; " in refusal(folder)


def test_a_corrupt_index(sharded):
    folder, index = sharded
    for text, said in {
        "{": "cannot be read as JSON (",
        "[" * 100_000: "is nested deeper than",
        '{"weight_map": {"a": "x", "a": "y"}}': "cannot be read as JSON ('a' occurs twice)",
        "[]": "holds a list, not a JSON object",
    }.items():
        (folder / INDEX).write_text(text)
        assert f"{INDEX}: {said}" in refusal(folder)
    for text in ("{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'):
        (folder / INDEX).write_text(text)
        assert f"{INDEX}: has no weight_map" in refusal(folder)
    for shard in (7, "../model-00001-of-00002.safetensors", str(folder / "model-00001-of-00002.safetensors")):
        index(a=shard, b="2")
        assert f"puts tensor 'a' into {shard!r}, which is no file name; " in refusal(folder)


@pytest.mark.parametrize("has_index", [True, False])
def test_a_tensor_in_two_shards(sharded, has_index):
    folder, index = sharded
    (folder / "model-00002-of-00002.safetensors").write_bytes(file_bytes({"b": entry(0, 8), "a": entry(8, 16)}, 16))
    index(a="1", b="2")
    if not has_index:
        (folder / INDEX).unlink()
    both = "model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors"
    assert f"tensor 'a' is in {both}; remove" in refusal(folder)


def test_a_single_file_beside_an_index(sharded):
    folder, index = sharded
    single = file_bytes({"a": entry(0, 8)}, 8)
    (folder / FILE).write_bytes(single)
    assert f"has {FILE} and {INDEX}, which does not name it; remove one of them" in refusal(folder)
    index(a=FILE)
    assert list(TensorFolder(folder).infos) == ["a"]
