"""Histories are looked up beside the thread that ranks: a few at a time, and none for ever.

request → Lookups (event store) → TokenBatcher (features, one forward pass) → answer
"""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from serve_app.ranking.rollout import ReceivedRequest

THREADS = 8  # a store that hangs holds some of them; the rest go on


class Lookups:
    """Fills in the history of a request.

    A look-up that is not back after `serve.lookup_timeout_s` is not waited for any longer: the
    request goes on with what is published of its user, and says so.
    """

    def __init__(self, threads: int = THREADS) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="lookup")

    async def __call__(self, received: ReceivedRequest) -> ReceivedRequest:
        # no thread where nothing may have to wait: a request with a history of its own
        if not received.must_look_up():
            received.asks_store = False
            return received

        asked = time.monotonic()
        looking = asyncio.get_running_loop().run_in_executor(self._pool, received.look_up)
        try:
            async with asyncio.timeout(received.ranker.limits.lookup_timeout_s):
                received.found = await looking
        except TimeoutError:
            received.found = received.give_up(asked)
        return received
