"""What the frontend counts."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from keybroker.frontend.metrics import FrontendMetrics
from keybroker.tracing import Laps


def samples(metrics: FrontendMetrics) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(metrics.text().decode())
    return {(each.name, *each.labels.values()): each.value for family in families for each in family.samples}


def test_answers_are_counted_by_route_and_status() -> None:
    metrics = FrontendMetrics()
    for _ in range(3):
        metrics.answered("/v1/whoami", 200)
    metrics.answered("/v1/whoami", 503)
    metrics.answered("none", 404)
    seen = samples(metrics)
    assert seen["keybroker_requests_total", "/v1/whoami", "200"] == 3
    assert seen["keybroker_requests_total", "/v1/whoami", "503"] == 1
    assert seen["keybroker_requests_total", "none", "404"] == 1


def test_handshakes_and_connections_are_counted() -> None:
    metrics = FrontendMetrics()
    metrics.handshake("ok")
    metrics.handshake("ok")
    metrics.connections.set(7)
    seen = samples(metrics)
    assert seen["keybroker_handshakes_total", "ok"] == 2
    assert seen["keybroker_connections",] == 7


def test_signature_is_timed_as_a_whole_and_by_how_long_it_took_to_parse() -> None:
    metrics = FrontendMetrics()
    laps = Laps()
    laps.lap("parse")
    laps.lap("authority")
    metrics.signed(laps)
    seen = samples(metrics)
    assert seen["keybroker_sign_seconds_count", "parse"] == 1
    assert seen["keybroker_request_seconds_count",] == 1
    assert 0 <= seen["keybroker_sign_seconds_sum", "parse"] <= seen["keybroker_request_seconds_sum",] < 60


def test_two_registries_do_not_see_each_other() -> None:
    first, second = FrontendMetrics(), FrontendMetrics()
    first.handshake("ok")
    assert ("keybroker_handshakes_total", "ok") not in samples(second)


def test_process_is_described() -> None:
    assert any(name[0].startswith("keybroker_frontend_process_") for name in samples(FrontendMetrics()))
