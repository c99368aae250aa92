"""JSON bodies on their way to a route: read by `client_json`, then checked by FastAPI."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute

from serve_app.client_json import BadJson, read_json
from serve_app.schemas import Refusal


class RefusedBody(HTTPException):
    """422 for a body that no schema needs to look at: FastAPI lets these exceptions alone pass
    while it reads a body.
    """

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(422)
        self.refusal = refusal


class BodyRequest(Request):
    """A request whose JSON is read by `read_json`."""

    async def json(self) -> Any:
        """The body's value.

        Raises:
            RefusedBody: an object of it names something twice, or too much.
        """
        if not hasattr(self, "_value"):
            try:
                self._value = read_json(await self.body())
            except BadJson as error:
                raise RefusedBody(error.refusal) from None
        return self._value


class BodyRoute(APIRoute):
    """For `APIRouter(route_class=...)`: a route that is sent JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own, over a `BodyRequest`."""
        handle = super().get_route_handler()

        async def handle_body(request: Request) -> Response:
            return await handle(BodyRequest(request.scope, request.receive))

        return handle_body
