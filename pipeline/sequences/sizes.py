"""The memory that a build's tasks take: of a part that is read, and of a bucket of users."""

from pipeline.config import SourceConfig
from pipeline.schema import EventColumns
from pipeline.sequences.parts import RUN_ROWS

MB = 2**20
BUCKET_MEMORY = 256 * MB  # to build one, where `sequences.num_buckets` leaves their number to us
# worth a warning: logs have been appended for long, or a user has very many rows
MUCH_MEMORY = 4 * BUCKET_MEMORY
MEMORY_PER_BYTE = 5  # a bucket's rows: themselves, as columns to sort by, in order, and as lists


def row_bytes(events: EventColumns) -> float:
    """Size of one cleaned row in memory, in bytes."""
    return sum(field.type.bit_width for field in events.log_schema()) / 8


def bucket_memory(rows: float, bytes_per_row: float) -> float:
    """Bytes that a task needs to build a bucket of so many rows."""
    return MEMORY_PER_BYTE * bytes_per_row * rows


def part_memory(rows: float, bytes_per_row: float) -> float:
    """Bytes that a task needs to read a part of so many rows."""
    return 2 * bytes_per_row * min(rows, RUN_ROWS)


def fitting_buckets(source: SourceConfig, rows: int) -> int:
    """The number of buckets of which one takes BUCKET_MEMORY, which leaves room for logs to be
    appended for a good while.
    """
    needed = bucket_memory(rows, row_bytes(source.events))
    return max(1, round(needed / BUCKET_MEMORY))
