"""An S3 server in the tests' own process (moto), which can be made busy, or slow for some of those
who ask.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from pyarrow import fs
from werkzeug.serving import make_server

SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request "
    b"rate.</Message></Error>"
)


class Bucket:
    """The bucket `logs`; `upload` copies a folder into it."""

    def __init__(self) -> None:
        self.application = DomainDispatcherApplication(create_backend_app)
        self.endpoint = ""
        # method -> how many of the next requests are answered 503
        self.refuse: Counter[str] = Counter()
        self.hold: str | None = None  # requests made with this access key wait for `release`
        self.held, self.release = threading.Event(), threading.Event()

    @property
    def options(self) -> str:
        return f"?endpoint_override={self.endpoint}&region=us-east-1"

    def upload(self, folder: Path, prefix: str) -> str:
        fs.copy_files(str(folder), f"logs/{prefix}", destination_filesystem=self._store())
        return f"s3://logs/{prefix}{self.options}"

    def _store(self) -> fs.S3FileSystem:
        return fs.S3FileSystem(
            region="us-east-1", endpoint_override=self.endpoint, allow_bucket_creation=True
        )

    def answer(self, request: dict, start: Callable) -> Iterable[bytes]:
        if self.refuse[request["REQUEST_METHOD"]] > 0:
            self.refuse[request["REQUEST_METHOD"]] -= 1
            start(
                "503 Slow Down",
                [("Content-Type", "application/xml"), ("Content-Length", str(len(SLOW_DOWN)))],
            )
            return [SLOW_DOWN]
        if self.hold and f"Credential={self.hold}/" in request.get("HTTP_AUTHORIZATION", ""):
            self.held.set()
            self.release.wait(120)
        return self.application(request, start)


@contextmanager
def s3_bucket() -> Iterator[Bucket]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs every request
    bucket = Bucket()
    server = make_server("127.0.0.1", 0, bucket.answer, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    bucket.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        bucket._store().create_dir("logs")
        yield bucket
    finally:
        bucket.release.set()
        server.shutdown()
        thread.join()
        server.server_close()
