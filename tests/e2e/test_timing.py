"""What an answer's time tells a stranger: not whether a key exists."""

from __future__ import annotations

import http.client
import ssl
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.worlds import World

REQUESTS = 2_000
ATTEMPTS = 4
BODY = b'{"algorithm": "ES256", "message": "YW4gb3JkZXI="}'


@contextmanager
def connection(world: World) -> Iterator[http.client.HTTPSConnection]:
    """One connection of payments-api."""
    context = ssl.create_default_context(cafile=world.directory / "bundle.pem")
    context.load_cert_chain(world.svid("payments-api"))
    host, _, port = world.url.removeprefix("https://").partition(":")
    http_connection = http.client.HTTPSConnection(host, int(port), timeout=30, context=context)
    try:
        yield http_connection
    finally:
        http_connection.close()


def seconds_of(asking: http.client.HTTPSConnection, key: str) -> float:
    """From the request to the whole answer."""
    started = time.perf_counter()
    asking.request("POST", f"/v1/keys/{key}/sign", BODY, {"Content-Type": "application/json"})
    answer = asking.getresponse()
    answer.read()
    took = time.perf_counter() - started
    assert answer.status == (200 if key == "orders" else 404)
    return took


def ratio_of_medians(asking: http.client.HTTPSConnection, one: str, other: str, requests: int = REQUESTS) -> float:
    """How many times as long the one takes as the other: asked in turn, as one-other-other-one, so that noise and order hit both alike."""
    took: dict[str, list[float]] = {one: [], other: []}
    for _ in range(requests // 4):
        for key in (one, other, other, one):
            took[key].append(seconds_of(asking, key))
    return statistics.median(took[one]) / statistics.median(took[other])


@pytest.mark.case(18)
def test_unknown_key_and_key_of_another_workload_take_the_same_time(world: World) -> None:
    # `release` is there, and nothing of it is granted to payments-api. A noisy host may spoil a round; a difference spoils all of them.
    ratios: list[float] = []
    with connection(world) as asking:
        for key in ("release", "nothing") * 20:
            seconds_of(asking, key)
        for _ in range(ATTEMPTS):
            ratios.append(ratio_of_medians(asking, "nothing", "release"))
            if abs(statistics.median(ratios) - 1) <= 0.05:
                return
    pytest.fail(f"an unknown key takes {', '.join(f'{ratio:.3f}' for ratio in ratios)} times as long as another's")


def test_clock_of_this_test_sees_a_difference_where_there_is_one(world: World) -> None:
    with connection(world) as asking:
        assert ratio_of_medians(asking, "orders", "release", requests=200) > 1.2  # a signature takes two commits and a token
