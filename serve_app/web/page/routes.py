"""`GET /`: a page for people. Static files, and the few questions that the page asks beside /v1.

The files lie beside this module and need no build. They load nothing from other hosts but pictures,
and those only from where the configuration says.
"""

from functools import cache
from importlib import resources

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, TypeAdapter

from serve_app.page.schemas import ItemsQuestion, Question, Shown, StartQuestion, UserQuestion
from serve_app.schemas import Refusal
from serve_app.web.bodies import BodyRoute
from serve_app.web.errors import refused
from serve_app.web.replica import Replica, RunningReplica

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
    "/page/script.js": ("script.js", "text/javascript; charset=utf-8"),
    "/page/server.js": ("server.js", "text/javascript; charset=utf-8"),
    "/page/lists.js": ("lists.js", "text/javascript; charset=utf-8"),
    "/page/timeline.js": ("timeline.js", "text/javascript; charset=utf-8"),
    "/page/reasons.js": ("reasons.js", "text/javascript; charset=utf-8"),
    "/page/news.js": ("news.js", "text/javascript; charset=utf-8"),
    "/page/state.js": ("state.js", "text/javascript; charset=utf-8"),
    "/page/dom.js": ("dom.js", "text/javascript; charset=utf-8"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
}
FILE_PATHS = tuple(FILES)  # open to a browser that has no key yet: they say nothing of anybody
KEYS_MARK = "data-keys"  # of <html>: whether the page has to ask for an API key

ANSWERS: TypeAdapter[Shown] = TypeAdapter(Shown)

# The routes are the page's own and no part of the API's document.
router = APIRouter(include_in_schema=False, route_class=BodyRoute)


class PageSettings(BaseModel):
    """`serve.page*` as the ingress gets them."""

    picture_hosts: list[str] = []


@router.post("/page/start")
async def get_start(replica: RunningReplica) -> Response:
    """Users and items to begin with."""
    return await _ask(replica, StartQuestion())


@router.post("/page/user")
async def get_user(question: UserQuestion, replica: RunningReplica) -> Response:
    """What a user did lately."""
    return await _ask(replica, question)


@router.post("/page/items")
async def get_items(question: ItemsQuestion, replica: RunningReplica) -> Response:
    """Titles, pictures and popularity of items."""
    return await _ask(replica, question)


async def _ask(replica: Replica, question: Question) -> Response:
    answer = await replica.show(question)
    if isinstance(answer, Refusal):
        return refused([answer])
    return Response(ANSWERS.dump_json(answer), media_type="application/json")


def files_router(settings: PageSettings, *, needs_key: bool) -> APIRouter:
    """The page's files, with headers that keep other hosts out of it."""
    headers = {
        "Content-Security-Policy": _content_policy(settings.picture_hosts),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }

    async def get_file(http: Request) -> Response:
        name, media_type = FILES[http.url.path]
        content = _read_file(name)
        if name == "index.html" and needs_key:
            content = content.replace(b"<html ", f"<html {KEYS_MARK} ".encode(), 1)
        return Response(content, headers=headers, media_type=media_type)

    files = APIRouter(include_in_schema=False)
    for path in FILES:
        files.add_api_route(path, get_file, methods=["GET"])
    return files


def _content_policy(picture_hosts: list[str]) -> str:
    pictures = " ".join(["'self'", *picture_hosts])
    return (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        f"img-src {pictures}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


@cache
def _read_file(name: str) -> bytes:
    return resources.files("serve_app.web.page").joinpath(name).read_bytes()
