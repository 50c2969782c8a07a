"""A trained model for people and for evaluation: `mtp_jax.load(path)`.

Shape letters: B rows, N tokens, D extra depths, T = N - D positions, K = 1 + D depths, V vocabulary.
"""

import dataclasses
import functools
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import data, sharding
from mtp_jax.config import Config, MeshConfig, UserError, mesh_sizes
from mtp_jax.interop import folder as hf_folder
from mtp_jax.interop.weights import place
from mtp_jax.model import Tree, skeleton
from mtp_jax.targets import PADDING
from mtp_jax.training import workdir as workdirs
from mtp_jax.training.checkpoint import Checkpoints


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Weights on their devices, with the tokenizer they were trained with.

    tokenizer: None where a Hugging Face folder has no tokenizer.json, or had none when it was imported.
    """

    config: Config
    params: Tree
    biases: Tree
    tokenizer: data.Tokenizer | None
    mesh: jax.sharding.Mesh

    def logits(self, tokens: Any) -> np.ndarray:
        """What every depth predicts.

        Args:
          tokens: int[B, N], rows of one document each, N > D.

        Returns:
          float32[B, N - D, 1 + D, V]; [..., k, :] predicts tokens[i + 1 + k] from tokens[:i + 1] (k = 0) or, by the
          sequential module k, from tokens[:i + 1 + k].

        Raises:
          UserError: another shape, or tokens outside the vocabulary.
        """
        tokens_BN = self._checked(tokens)
        num_rows, length = len(tokens_BN), tokens_BN.shape[1] - self.config.depth
        with jax.set_mesh(self.mesh):
            rows, cut = sharding.num_shards("batch"), sharding.num_shards("length")
            # The mesh wants equal shares; what is added comes after everything that is read.
            tokens_BN = np.pad(tokens_BN, ((0, -num_rows % rows), (0, -length % cut)))
            logits_BTKV = _logits(self.config, self.params, self.biases, jnp.asarray(tokens_BN))
        return np.asarray(jax.device_get(logits_BTKV))[:num_rows, :length]

    def _checked(self, tokens: Any) -> np.ndarray:
        tokens_BN, depth, vocab = np.asarray(tokens), self.config.depth, self.config.model.vocab_size or 0
        if tokens_BN.ndim != 2 or not np.issubdtype(tokens_BN.dtype, np.integer):
            raise UserError(f"tokens {tokens_BN.dtype}{list(tokens_BN.shape)}: give integers of shape [B, N]")
        if not len(tokens_BN) or tokens_BN.shape[1] <= depth:
            raise UserError(f"tokens {list(tokens_BN.shape)}: at depth {depth} a row has at least {depth + 1} tokens")
        if tokens_BN.min() < 0 or tokens_BN.max() >= vocab:
            bad = int(tokens_BN.min() if tokens_BN.min() < 0 else tokens_BN.max())
            raise UserError(f"tokens: {bad} is outside the vocabulary of {vocab}")
        return tokens_BN.astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: Config, params: Tree, biases: Tree, tokens_BN: jax.Array) -> jax.Array:
    model, length = skeleton(config).merge(params, biases), tokens_BN.shape[1] - config.depth
    inputs_KBT = jnp.stack([tokens_BN[:, k : k + length] for k in range(1 + config.depth)])
    positions_BT = jnp.broadcast_to(jnp.arange(length), inputs_KBT.shape[1:])
    segments_KBT = jnp.full(inputs_KBT.shape, PADDING + 1)
    hidden_KBTD = model(inputs_KBT, segments_KBT, positions_BT).hidden
    head_DV = model.head().astype(hidden_KBTD.dtype)
    # Depths first and moved afterwards: XLA's CPU backend has no bfloat16 dot that writes the other order.
    logits_KBTV = jnp.einsum("kbtd,dv->kbtv", hidden_KBTD, head_DV, preferred_element_type=jnp.float32)
    return jnp.moveaxis(logits_KBTV, 0, 2)


def load(
    path: str | os.PathLike[str],
    *,
    mesh: MeshConfig | None = None,
    depth: int | None = None,
    ignore: tuple[str, ...] = (),
    compute_dtype: str | None = None,
) -> LanguageModel:
    """A trained model: the newest sound checkpoint of a workdir, or a Hugging Face folder, read without conversion.

    Args:
      path: the workdir or the folder.
      mesh: over the devices to spread the weights; None: one device.
      depth: 0 leaves out a Hugging Face folder's MTP layers.
      ignore: fields of a Hugging Face config.json that are known not to change what the model computes.
      compute_dtype: "float32" or "bfloat16"; None: as trained, or as the folder's weights.

    Raises:
      UserError: neither of the two, or a model that is not supported, with the file, field or tensor.
      CheckpointError: a workdir without a sound checkpoint.
    """
    read = _from_folder if hf_folder.is_hf_folder(path) else _from_workdir
    return read(pathlib.Path(path), _mesh(mesh), depth, ignore, compute_dtype)


def _mesh(config: MeshConfig | None) -> tuple[MeshConfig, jax.sharding.Mesh]:
    if config is None:
        return MeshConfig(), sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    mesh_sizes(config, jax.device_count())
    return config, sharding.make_mesh(config)


def _from_folder(path: pathlib.Path, mesh, depth, ignore, compute_dtype) -> LanguageModel:
    with hf_folder.open_model(path, ignore=ignore, depth=depth) as opened:
        config = _with(opened.config, mesh[0], compute_dtype)
        params, biases = place(opened.arrays, _abstract(config, mesh[1])).values()
    has_tokenizer = (path / "tokenizer.json").is_file()
    tokenizer = data.load_tokenizer(str(path)) if has_tokenizer else None
    return LanguageModel(config, params, biases, tokenizer, mesh[1])


def _from_workdir(path: pathlib.Path, mesh, depth, ignore, compute_dtype) -> LanguageModel:
    if depth is not None or ignore:
        raise UserError(f"{path}: depth and ignore are for Hugging Face folders; this is a workdir")
    config = _with(workdirs.read_config(path), mesh[0], compute_dtype)
    is_import = (path / hf_folder.SIDE_FOLDER / hf_folder.ORIGIN_FILE).is_file()
    named = config.data.tokenizer
    has_tokenizer = named == "bytes" or pathlib.Path(named).expanduser().exists() or not is_import
    tokenizer = data.load_tokenizer(named) if has_tokenizer else None
    with Checkpoints(path / workdirs.CHECKPOINTS) as saved:
        if not saved.steps():
            raise UserError(f"{path}: has no checkpoints yet; train it first")
        _, state = saved.restore_part(None, _abstract(config, mesh[1]))
    return LanguageModel(config, state["params"], state["biases"], tokenizer, mesh[1])


def _with(config: Config, mesh: MeshConfig, compute_dtype: Any) -> Config:
    model = config.model
    if compute_dtype is not None:
        model = dataclasses.replace(model, compute_dtype=compute_dtype)
    return dataclasses.replace(config, model=model, mesh=mesh)


def _abstract(config: Config, mesh: jax.sharding.Mesh) -> Tree:
    """Shapes, dtypes and places of the weights."""
    built = skeleton(config)

    def at(leaf: jax.ShapeDtypeStruct, where: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    params, biases = built.shardings(mesh)
    return {"params": jax.tree.map(at, built.params, params), "biases": jax.tree.map(at, built.biases, biases)}
