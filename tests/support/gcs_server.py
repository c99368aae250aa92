"""A server that speaks as much of Google Cloud Storage as reading takes: objects listed, described
and read in ranges. Its buckets are folders of the disk.
"""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

ROOT = Path(__file__).parents[2]


class Storage:
    """Buckets below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def answer(self, request: Request) -> Response:
        # the raw path: an object's name has its slashes as %2F there
        path = request.environ["RAW_URI"].partition("?")[0]
        bucket, _, name = path.removeprefix("/storage/v1/b/").partition("/o")
        name = unquote(name.removeprefix("/"))

        if not name:
            return self._listed(bucket, request.args.get("prefix", ""))
        if not (self.folder / bucket / name).is_file():
            error = {"code": 404, "message": f"no object {name}"}
            return _as_json({"error": error}, status=404)
        if request.args.get("alt") == "media":
            return self._content(bucket, name, request)
        return _as_json(self._metadata(bucket, name))

    def _listed(self, bucket: str, prefix: str) -> Response:
        found = []
        for file in sorted((self.folder / bucket).rglob("*")):
            name = str(file.relative_to(self.folder / bucket))
            if file.is_file() and name.startswith(prefix):
                found.append(self._metadata(bucket, name))
        return _as_json({"kind": "storage#objects", "items": found})

    def _metadata(self, bucket: str, name: str) -> dict[str, Any]:
        stat = (self.folder / bucket / name).stat()
        changed = datetime.fromtimestamp(stat.st_mtime, UTC).isoformat()
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(stat.st_size),
            "generation": "1",
            "updated": changed.replace("+00:00", "Z"),
        }

    def _content(self, bucket: str, name: str, request: Request) -> Response:
        response = Response((self.folder / bucket / name).read_bytes())
        size = response.content_length
        return response.make_conditional(request, accept_ranges=True, complete_length=size)


def _as_json(content: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(content), status, content_type="application/json")


@contextmanager
def gcs_storage(folder: Path) -> Iterator[str]:
    """The address of a server of these buckets.

    A process of its own: pyarrow keeps the interpreter to itself while it opens an object.
    """
    command = [sys.executable, "-m", "tests.support.gcs_server", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.kill()


def main() -> None:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs every request
    storage = Storage(Path(sys.argv[1]))
    server = make_server("127.0.0.1", 0, Request.application(storage.answer), threaded=True)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
