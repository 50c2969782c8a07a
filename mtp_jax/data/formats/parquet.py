"""Parquet, in batches of rows: memory does not grow with the row group."""

from typing import BinaryIO

from mtp_jax.config import SourceConfig
from mtp_jax.data.formats import columns
from mtp_jax.data.formats.opening import BadFile, kind_of
from mtp_jax.data.records import Records, needed_columns
from mtp_jax.errors import first_line

_BUFFER = 1 << 20  # bytes read at once per column; 0 would read the whole column of a row group


def read(path: str, file: BinaryIO, settings: SourceConfig) -> Records:
    """Yields the rows of a Parquet file, with the columns that `settings` need.

    Raises:
      BadFile: not a Parquet file, or a truncated or corrupt one.
    """
    import pyarrow
    from pyarrow import parquet

    kind = kind_of(file)
    if kind != "Parquet":
        raise BadFile(f"is {kind or 'not Parquet'}, although its name ends in .parquet; rename or convert it")
    try:
        table = parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False)
        needed = needed_columns(settings, table.schema_arrow.names)
        yield from columns.records(table.iter_batches(columns.ROWS, columns=needed, use_threads=False), path)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise BadFile(f"is a truncated or corrupt Parquet file ({first_line(error)}); copy it again") from error
