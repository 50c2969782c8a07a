"""Record batches of Arrow to records."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from mtp_jax.data.records import BadRecord, Record, Records

if TYPE_CHECKING:
    import pyarrow

ROWS = 256  # converted to Python values at once


def records(batches: Iterable["pyarrow.RecordBatch"], origin: str) -> Records:
    """Yields the rows of record batches; one with text that is not UTF-8 is a BadRecord.

    Args:
      batches: in order, of any sizes.
      origin: origin of a record without its number.
    """
    rows = (row for batch in batches for start in range(0, len(batch), ROWS) for row in _rows(batch.slice(start, ROWS)))
    for number, row in enumerate(rows, 1):
        if isinstance(row, UnicodeDecodeError):
            yield BadRecord(f"{origin} record {number}", f"not UTF-8 ({row.reason})", "convert or remove it")
        else:
            yield Record(f"{origin} record {number}", row)


def _rows(batch: "pyarrow.RecordBatch") -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            yield error
        else:
            for i in range(len(batch)):
                yield from _rows(batch.slice(i, 1))
