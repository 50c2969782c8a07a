"""Loading of a trained model from a workdir or a Hugging Face folder: `mtp_jax.load(path)`."""

import os
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from etils import epath

from mtp_jax import data, sharding, storage
from mtp_jax.config import Config, MeshConfig, UserError, with_values
from mtp_jax.interop import checkpoint_folder as hf_folder
from mtp_jax.interop import config_json
from mtp_jax.interop.weights import place
from mtp_jax.language_model import draft_vocabulary as draft_vocabularies
from mtp_jax.language_model.model import LanguageModel, end_tokens_of
from mtp_jax.model import Tree, abstract_model
from mtp_jax.mtp import kind_of
from mtp_jax.storage import read_json
from mtp_jax.training import workdir as workdirs
from mtp_jax.training.checkpoint import Checkpoints

DType = Literal["float32", "bfloat16"]
Values = dict[str, Any]  # keyed by dotted config key


def load(
    path: str | os.PathLike[str],
    *,
    mesh: MeshConfig | None = None,
    depth: int | None = None,
    ignore: tuple[str, ...] = (),
    compute_dtype: DType | None = None,
    draft_vocabulary: bool = True,
) -> LanguageModel:
    """Loads a trained model: the newest valid checkpoint of a workdir, or a Hugging Face folder without conversion.

    Its context is `config.data.sequence_length`: for a workdir the length it was last trained on, for a folder its
    max_position_embeddings.

    Args:
      path: the workdir or the folder.
      mesh: the mesh over which the weights are sharded; None: one device.
      depth: 0 omits the MTP layers of a Hugging Face folder.
      ignore: fields of a Hugging Face config.json that do not change what the model computes.
      compute_dtype: "float32" or "bfloat16"; None: as trained, or as the folder's weights.
      draft_vocabulary: draft only tokens of the model's draft_vocabulary.json, if it has one; False: of the whole
        vocabulary. Texts do not depend on it.

    Raises:
      UserError: neither a workdir nor a Hugging Face folder, or an unsupported model, with the file, field or tensor.
      CheckpointError: a workdir without a valid checkpoint.
    """
    axes, devices = (MeshConfig(), jax.devices()[:1]) if mesh is None else (mesh, jax.devices())
    placed = sharding.make_mesh(axes, devices)
    storage.path(path, "path")
    changes = {"mesh": axes} | ({} if compute_dtype is None else {"model.compute_dtype": compute_dtype})
    if hf_folder.is_hf_folder(path):
        return _from_folder(storage.path(path), changes, placed, depth, ignore, draft_vocabulary)
    if depth is not None or ignore:
        raise UserError(f"{path}: depth and ignore are for Hugging Face folders; this is a workdir")
    return _from_workdir(storage.path(path), changes, placed, draft_vocabulary)


class ModelInfo(NamedTuple):
    """A trained model without its weights.

    tokenizer: None if it has none.
    end_tokens: ids that end a text.
    """

    config: Config
    tokenizer: data.Tokenizer | None
    end_tokens: tuple[int, ...]


def read_info(path: storage.AnyPath, ignore: tuple[str, ...] = ()) -> ModelInfo:
    """Reads what `load` reads of a model, except its weights.

    Args:
      path, ignore: as of `load`.

    Raises:
      UserError: as `load`.
    """
    folder = storage.path(path)
    if hf_folder.is_hf_folder(folder):
        config = hf_folder.open_model(folder, ignore=ignore, is_checked=True).config
        config, tokenizer, eos_ids = _texts_of_folder(folder, config)
    elif ignore:
        raise UserError(f"{path}: ignore is for Hugging Face folders; this is a workdir")
    else:
        config = workdirs.read_config(folder, "path")
        tokenizer, eos_ids = _texts_of_workdir(folder, config)
    return ModelInfo(config, tokenizer, end_tokens_of(tokenizer, eos_ids))


def _from_folder(
    path: epath.Path,
    changes: Values,
    mesh: jax.sharding.Mesh,
    depth: int | None,
    ignore: tuple[str, ...],
    draft_vocabulary: bool,
) -> LanguageModel:
    opened = hf_folder.open_model(path, ignore=ignore, depth=depth)
    context = config_json.longest_text(opened.values, str(path / "config.json"))  # the model's, not that of a run
    config = with_values(opened.config, changes | {"data.sequence_length": context})
    ids = _draft_vocabulary(path, config) if draft_vocabulary else None
    params, biases = place(opened.arrays, _abstract(config, mesh)).values()
    config, tokenizer, eos_ids = _texts_of_folder(path, config)
    return LanguageModel(config, params, biases, tokenizer, mesh, eos_ids=eos_ids, draft_vocabulary=ids)


def _texts_of_folder(path: epath.Path, config: Config) -> tuple[Config, data.Tokenizer | None, tuple[int, ...]]:
    """Returns the config with the folder's tokenizer, the tokenizer, and the end-of-text ids beside its own."""
    tokenizer = None
    if data.find_tokenizer(path) is not None:
        tokenizer, config = data.load_tokenizer(str(path)), with_values(config, {"data.tokenizer": str(path)})
    return config, tokenizer, _eos_ids(path, config.model.vocab_size or 0)


def _draft_vocabulary(model: epath.Path, config: Config) -> np.ndarray | None:
    """Returns the ids of the model's draft vocabulary; None if it has none, or cannot draft."""
    if kind_of(config).max_drafts == 0:
        return None
    return draft_vocabularies.read(draft_vocabularies.folder_of(model), config.model.vocab_size or 0)


def _eos_ids(folder: epath.Path, vocab: int) -> tuple[int, ...]:
    """Returns the end-of-text ids of a Hugging Face folder.

    They are those of generation_config.json, else of config.json, as in transformers. Ids that the model does not have
    (such as -1) are dropped.

    Raises:
      UserError: a file that cannot be read, or values that are not ids.
    """
    for path in (folder / "generation_config.json", folder / "config.json"):
        values = read_json(path, "fetch the file again") if storage.is_file(path) else {}
        if (found := values.get("eos_token_id")) is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if not all(type(i) is int for i in ids):
            raise UserError(f"{path}: field 'eos_token_id'={found!r} must be an integer or several; correct it")
        return tuple(i for i in ids if 0 <= i < vocab)
    return ()


def _from_workdir(path: epath.Path, changes: Values, mesh: jax.sharding.Mesh, draft_vocabulary: bool) -> LanguageModel:
    config = with_values(workdirs.read_config(path, "path"), changes)
    tokenizer, eos_ids = _texts_of_workdir(path, config)
    ids = _draft_vocabulary(path, config) if draft_vocabulary else None
    with Checkpoints(path / workdirs.CHECKPOINTS) as saved:
        if not saved.steps():
            raise UserError(f"{path}: has no checkpoints yet; train it first")
        step, state = saved.restore_part(None, _abstract(config, mesh))
    return LanguageModel(config, state["params"], state["biases"], tokenizer, mesh, step, eos_ids, ids)


def _texts_of_workdir(path: epath.Path, config: Config) -> tuple[data.Tokenizer | None, tuple[int, ...]]:
    """Returns the tokenizer, and the end-of-text ids beside its own."""
    is_import = storage.is_file(path / hf_folder.SIDE_FOLDER / hf_folder.ORIGIN_FILE)
    named = config.data.tokenizer
    has_tokenizer = named == "bytes" or not is_import or storage.exists(storage.path(os.path.expanduser(named)))
    tokenizer = data.load_tokenizer(named) if has_tokenizer else None
    eos_ids = (
        _eos_ids(path / hf_folder.SIDE_FOLDER, config.model.vocab_size or 0) if is_import and named != "bytes" else ()
    )
    return tokenizer, eos_ids


def _abstract(config: Config, mesh: jax.sharding.Mesh) -> Tree:
    """Returns shapes, dtypes and shardings of the weights."""
    built = abstract_model(config.architecture)

    def at(leaf: jax.ShapeDtypeStruct, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    params, biases = built.shardings(mesh)
    return {"params": jax.tree.map(at, built.params, params), "biases": jax.tree.map(at, built.biases, biases)}
