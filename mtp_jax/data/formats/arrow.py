"""Arrow IPC files (Feather V2 too) and streams, by record batch."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from mtp_jax.config import SourceConfig
from mtp_jax.data.formats import columns
from mtp_jax.data.formats.opening import BadFile, kind_of
from mtp_jax.data.records import Records, needed_columns
from mtp_jax.errors import first_line

if TYPE_CHECKING:
    import pyarrow


def read(path: str, file: BinaryIO, settings: SourceConfig) -> Records:
    """Yields the rows of an Arrow file or stream, with the columns that `settings` need.

    Raises:
      BadFile: neither, or a truncated or corrupt one.
    """
    import pyarrow

    kind = kind_of(file)
    if kind != "Arrow":
        raise BadFile(f"is {kind or 'not Arrow'}, although its name ends as that of Arrow; rename or convert it")
    try:
        yield from columns.records(_batches(file, settings), path)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise BadFile(f"is a truncated or corrupt Arrow file ({first_line(error)}); copy it again") from error


def _batches(file: BinaryIO, settings: SourceConfig) -> Iterator["pyarrow.RecordBatch"]:
    from pyarrow import ipc

    is_stream = file.peek(4)[:4] == b"\xff\xff\xff\xff"  # type: ignore[attr-defined]
    reader = ipc.open_stream(file) if is_stream else ipc.open_file(file)
    needed = needed_columns(settings, reader.schema.names)
    for batch in reader if is_stream else map(reader.get_batch, range(reader.num_record_batches)):
        yield batch if needed is None else batch.select(needed)
