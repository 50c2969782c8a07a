"""Microscaling fp4 against its definition and against transformers."""

import json
import re

import ml_dtypes
import numpy as np
import pytest

import mtp_jax
from mtp_jax.config import UserError
from mtp_jax.interop import mxfp4
from mtp_jax.interop.tensorfiles import DTYPE_NAMES, TensorFolder, write_folder
from mtp_jax.tools import convert
from tests.commands import run_here
from tests.interop import hf_models
from tests.reference import mxfp4 as reference


def in_blocks(folder, target, seed=0):
    """A copy of a folder of gpt_oss with random experts in mxfp4, and its twin with the oracle's values of them."""
    rng = np.random.default_rng(seed)
    files = TensorFolder(folder)
    arrays = {name: files.read(name) for name in files.infos}
    twin = dict(arrays)
    for name in [n for n in arrays if n.endswith("_proj") and ".experts." in n]:
        experts, ins, out = arrays.pop(name).shape
        blocks = rng.integers(0, 256, (experts, out, ins // 32, 16), np.uint8)
        scales = rng.integers(121, 125, (experts, out, ins // 32), np.uint8)
        arrays |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        twin[name] = np.ascontiguousarray(reference.dequantize(blocks, scales).swapaxes(1, 2))
    for path, content, more in ((target / "mxfp4", arrays, {"quant_method": "mxfp4"}), (target / "plain", twin, None)):
        write_folder(path, {n: (DTYPE_NAMES[a.dtype], a.shape) for n, a in content.items()}, content.items())
        config = json.loads((folder / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | ({"quantization_config": more} if more else {})))
    return target / "mxfp4", target / "plain"


def test_gpt_oss_in_mxfp4_is_the_model_of_its_values(tmp_path, monkeypatch):
    hf_models.build("gpt_oss", tmp_path / "hf", style="released")
    packed, plain = in_blocks(tmp_path / "hf", tmp_path)
    rows = hf_models.tokens_of("gpt_oss")
    np.testing.assert_array_equal(mtp_jax.load(packed).logits(rows), mtp_jax.load(plain).logits(rows))
    argv = [f"--hf={packed}", f"--workdir={tmp_path / 'run'}"]
    assert run_here(monkeypatch, convert.main, "import", *argv) == 0
    argv = [f"--hf={tmp_path / 'back'}", f"--workdir={tmp_path / 'run'}"]
    assert run_here(monkeypatch, convert.main, "export", *argv) == 0
    back, wanted = TensorFolder(tmp_path / "back"), TensorFolder(plain)
    assert back.infos.keys() == wanted.infos.keys()
    for name in wanted.infos:
        np.testing.assert_array_equal(back.read(name).astype(np.float32), wanted.read(name))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (plain / "config.json").read_text()
    )


@pytest.mark.parametrize("change", ["no scales", "other blocks"])
def test_parts_that_do_not_fit_are_refused(tmp_path, change):
    hf_models.build("gpt_oss", tmp_path / "hf", style="released")
    packed, _ = in_blocks(tmp_path / "hf", tmp_path)
    files, name = TensorFolder(packed), "model.layers.1.mlp.experts.down_proj"
    arrays = {n: files.read(n) for n in files.infos}
    if change == "no scales":
        del arrays[f"{name}_scales"]
    else:
        arrays[f"{name}_blocks"] = arrays[f"{name}_blocks"][:, :-1]
    (packed / "model.safetensors").unlink()
    write_folder(packed, {n: (DTYPE_NAMES[a.dtype], a.shape) for n, a in arrays.items()}, arrays.items())
    named = {"no scales": r"down_proj_scales is missing", "other blocks": r"down_proj_blocks is U8 \(8, 63, 2, 16\)"}
    with pytest.raises(UserError, match=named[change] + r"; mxfp4 model.layers.1.mlp.experts.down_proj \(8, 64, 64\)"):
        mtp_jax.load(packed)


def random(shape, seed=0, low=0, high=256):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*shape, 16), np.uint8), rng.integers(low, high, shape, np.uint8)


def test_the_definition_by_hand():
    codes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert [reference.e2m1(code) for code in range(16)] == [*codes, *(-c for c in codes)]
    assert (reference.e8m0(127), reference.e8m0(130), reference.e8m0(0)) == (1.0, 8.0, 2.0**-127)


@pytest.mark.parametrize("shape", [(1,), (3, 2), (2, 3, 4), (0, 2), (2, 0)])
def test_random_blocks_equal_the_definition(shape):
    blocks, scales = random(shape, low=0, high=253)  # beyond 252, six times the scale is not finite in float32
    found = mxfp4.dequantize(blocks, scales)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, reference.dequantize(blocks, scales))


def test_every_byte_with_every_scale():
    """NaN and infinities too; the sign of zero is kept."""
    scales = np.repeat(np.arange(256, dtype=np.uint8), 16).reshape(256, 16)
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (256, 16, 16))
    with np.errstate(over="ignore", invalid="ignore"):
        found = mxfp4.dequantize(np.ascontiguousarray(blocks), scales)
        np.testing.assert_array_equal(found, reference.dequantize(blocks, scales))
    assert np.signbit(found[127, 16]) == np.signbit(reference.e2m1(8))
    assert np.isnan(found[255]).all() and np.isinf(found[254]).any()


def test_transformers_agrees():
    hf_models.needs_torch()
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = random((3, 5, 4), low=100, high=150)
    for dtype, ours in ((torch.float32, np.float32), (torch.bfloat16, ml_dtypes.bfloat16)):
        theirs = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=dtype)
        found = mxfp4.dequantize(blocks, scales).astype(ours)
        # theirs is [experts, in, out], for their experts multiply from the left
        np.testing.assert_array_equal(np.swapaxes(found, 1, 2).astype(np.float32), theirs.float().numpy())


@pytest.mark.parametrize(
    ("blocks", "scales"),
    [
        (np.zeros((2, 15), np.uint8), np.zeros(2, np.uint8)),
        (np.zeros((2, 16), np.int8), np.zeros(2, np.uint8)),
        (np.zeros((3, 16), np.uint8), np.zeros(2, np.uint8)),
        (np.zeros((2, 16), np.uint8), np.zeros(2, np.float32)),
    ],
)
def test_what_does_not_belong_together_is_refused_with_both_shapes(blocks, scales):
    message = f"blocks are {blocks.dtype}{list(blocks.shape)} and scales {scales.dtype}{list(scales.shape)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        mxfp4.dequantize(blocks, scales)
