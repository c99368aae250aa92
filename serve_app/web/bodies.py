"""JSON bodies on their way to a route: read by `client_json`, counted, then checked by FastAPI."""

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute

from serve_app.client_json import BadJson, read_json
from serve_app.schemas import Refusal


@dataclass(frozen=True, slots=True)
class PartLimit:
    """How many parts a list of a body may have: `at most 100 users` in `requests`."""

    field: str
    most: int
    parts: str


class RefusedBody(HTTPException):
    """422 for a body that no schema needs to look at: FastAPI lets these exceptions alone pass
    while it reads a body.
    """

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(422)
        self.refusal = refusal


class BodyRequest(Request):
    """A request whose JSON is read by `read_json`, and held against the limits of its path."""

    async def json(self) -> Any:
        """The body's value.

        Raises:
            RefusedBody: an object of it names something twice, or too much, or a list is too long.
        """
        if not hasattr(self, "_value"):
            try:
                self._value = read_json(await self.body())
            except BadJson as error:
                raise RefusedBody(error.refusal) from None

            limits: Mapping[str, Sequence[PartLimit]] = self.app.state.part_limits
            refusal = find_too_many(self._value, limits.get(self.scope["path"], ()))
            if refusal is not None:
                raise RefusedBody(refusal)
        return self._value


def find_too_many(body: Any, limits: Sequence[PartLimit]) -> Refusal | None:
    """The first list of `body` with more parts than it may have.

    A schema would check each of them, in nine times what it takes to read their JSON.
    """
    if not isinstance(body, dict):
        return None

    for limit in limits:
        parts = body.get(limit.field)
        if isinstance(parts, list) and len(parts) > limit.most:
            rule = f"at most {limit.most} {limit.parts}"
            return Refusal.of(["body", limit.field], rule, len(parts))
    return None


class BodyRoute(APIRoute):
    """For `APIRouter(route_class=...)`: a route that is sent JSON."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own, over a `BodyRequest`."""
        handle = super().get_route_handler()

        async def handle_body(request: Request) -> Response:
            return await handle(BodyRequest(request.scope, request.receive))

        return handle_body
