"""When an event store that does not answer is asked again."""

import logging
import time
from collections.abc import Callable

from serve_app.schemas import StoreDown

logger = logging.getLogger("ray.serve")


class StoreOutage:
    """An event store that did not answer is left alone for a while.

    A look-up may take seconds to fail. The pause is `PAUSES` times as long as that, and after it
    one look-up goes ahead of the others, so that few requests wait for a store that hangs.

        asked     x . . . . . x . . . . . x
        answered  no          no          yes: from here on every time

    Look-ups of several threads share it. Each change is one assignment; a race between two costs
    one look-up more.
    """

    PAUSES = 10
    SHORTEST_S = 1.0
    PROBE_S = 30.0  # until a look-up that went ahead counts as lost

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.is_on = False
        self._clock = clock
        self._ask_again = 0.0

    @property
    def may_ask(self) -> bool:
        return not self.is_on or self._clock() >= self._ask_again

    def begin_asking(self) -> bool:
        """Tell whether to ask now; during an outage no other look-up may until this one ends."""
        if not self.may_ask:
            return False
        if self.is_on:
            self._ask_again = self._clock() + self.PROBE_S
        return True

    def begin(self, asked: float, error: StoreDown) -> None:
        """Note a look-up that failed; `asked` is when it began."""
        now = self._clock()
        self._ask_again = now + max(self.SHORTEST_S, self.PAUSES * (now - asked))
        if not self.is_on:
            logger.error("ranking without live events: the event store does not answer: %s", error)
        self.is_on = True

    def end(self) -> None:
        """Note a look-up that succeeded."""
        if self.is_on:
            logger.info("the event store answers again")
        self.is_on = False
