"""Draft vocabulary of a model: a part of its vocabulary, to which drafts are restricted (FastMTP, 2509.18362).

A draft then reads only these columns of the output head. Verification uses the whole head, so texts do not depend on
the draft vocabulary.

The file draft_vocabulary.json is directly in a Hugging Face folder, or in `hf/` of a workdir. Import, export and
init_from copy it like the other files there:

    {"ids": [0, 5, 17, ...], "num_tokens_counted": 1000000, "coverage": 0.97}

Shape letters: V vocabulary, V' draft vocabulary.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from etils import epath

from mtp_jax import storage
from mtp_jax.config import UserError
from mtp_jax.errors import short
from mtp_jax.interop.checkpoint_folder import SIDE_FOLDER, is_hf_folder

FILE = "draft_vocabulary.json"
_REMEDY = "make it again with mtp_jax.tools.draft_vocabulary, or remove it"


@dataclass(frozen=True)
class DraftVocabulary:
    """The content of the file.

    ids: int32[V'], increasing ids of the tokens that may be drafted.
    num_tokens_counted: tokens by whose frequency they were chosen.
    coverage: share of those tokens that the ids cover.
    """

    ids: np.ndarray
    num_tokens_counted: int
    coverage: float


def folder_of(model: storage.AnyPath) -> epath.Path:
    """Returns the folder of the file: a Hugging Face folder itself, or `hf/` of a workdir, which may not exist yet.

    Raises:
      UserError: config.json cannot be read.
    """
    path = storage.path(model)
    return path if is_hf_folder(path) else path / SIDE_FOLDER


def check_size(size: int, vocab_size: int, end_tokens: Sequence[int] = (), name: str = "size") -> None:
    """Checks the size of a draft vocabulary.

    Args:
      size: V'.
      vocab_size: V.
      end_tokens: ids that are always included.
      name: name of the size in the message.

    Raises:
      UserError: less than 1 or than the number of end tokens, or not below the vocabulary.
    """
    least = max(1, len(set(end_tokens)))
    if size < least:
        reason = f", the number of end-of-text ids {sorted(set(end_tokens))}" if least > 1 else ""
        raise UserError(f"{name}={size}: must be at least {least}{reason}")
    if size >= vocab_size:
        raise UserError(f"{name}={size}: must be below the model's vocabulary of {vocab_size}")


def choose(counts_V: np.ndarray, size: int, end_tokens: Sequence[int] = ()) -> np.ndarray:
    """Returns the ids of the most frequent tokens, int32[size], increasing.

    Args:
      counts_V: int[V], number of occurrences of each token. Among equal numbers the smaller id comes first.
      size: number of ids.
      end_tokens: end-of-text ids, which are always included; those that the model does not have are ignored.

    Raises:
      UserError: as `check_size`.
    """
    always = np.unique(np.array([i for i in end_tokens if i < len(counts_V)], np.int64))
    check_size(size, len(counts_V), always.tolist())
    order = np.argsort(-np.asarray(counts_V, np.int64), kind="stable")
    others = order[~np.isin(order, always)]
    return np.sort(np.concatenate([always, others[: size - len(always)]])).astype(np.int32)


def from_counts(
    model: storage.AnyPath, counts_V: np.ndarray, size: int, end_tokens: Sequence[int] = ()
) -> DraftVocabulary:
    """Chooses the draft vocabulary of a model and writes its file.

    Args:
      model: a workdir or a Hugging Face folder.
      counts_V, size, end_tokens: as of `choose`; `LanguageModel.end_tokens` are the model's.

    Raises:
      UserError: no token was counted, a size that cannot be used, or a folder that cannot be written.
    """
    num_tokens = int(np.sum(counts_V))
    if num_tokens < 1:
        raise UserError(f"{model}: no tokens were counted for {FILE}; give texts that are not empty")
    ids = choose(counts_V, size, end_tokens)
    made = DraftVocabulary(ids, num_tokens, float(np.sum(counts_V[ids]) / num_tokens))
    write(folder_of(model), made)
    return made


def write(folder: storage.AnyPath, made: DraftVocabulary) -> None:
    """Writes the file into a folder, which is created if it does not exist; replaces an earlier one atomically.

    Raises:
      UserError: it cannot be written.
      StorageError: the object store fails.
    """
    path = storage.path(folder) / FILE
    values = {"ids": made.ids.tolist(), "num_tokens_counted": made.num_tokens_counted, "coverage": made.coverage}
    try:
        storage.make_folder(folder)
        storage.write_text(path, json.dumps(values) + "\n")
    except storage.StorageError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({storage.reason(error)}); make its folder writable") from error


def read(folder: storage.AnyPath, vocab_size: int) -> np.ndarray | None:
    """Returns the ids in the file of a folder, int32[V']; None if there is no file.

    Args:
      folder: that of the file, see `folder_of`.
      vocab_size: V of the model.

    Raises:
      UserError: not JSON, or no increasing ids below `vocab_size`.
    """
    path = storage.path(folder) / FILE
    if not storage.is_file(path):
        return None
    values = storage.read_json(path, _REMEDY)
    if "ids" not in values:
        raise UserError(f"{path}: field 'ids' is missing; {_REMEDY}")
    ids = values["ids"]
    if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
        raise UserError(f"{path}: field 'ids'={short(ids)} must be a list of one or more integers; {_REMEDY}")
    if (bad := next((i for i in ids if not 0 <= i < vocab_size), None)) is not None:
        where = f"outside the model's vocabulary of {vocab_size}"
        raise UserError(f"{path}: field 'ids' has {short(bad)}, {where}; {_REMEDY}")
    if (n := next((n for n in range(1, len(ids)) if ids[n] <= ids[n - 1]), None)) is not None:
        raise UserError(f"{path}: field 'ids' has {ids[n]} after {ids[n - 1]} and must increase; {_REMEDY}")
    return np.array(ids, np.int32)


def remove(model: storage.AnyPath) -> bool:
    """Removes the file of a model; returns whether there was one.

    Raises:
      UserError: it cannot be removed.
      StorageError: the object store fails.
    """
    path = folder_of(model) / FILE
    if not storage.is_file(path):
        return False
    try:
        storage.remove(path)
    except storage.StorageError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be removed ({storage.reason(error)}); make its folder writable") from error
    return True
