"""A headless Chromium and a server that it can open, both for one test module."""

import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn
from fastapi import FastAPI
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.support.patience import wait_until

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE_MS = 60_000  # a busy machine is no failure


def find_chromium() -> str:
    """Where Chromium is; a test without one is skipped, and fails in CI."""
    for name in NAMES:
        path = shutil.which(name)
        if path is not None:
            return path
    assert not os.environ.get("CI"), "Chromium is not installed: apt-get install chromium"
    pytest.skip("Chromium is not installed")


@contextmanager
def running_browser() -> Iterator[Browser]:
    path = find_chromium()
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        # root has no sandbox; the page comes from this process
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def listening(api: FastAPI) -> Iterator[str]:
    """The address of `api`, which answers in a thread of this process."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(api, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        wait_until(lambda: server.started, "the server to listen")
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


class Visit:
    """A page that somebody looks at: what went wrong in it, and what it asked for."""

    def __init__(self, browser: Browser, width: int = 1280, scheme: str = "light") -> None:
        self.page: Page = browser.new_page(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if scheme == "dark" else "light",
            reduced_motion="reduce",
        )
        self.page.set_default_timeout(PATIENCE_MS)
        self.errors: list[str] = []
        self.requests: list[tuple[str, dict]] = []  # path and body of what was posted
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._note_message)
        self.page.on("request", self._note_request)

    def _note_message(self, message) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def _note_request(self, request) -> None:
        if request.method == "POST":
            path = "/" + request.url.split("/", 3)[3]
            self.requests.append((path, request.post_data_json))

    def posted(self, path: str) -> list[dict]:
        """The bodies that were sent to this path, in their order."""
        return [body for sent, body in self.requests if sent == path]

    def close(self) -> None:
        self.page.close()
        assert self.errors == []
