"""Records: the contract between the readers of files and datasets and `documents.py`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from mtp_jax.config import SourceConfig, UserError


class Record(NamedTuple):
    """One record of a file or dataset, or one plain-text document.

    Attributes:
      origin: for messages: "PATH line 3", "PATH record 7" or "data.source=NAME record 7"; numbers begin with 1.
      value: the fields of a record, or the text of a plain-text document.
    """

    origin: str
    value: dict[str, Any] | str


class BadRecord(UserError):
    """A record that cannot be used. Readers yield it, so that reading goes on; `store.write` raises or counts it.

    Attributes:
      origin: that of the record.
      cause, remedy: the two parts of the message after it.
    """

    def __init__(self, origin: str, cause: str, remedy: str):
        """Error of one line, `origin: cause; remedy`."""
        super().__init__(f"{origin}: {cause}; {remedy}")
        self.origin, self.cause, self.remedy = origin, cause, remedy

    def __reduce__(self) -> tuple[type["BadRecord"], tuple[str, str, str]]:
        return BadRecord, (self.origin, self.cause, self.remedy)


Records = Iterator[Record | BadRecord]


class Dataset(NamedTuple):
    """An opened dataset of a library.

    Attributes:
      key: JSON values that differ for other content: parts of the key of the token cache.
      read: returns a new iterator over all records, in the order of the dataset.
    """

    key: list[Any]
    read: Callable[[], Records]


FIELDS = {  # form of the records: the settings with the names of the fields that every record has
    "text": ("text_field",),
    "chat": ("messages_field",),
    "prompt": ("prompt_field", "completion_field"),
    "tokens": ("tokens_field",),
}
TOOLS = "tools"  # of a chat; optional


def needed_columns(settings: SourceConfig, columns: Sequence[str]) -> list[str] | None:
    """Returns those of the top-level columns that `settings` read, in the order of `columns`.

    Returns None, for all columns, if one is missing: the error then lists them.
    """
    names = [getattr(settings, key) for key in FIELDS[settings.records]]
    if settings.records == "tokens" and settings.weights_field:
        names.append(settings.weights_field)
    needed = {name if name in columns else name.partition(".")[0] for name in names}
    if not needed <= set(columns):
        return None
    if settings.records in ("chat", "prompt"):
        needed.add(TOOLS)
    return [column for column in columns if column in needed]
