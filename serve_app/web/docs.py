"""`/docs`: the OpenAPI document as a page to try requests out, from this server alone."""

from functools import cache
from importlib import resources

from fastapi import APIRouter, Response

# nothing from another host, whatever the page says
ALLOWED = (
    "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)

open_router = APIRouter()  # the page asks for a key where one is needed


@open_router.get("/docs", include_in_schema=False)
async def get_docs() -> Response:
    """The page; it reads `/openapi.json`."""
    headers = {"Content-Security-Policy": ALLOWED}
    return Response(_read_page(), headers=headers, media_type="text/html")


@cache
def _read_page() -> str:
    return resources.files("serve_app.web").joinpath("docs.html").read_text()
