"""Traces: spans of both rooms below the caller's, to a real OTLP receiver; nothing of it where it is off."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.worlds import World, clean_environment, make_world, until

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@dataclass(slots=True)
class Receiver:
    """Takes spans as an OpenTelemetry collector does. `spans` are by service name."""

    spans: dict[str, list[Span]] = field(default_factory=dict)
    server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        assert self.server is not None
        return f"http://127.0.0.1:{self.server.server_port}/v1/traces"

    def take(self, data: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
            (service,) = (each.value.string_value for each in resource.resource.attributes if each.key == "service.name")
            for scope in resource.scope_spans:
                self.spans.setdefault(service, []).extend(scope.spans)

    def named(self, service: str, name: str, trace: str = TRACE) -> list[Span]:
        return [span for span in self.spans.get(service, ()) if span.name == name and span.trace_id.hex() == trace]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            made.take(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  as http.server names it
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        made.server = server
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield made
        server.shutdown()
        thread.join(10)


@pytest.fixture
def world(tmp_path: Path, receiver: Receiver) -> Iterator[World]:
    world = make_world(tmp_path / "world")
    with world.config_file.open("a") as file:
        file.write(f"\ntelemetry: {{traces: '{receiver.url}'}}\n")
    try:
        world.start()
        yield world
    finally:
        world.kill()


def sign(world: World, **headers: str) -> requests.Response:
    with requests.Session() as http:
        http.trust_env = False
        http.cert, http.verify = str(world.svid("payments-api")), str(world.directory / "bundle.pem")
        body = {"algorithm": "ES256", "message": "eA=="}
        return http.post(f"{world.url}/v1/keys/orders/sign", json=body, headers=headers, timeout=20)


def test_spans_of_each_room_and_stage_hang_below_the_callers(world: World, receiver: Receiver) -> None:
    answer = sign(world, traceparent=f"00-{TRACE}-{PARENT}-01")
    assert answer.status_code == 200
    until(lambda: bool(receiver.named("keybroker-authority", "release") and receiver.named("keybroker-frontend", "answer")), 20)
    (request,) = receiver.named("keybroker-frontend", "request")
    (use,) = receiver.named("keybroker-authority", "use")
    assert request.parent_span_id.hex() == PARENT
    assert use.parent_span_id == request.span_id
    assert {each.key for each in use.attributes} == {"keybroker.key", "keybroker.algorithm"}
    for service, parent, stages in (
        ("keybroker-frontend", request, ["parse", "authority", "answer"]),
        ("keybroker-authority", use, ["decide", "record", "hsm", "check", "release"]),
    ):
        before = parent.start_time_unix_nano
        for stage in stages:
            (span,) = receiver.named(service, stage)
            assert span.parent_span_id == parent.span_id
            assert before - 1_000_000 <= span.start_time_unix_nano <= span.end_time_unix_nano <= parent.end_time_unix_nano + 1_000_000
            before = span.end_time_unix_nano
    intent = next(json.loads(leaf) for leaf in world.leaves() if b'"kind":"intent"' in leaf)
    assert intent["trace_id"] == TRACE
    assert world.stop() == 0


def test_request_without_a_trace_begins_one_and_it_is_on_record(world: World, receiver: Receiver) -> None:
    assert sign(world).status_code == 200
    intent = next(json.loads(leaf) for leaf in world.leaves() if b'"kind":"intent"' in leaf)
    assert len(intent["trace_id"]) == 32
    until(lambda: bool(receiver.named("keybroker-authority", "use", intent["trace_id"])), 20)


def test_caller_that_does_not_sample_is_not_traced(world: World, receiver: Receiver) -> None:
    assert sign(world, traceparent=f"00-{TRACE}-{PARENT}-00").status_code == 200
    assert sign(world).status_code == 200
    until(lambda: bool(receiver.spans.get("keybroker-authority")), 20)
    assert receiver.named("keybroker-authority", "use") == []


def test_broker_signs_while_nobody_takes_its_spans(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    with world.config_file.open("a") as file:
        file.write("\ntelemetry: {traces: 'http://127.0.0.1:9/v1/traces'}\n")
    try:
        world.start()
        assert sign(world).status_code == 200
        assert world.stop() == 0
    finally:
        world.kill()


@pytest.mark.parametrize("room", ["frontend", "authority"])
def test_opentelemetry_sdk_is_not_even_loaded_where_nothing_is_traced(room: str) -> None:
    code = f"import sys, keybroker.{room}.room; sys.exit('opentelemetry.sdk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=clean_environment()).returncode == 0
