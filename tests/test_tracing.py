"""OpenTelemetry's trace context through the server."""

import json
import logging
import sys

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from pipeline.config import ConfigError, ServeConfig, UserError
from serve_app.web.api import make_api
from serve_app.web.settings import ApiLimits
from serve_app.web.tracing import TraceContext, make_tracer
from tests.worlds.web import RANK, Fixed, call

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def api(spans: InMemorySpanExporter):
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return make_api(Fixed(), ApiLimits(max_body_bytes=100_000), tracer=provider.get_tracer("test"))


def test_a_trace_goes_on_in_answer_log_and_span(api, spans, caplog):
    caplog.set_level(logging.INFO, "ray.serve.requests")
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "shop=1"}
    answer = call(api, "POST", "/v1/rank", json=RANK, headers=headers)
    _, trace, own, flags = answer.headers["traceparent"].split("-")
    assert (trace, flags) == (TRACE, "01")
    assert own != PARENT
    assert answer.headers["tracestate"] == "shop=1"
    assert json.loads(caplog.messages[-1])["trace_id"] == TRACE

    (span,) = spans.get_finished_spans()
    assert span.name == "POST /v1/rank"
    assert f"{span.context.span_id:016x}" == own
    assert f"{span.parent.span_id:016x}" == PARENT
    assert span.attributes["http.response.status_code"] == 200


@pytest.mark.parametrize("given", [None, "nonsense", f"00-{'0' * 32}-{PARENT}-01"])
def test_without_a_trace_one_begins(api, spans, given):
    headers = {} if given is None else {"traceparent": given}
    traces = set()
    for path in ("/v1/rank", "/nowhere"):
        answer = call(api, "POST", path, json=RANK, headers=headers)
        traces.add(answer.headers["traceparent"].split("-")[1])
    assert len(traces) == 2
    assert "0" * 32 not in traces
    assert [span.name for span in spans.get_finished_spans()] == ["POST /v1/rank", "POST"]


def test_what_is_not_sampled_is_passed_on_and_not_kept(api, spans):
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    answer = call(api, "GET", "/healthz", headers=headers)
    assert answer.headers["traceparent"].startswith(f"00-{TRACE}-")
    assert answer.headers["traceparent"].endswith("-00")
    assert spans.get_finished_spans() == ()


def test_off_it_is_not_there():
    off = make_api(Fixed(), ApiLimits(max_body_bytes=100_000))
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    answer = call(off, "POST", "/v1/rank", json=RANK, headers=headers)
    assert "traceparent" not in answer.headers
    assert TraceContext not in [layer.cls for layer in off.user_middleware]


def test_settings_and_packages(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"serve\.otlp_endpoint.*null without"):
        ServeConfig(otlp_endpoint="http://127.0.0.1:4318/v1/traces")
    with pytest.raises(ConfigError, match=r"serve\.otlp_endpoint") as refused:
        ServeConfig(trace_context=True, otlp_endpoint="http://me:secret@host/v1/traces")
    assert "secret" not in str(refused.value)

    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(UserError, match=r"pip install '\.\[otel\]'"):
        make_tracer(None)
