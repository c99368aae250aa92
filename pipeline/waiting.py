"""Waiting for something that a slow machine takes long for: with a limit, and a line of progress.

A slow machine is not a failure. Limits are settings with generous defaults, and every 15 s a line
says what is waited for, so that nobody takes patience for a hang.
"""

import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

logger = logging.getLogger(__name__)

Found = TypeVar("Found")

PROGRESS_EVERY_S = 15.0
PAUSE_S = 0.2


def wait_until(
    find: Callable[[], Found], what: str, limit_s: float, *, pause_s: float = PAUSE_S
) -> Found:
    """Ask `find` until it returns something true, and return that.

    Raises:
        TimeoutError: there was nothing after `limit_s` seconds; names `what` was waited for.
    """
    end = time.monotonic() + limit_s
    with progress_lines(what, limit_s):
        while not (found := find()):
            if time.monotonic() > end:
                raise TimeoutError(f"{what}: not within {limit_s:.0f} s")
            time.sleep(pause_s)
    return found


@cache
def certificates() -> ssl.SSLContext:
    """What httpx trusts, read once.

    `httpx.get` reads it anew, also for http: tens of milliseconds of a processor that what is
    waited for could use.
    """
    import httpx  # a tenth of a second that a job which asks nobody does not pay

    return httpx.create_ssl_context()


@contextmanager
def progress_lines(what: str, limit_s: float) -> Iterator[None]:
    """Log every 15 s that `what` is waited for, as long as the block runs."""
    done = threading.Event()
    teller = threading.Thread(target=_tell, args=(what, limit_s, done), daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


def _tell(what: str, limit_s: float, done: threading.Event) -> None:
    started = time.monotonic()
    while not done.wait(PROGRESS_EVERY_S):
        waited = time.monotonic() - started
        logger.info("waiting for %s: %.0f s of at most %.0f s", what, waited, limit_s)
