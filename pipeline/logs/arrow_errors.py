"""Arrow's exceptions over a user's file as one message that names file, column and, where Arrow
tells it, the value.

    with reading_file(path):             path: column 'price': Integer value 300 not in range: …
        with reading_column("price"):
            …
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from pipeline.config import UserError


class ColumnTrouble(UserError):
    """A column that Arrow cannot read or convert; who knows the file adds its name."""


@contextmanager
def reading_file(file: str) -> Iterator[None]:
    """Raises UserError naming the file for what Arrow raises in the block."""
    try:
        yield
    except ColumnTrouble as error:
        raise UserError(f"{file}: {error}") from error
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read: {_first_line(error)}") from error


@contextmanager
def reading_column(name: str) -> Iterator[None]:
    """Raises ColumnTrouble naming the column for what Arrow raises in the block."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise ColumnTrouble(f"column {name!r}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
