"""Limits and hours of a broker as a user has it: many connections, kill -9, a flood beside an honest caller, and a clock that is set."""

from __future__ import annotations

import bisect
import contextlib
import json
import multiprocessing
import os
import sqlite3
import statistics
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from keybroker.client import Client
from keybroker.clock import SystemClock, from_rfc3339, to_rfc3339
from keybroker.errors import ClockUntrustedError, DeniedError, KeyBrokerError, RateLimitedError
from tests.worlds import World, kill, make_world, served, until

MAX, WINDOW_S = 25, 3
PROCESSES, KILLS = 3, 4
NOISE = 0.05  # seconds; other tests run beside this one
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
SLEEP_SHIM = Path(__file__).parents[1] / "faketime_sleep.c"


def write_grant(world: World, text: str, name: str = "payments", workload: str = "payments/api") -> None:
    """Put a grant file in place, and wait until it is live."""
    before = sum(b'"change":"policy"' in leaf for leaf in world.leaves())
    draft = world.directory / f"{name}.new"
    draft.write_text(
        f"grants:\n  - id: {name}\n    workloads: [spiffe://example.org/{workload}]\n    keys: [orders]\n"
        f"    operations: [sign]\n    algorithms: [ES256]\n{text}"
    )
    for file in (world.directory / "grants").glob("*.yaml"):
        if file.stem not in {"payments", "flooder", "free"}:
            file.unlink()  # the grants of the development world
    draft.rename(world.directory / "grants" / f"{name}.yaml")
    until(lambda: sum(b'"change":"policy"' in leaf for leaf in world.leaves()) > before, what="the grant is not live")


def intent_times(world: World) -> list[int]:
    """When intents with units of a limit were recorded, microseconds since the epoch."""
    records = [json.loads(leaf) for leaf in world.leaves() if b'"kind":"intent"' in leaf]
    return [from_rfc3339(record["time"]) for record in records if record["taken"]]


def most_in_a_window(times: list[int], window_us: int) -> int:
    """The most in any window of that length; times in order."""
    return max(bisect.bisect_left(times, first + window_us) - index for index, first in enumerate(times))


@pytest.fixture(scope="module")
def limited_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with served(tmp_path_factory.mktemp("limited") / "world") as world:
        yield world
        assert "Traceback" not in world.log.read_text()


def sign_until(end: Path, url: str, svid: Path, bundle: Path) -> int:
    """A caller that asks with hardly a pause until there is a file; how many signatures it got."""
    done = 0
    while not end.exists():
        with contextlib.suppress(KeyBrokerError), Client(url, svid=svid, bundle=bundle, timeout_s=5) as broker:
            while not end.exists():
                try:
                    broker.sign("orders", "ES256", message=b"x")
                    done += 1
                except RateLimitedError:
                    time.sleep(0.02)
    return done


def is_answering(world: World) -> bool:
    try:
        with world.client() as broker:
            broker.sign("orders", "ES256", message=b"x")
    except RateLimitedError:
        return True
    except KeyBrokerError:
        return False
    return True


@pytest.mark.case(37)
def test_limit_holds_in_every_window_over_many_processes_and_kills_of_the_broker(limited_world: World, tmp_path: Path) -> None:
    world = limited_world
    write_grant(world, f"    limits: [{{max: {MAX}, window: {WINDOW_S}s, per: key}}]\n")
    end = tmp_path / "end"
    arguments = (end, world.url, world.svid("payments-api"), world.directory / "bundle.pem")
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as processes:
        asked = processes.starmap_async(sign_until, [arguments] * PROCESSES)
        for _ in range(KILLS):
            seen = len(intent_times(world))
            until(lambda: len(intent_times(world)) > seen + 5, 60, "the broker does not sign")  # noqa: B023  called at once
            kill(world.rooms()["authority"])
        until(lambda: len(intent_times(world)) > KILLS * 6 + MAX, 60)
        end.touch()
        signed = sum(asked.get(60))
    until(lambda: is_answering(world), 60, "the broker did not come back")
    times = intent_times(world)
    assert most_in_a_window(times, WINDOW_S * 1_000_000 - 20_000) <= MAX  # two clocks are compared: those of the record and the uptime
    assert MAX < signed <= len(times)


def test_caller_beyond_a_limit_is_told_how_long_to_wait_and_explain_says_what_is_left(limited_world: World) -> None:
    world = limited_world
    write_grant(world, "    limits: [{max: 2, window: 1h, per: workload}]\n")
    with world.client() as broker:
        assert broker.explain("orders", "ES256", message=b"x").limits[0].left == 2
        for _ in range(2):
            broker.sign("orders", "ES256", message=b"x")
        explained = broker.explain("orders", "ES256", message=b"x")
        assert (explained.allow, explained.reasons, explained.limits[0].left) == (False, ("limit:payments",), 0)
        with pytest.raises(RateLimitedError) as caught:
            broker.sign("orders", "ES256", message=b"x")
        assert 3590 < caught.value.retry_after <= 3601
    file = world.directory / "data"
    file.write_bytes(b"x")
    done = world.run("sign", "--key", "orders", "--alg", "ES256", str(file))
    assert done.returncode == 5
    assert b"there is a unit again in 3" in done.stderr


def seconds_of(broker: Client, count: int = 60) -> float:
    """The slowest but one of some signatures."""
    took = []
    for _ in range(count):
        began = time.monotonic()
        broker.sign("orders", "ES256", message=b"x")
        took.append(time.monotonic() - began)
    return statistics.quantiles(took, n=50)[-1]


def flood(url: str, svid: str, bundle: str, seconds: float) -> int:
    """Ask without pause, and be refused; how often."""
    refused, deadline = 0, time.monotonic() + seconds
    with Client(url, svid=Path(svid), bundle=Path(bundle), timeout_s=5) as broker:
        while time.monotonic() < deadline:
            try:
                broker.sign("orders", "ES256", message=b"x")
            except RateLimitedError:
                refused += 1
    return refused


@pytest.mark.case(77)
def test_workload_that_floods_into_its_limit_leaves_another_unharmed(limited_world: World) -> None:
    world = limited_world
    write_grant(world, "")
    write_grant(world, "    limits: [{max: 3, window: 1h, per: workload}]\n", "flooder", "ci/release")
    with world.client() as broker:
        calm = min(seconds_of(broker) for _ in range(3))
        arguments = (world.url, str(world.svid("ci-release")), str(world.directory / "bundle.pem"), 10.0)
        with multiprocessing.get_context("spawn").Pool(2) as processes:
            floods = processes.starmap_async(flood, [arguments] * 2)
            until(lambda: sum(b'"rate-limited"' in leaf for leaf in world.leaves()) > 5, 30, "no flood")
            took = [seconds_of(broker) for _ in range(3)]
            refused = sum(floods.get(60))
    assert refused > 100
    assert min(took) < 2 * calm + NOISE


@pytest.mark.case(40)
def test_nothing_is_signed_after_a_grant_has_ended(limited_world: World) -> None:
    world = limited_world
    closes_us = (time.time_ns() // 1_000_000_000 + 3) * 1_000_000
    before = len(world.leaves())
    write_grant(world, f"    not_after: {to_rfc3339(closes_us)[:19]}Z\n")
    with ThreadPoolExecutor(4) as pool:
        done = sum(pool.map(lambda _: sign_to_the_end(world), range(4)))
    assert done > 0
    records = [json.loads(leaf) for leaf in world.leaves()[before:]]
    intents = [from_rfc3339(record["time"]) for record in records if record["kind"] == "intent"]
    signed = [from_rfc3339(record["time"]) for record in records if record["outcome"] == "signed"]
    assert len(signed) == done
    assert max(intents) < closes_us
    assert max(signed) < closes_us + NOISE * 1_000_000  # made and checked before, and on record a moment later


def sign_to_the_end(world: World) -> int:
    """Sign until the grant has ended; how often that was."""
    with world.client() as broker:
        done, deadline = 0, time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                broker.sign("orders", "ES256", message=b"x")
                done += 1
            except DeniedError:
                return done
    raise AssertionError("the grant did not end")


# The clock, set by libfaketime; the uptime of the host is left alone, as it is by whoever sets a real clock.


@pytest.fixture
def faked_world(tmp_path: Path) -> Iterator[World]:
    shim = tmp_path / "sleep.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(shim), str(SLEEP_SHIM)], check=True, timeout=60)
    world = make_world(tmp_path / "world")
    world.state.mkdir(mode=0o700, exist_ok=True)
    settings = {
        "LD_PRELOAD": f"{shim}:{FAKETIME}",
        "FAKETIME_TIMESTAMP_FILE": str(world.state / "faketime"),  # where the authority may read
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_DONT_RESET": "1",
    }
    world.before = ["env", *(f"{name}={value}" for name, value in settings.items())]
    set_clock(world, "+0")
    try:
        yield world
    finally:
        world.kill()


def set_clock(world: World, offset: str) -> None:
    draft = world.state / "faketime.new"
    draft.write_text(f"{offset}\n")
    draft.rename(world.state / "faketime")


def shown(world: World) -> dict[str, object]:
    done = world.run("clock", "show", "--state", str(world.state), "--json")
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


@pytest.mark.case(39)
@pytest.mark.case(40)
def test_real_broker_whose_clock_is_set_refuses_what_depends_on_time_until_its_operator_looks(faked_world: World) -> None:
    world = faked_world
    world.start()
    write_grant(world, "    limits: [{max: 2, window: 1h, per: workload}]\n")
    write_grant(world, "", "free", "ci/release")
    with world.client() as broker, world.client("ci-release") as free:
        for _ in range(2):
            broker.sign("orders", "ES256", message=b"x")
        assert shown(world)["trusted"]
        for offset, saw in (("+1d", "forward by 86"), ("-30", "back by ")):
            set_clock(world, offset)
            with pytest.raises(ClockUntrustedError):
                broker.sign("orders", "ES256", message=b"x")
            free.sign("orders", "ES256", message=b"x")
            until(lambda: not shown(world)["trusted"], 20)
            assert saw in str(shown(world)["saw"])
            set_clock(world, "+0")
            with pytest.raises(ClockUntrustedError):
                broker.sign("orders", "ES256", message=b"x")
            done = world.run("clock", "acknowledge", "--state", str(world.state), "--yes")
            assert done.returncode == 0, done.stderr
            assert shown(world)["trusted"]
            with pytest.raises(RateLimitedError):  # nothing was refilled
                broker.sign("orders", "ES256", message=b"x")
    assert world.stop() == 0
    with contextlib.closing(sqlite3.connect(world.state / "keybroker.db")) as db:
        assert db.execute("SELECT boot FROM clock").fetchone()[0] == SystemClock().boot() != ""  # the walls let it be read
    records = [json.loads(leaf) for leaf in world.leaves()]
    events = [record["body"]["event"] for record in records if record["kind"] == "security"]
    changes = [record["body"] for record in records if record["kind"] == "admin" and record["body"]["change"] == "clock-acknowledged"]
    assert events.count("clock-untrusted") == 2
    assert [body["uid"] for body in changes] == [str(os.getuid())] * 2
