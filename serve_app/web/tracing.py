"""OpenTelemetry: a request's W3C trace goes on in the answer's header, the log and a span.

Nothing of it is imported, and no layer is there, unless `serve.trace_context` asks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.config import UserError
from pipeline.version import package_version

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

SERVICE = "ranking"
CARRIED = ("traceparent", "tracestate")  # headers


def make_tracer(endpoint: str | None) -> Tracer:
    """A tracer whose spans go to the collector at `endpoint`; None: they are not kept.

    Raises:
        UserError: the packages are not installed.
    """
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = Resource.create({"service.name": SERVICE, "service.version": package_version()})
        provider = TracerProvider(resource=resource)
        if endpoint is not None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    except ModuleNotFoundError as error:
        raise UserError(
            f"serve.trace_context: {error.name} is not installed: pip install '.[otel]'"
        ) from None
    return provider.get_tracer("serve_app")


class TraceContext:
    """The trace of each request: the client's where it names one, else a new one.

    A client's trace that is not sampled stays so: it is passed on, and no span is kept.
    """

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.app = app
        self.tracer = tracer
        self.propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        from opentelemetry.trace import SpanKind, format_trace_id, set_span_in_context

        parent = self.propagator.extract(_carried_headers(scope))
        span = self.tracer.start_span(scope["method"], parent, SpanKind.SERVER)
        trace_id = format_trace_id(span.get_span_context().trace_id)
        scope.setdefault("state", {})["trace_id"] = trace_id  # for the request log

        own: dict[str, str] = {}
        self.propagator.inject(own, set_span_in_context(span))
        added = [(name.encode(), value.encode()) for name, value in own.items()]

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                message = {**message, "headers": [*message.get("headers", ()), *added]}
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        finally:
            self._end(span, scope)

    def _end(self, span, scope: Scope) -> None:
        """Name the span by its route: paths of clients' making would be names without end."""
        span.set_attribute("http.request.method", scope["method"])
        route = getattr(scope.get("route"), "path", None)
        if route is not None:
            span.set_attribute("http.route", route)
            span.update_name(f"{scope['method']} {route}")
        span.end()


def _carried_headers(scope: Scope) -> dict[str, str]:
    found = {}
    for name, value in scope["headers"]:
        if name.decode("latin-1") in CARRIED:
            found[name.decode("latin-1")] = value.decode("latin-1")
    return found
