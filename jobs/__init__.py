"""Entry points: `python -m jobs.NAME --config configs/….yaml`."""

import sys
from types import TracebackType


def _tell_interrupt(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """One line for Ctrl-C while a job imports what it needs, before `cli.one_message` is there."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped by Ctrl-C", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _tell_interrupt
