"""`Tracer`: a span of OpenTelemetry for each request that generates, under vLLM's attribute names.

The packages are an extra and imported only if traces are asked for.
"""

from __future__ import annotations

from typing import Any

from nybble.core.errors import ConfigError
from nybble.server.record import RequestRecord

CLOSE_SECONDS = 3
"""How long the end of the server waits for a collector that does not answer."""


class Tracer:
    """
    Args:
        endpoint: where a collector takes OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces.
        exporter: in place of one for the endpoint, for tests.

    Raises:
        ConfigError: the packages are not installed.
    """

    def __init__(self, endpoint: str, exporter: Any = None) -> None:
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace import SpanKind
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

                exporter = OTLPSpanExporter(endpoint, timeout=CLOSE_SECONDS)
        except ImportError as error:
            raise ConfigError(
                f"--otlp-traces-endpoint needs OpenTelemetry ({error}): pip install 'nybble[otel]'"
            ) from None
        self._provider = TracerProvider(resource=Resource.create({"service.name": "nybble"}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("nybble")
        self._context_of = TraceContextTextMapPropagator().extract
        self._kind = SpanKind.SERVER

    def record(self, record: RequestRecord) -> None:
        """A `Sink`."""
        if record.job is None:
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in record.headers}
        begin = int(record.arrival * 1e9)
        span = self._tracer.start_span(
            "llm_request",
            context=self._context_of(headers),  # of the `traceparent`, if there is one
            kind=self._kind,
            start_time=begin,
            attributes=_attributes(record),
        )
        if record.status >= 500 or record.error is not None:
            from opentelemetry.trace import Status, StatusCode

            span.set_status(Status(StatusCode.ERROR, record.error))
        span.end(begin + int(record.seconds * 1e9))

    def close(self) -> None:
        """Send what is left. Blocks, for a few seconds at most."""
        self._provider.shutdown()


def _attributes(record: RequestRecord) -> dict[str, Any]:
    job = record.job
    assert job is not None
    params, usage = job.requests[0].params, job.usage()
    attributes = {
        "gen_ai.response.model": job.model,
        "gen_ai.request.id": job.response_id,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.n": params.n,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.usage.num_sequences": params.n * len(job.requests),
        "gen_ai.usage.prompt_tokens": usage.prompt_tokens,
        "gen_ai.usage.completion_tokens": usage.completion_tokens,
        "gen_ai.response.finish_reasons": sorted(job.finish_reasons),
        "gen_ai.latency.time_in_queue": job.queue_seconds,
        "gen_ai.latency.time_to_first_token": job.first_token_seconds,
        "gen_ai.latency.e2e": record.seconds,
        "http.request.method": record.method,
        "http.response.status_code": record.status,
        "url.path": record.path,
        "nybble.request_id": record.request_id,
    }
    return {name: value for name, value in attributes.items() if value is not None}
