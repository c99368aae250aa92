"""How long tests wait: long enough for a machine that does other things, in one place."""

from collections.abc import Callable
from typing import TypeVar

from pipeline import waiting

Found = TypeVar("Found")

PATIENCE_S = 300.0  # for one step of anything; a wait that succeeds costs none of it


def wait_until(find: Callable[[], Found], what: str) -> Found:
    """What `find` returns once it is something true."""
    return waiting.wait_until(find, what, PATIENCE_S, pause_s=0.05)
