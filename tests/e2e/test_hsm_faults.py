"""Tokens that fail, hang, lie or go away under a served broker: what callers get, what is on record, and who goes on being served."""

from __future__ import annotations

import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from keybroker.hsm.room import BACKOFF_SECONDS
from keybroker.model.key import Algorithm
from tests.bad_keys import BAD_KEYS, add_bad_keys
from tests.hsm_worlds import Answer, Asker, ShimmedWorld, TokenPlan, make_shimmed_world, serving, serving_apart
from tests.worlds import kill, until

LIES = ("flip", "zero", "short", "long", "nothing")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShimmedWorld]:
    """Tokens of their own for tests that leave one out of service for a while; the others are whole again after each test."""
    tokens = {
        "pair": TokenPlan({"pair": Algorithm.ES256}, workers=2, deadline_ms=700),
        "lone": TokenPlan({"lone": Algorithm.ES256}, deadline_ms=700),
        "slow": TokenPlan({"slow": Algorithm.ES256}, authority_deadline_ms=300),
        **{f"lie-{lie}": TokenPlan({f"lie-{lie}": Algorithm.ES256}) for lie in LIES},
    }
    with serving(make_shimmed_world(tmp_path_factory.mktemp("hsm") / "world", tokens)) as world:
        yield world
        assert sum(shim.calls("forked") for shim in world.shims.values()) == 0


@pytest.fixture
def asker(world: ShimmedWorld) -> Iterator[Asker]:
    with Asker(world) as asker:
        yield asker
    for token in ("pair", "lone", "slow"):
        world.shims[token].clear()
    os.kill(world.room, signal.SIGHUP)  # an operator has looked: no pause before the next attempt
    until(lambda: all(map(world.is_served, ("pair", "lone", "slow"))), 15, "a token did not come back")


def ask_together(world: ShimmedWorld, key: str, messages: list[bytes]) -> list[Answer]:
    """Each message on a connection of its own, all at the same time."""
    start = threading.Barrier(len(messages))

    def one(message: bytes) -> Answer:
        with Asker(world) as asker:
            asker.connect()
            start.wait(20)
            return asker.sign(key, message)

    with ThreadPoolExecutor(len(messages)) as pool:
        return list(pool.map(one, messages))


@pytest.mark.case(43)
@pytest.mark.parametrize("code", [0xB3, 0x82, 0x101, 0xB0])
def test_lost_session_is_retried_once_on_another_under_the_same_intent(world: ShimmedWorld, asker: Asker, code: int) -> None:
    until(lambda: world.is_served("pair"), 15)
    message = f"lost {code:#x}".encode()
    world.shims["pair"].order(f"C_Sign before {code:#x} 1")
    assert asker.sign("pair", message).status == 200
    assert world.outcomes_of(message) == [("signed", "")]
    assert world.is_served("pair", 1)


@pytest.mark.case(43)
def test_session_lost_on_every_worker_is_a_failed_use(world: ShimmedWorld, asker: Asker) -> None:
    calls = world.shims["pair"].calls("C_SignInit")
    world.shims["pair"].order("C_SignInit before 0xb3 -1")
    answer = asker.sign("pair", b"lost everywhere")
    assert (answer.status, answer.code) == (503, "hsm-unavailable")
    assert world.outcomes_of(b"lost everywhere") == [("failed", "CKR_SESSION_HANDLE_INVALID")]
    assert world.shims["pair"].calls("C_SignInit") == calls + 2


@pytest.mark.case(44)
@pytest.mark.parametrize("code", [0x30, 0x32, 0xE0])
def test_absent_token_is_refused_at_once_while_others_serve_and_is_back_soon_after_it_returns(
    world: ShimmedWorld, asker: Asker, code: int
) -> None:
    shim = world.shims["lone"]
    shim.order(f"C_Sign before {code:#x} 1", f"C_GetTokenInfo before {code:#x} -1")
    assert asker.sign("lone", f"going {code:#x}".encode()).status == 503
    starts, began = shim.calls("C_Initialize"), time.monotonic()
    took: list[float] = []
    while time.monotonic() - began < 1.5:
        sent = time.monotonic()
        answer = asker.sign("lone", b"is anybody there?")
        took.append(time.monotonic() - sent)
        assert (answer.status, answer.code, answer.retry_after) == (503, "hsm-unavailable", 1)
        assert asker.signs("orders")
        time.sleep(0.02)
    assert statistics.median(took) < 0.3, "a refusal does not wait for the token"
    assert shim.calls("C_Initialize") - starts <= len(BACKOFF_SECONDS)
    assert world.outcomes_of(b"is anybody there?") == []
    assert "0 of 1 sessions in service" in world.part("token lone")
    shim.clear()
    assert until(lambda: asker.signs("lone"), 15) < 10


@pytest.mark.case(45)
@pytest.mark.parametrize(("code", "name"), [(0xA0, "CKR_PIN_INCORRECT"), (0xA3, "CKR_PIN_EXPIRED"), (0xA4, "CKR_PIN_LOCKED")])
def test_refused_pin_is_tried_once_and_the_operator_sees_it(world: ShimmedWorld, asker: Asker, code: int, name: str) -> None:
    shim = world.shims["pair"]
    logins = shim.calls("C_Login")
    shim.order("C_Sign before 0x30 2", f"C_Login before {code:#x} -1")
    for _ in range(2):
        assert asker.sign("pair", b"the last of this session").status == 503
    until(lambda: world.part("token pair") == f"0 of 2 sessions in service; needs an operator: {name}", 15)
    until(lambda: f"pair: {name}" in world.security("token-needs-operator"), 5)
    time.sleep(1)  # long enough for several attempts, were there any
    answer = asker.sign("pair", name.encode())
    assert (answer.status, answer.code) == (503, "hsm-unavailable")
    assert world.outcomes_of(name.encode()) == []
    assert asker.signs("orders")
    assert world.ready()[0] == 200  # the other tokens can sign
    assert shim.calls("C_Login") == logins + 1
    os.kill(world.room, signal.SIGHUP)
    until(lambda: shim.calls("C_Login") == logins + 2, 10)
    until(lambda: "needs an operator" in world.part("token pair"), 10)
    shim.clear()
    os.kill(world.room, signal.SIGHUP)
    assert until(lambda: world.is_served("pair"), 15) < 10
    assert asker.signs("pair")


@pytest.mark.case(46)
@pytest.mark.case(47)
def test_hanging_call_times_out_alone_and_what_waits_behind_it_is_signed_by_the_other_worker(world: ShimmedWorld, asker: Asker) -> None:
    until(lambda: world.is_served("pair"), 15)
    hung = {world.worker("pair", 0), world.worker("pair", 1)}
    world.shims["pair"].order("C_Sign hang 0 1")
    messages = [f"hang {number}".encode() for number in range(12)]
    answers = ask_together(world, "pair", messages)
    refused = [(answer.status, answer.code, message) for answer, message in zip(answers, messages, strict=True) if answer.status != 200]
    assert [(status, code) for status, code, _ in refused] == [(504, "hsm-timeout")]
    outcomes = sorted(use for message in messages for use in world.outcomes_of(message))
    assert outcomes == [("signed", "")] * 11 + [("unknown", "timeout")]
    assert world.outcomes_of(refused[0][2]) == [("unknown", "timeout")]
    until(lambda: world.is_served("pair"), 10)
    assert len(hung & {world.worker("pair", 0), world.worker("pair", 1)}) == 1
    assert asker.signs("pair")


@pytest.mark.case(46)
@pytest.mark.case(47)
def test_requests_behind_a_hanging_call_of_the_only_worker_certainly_were_not_signed(world: ShimmedWorld, asker: Asker) -> None:
    world.shims["lone"].order("C_Sign hung 0 1")
    messages = [f"behind {number}".encode() for number in range(12)]
    orders: list[float] = []

    def others() -> None:
        with Asker(world) as other:
            for _ in range(20):
                sent = time.monotonic()
                assert other.signs("orders")
                orders.append(time.monotonic() - sent)
                time.sleep(0.02)

    thread = threading.Thread(target=others)
    thread.start()
    answers = ask_together(world, "lone", messages)
    thread.join(30)
    assert len(orders) == 20, "another token's requests were blocked"
    assert sorted({(answer.status, answer.code) for answer in answers}) == [(503, "hsm-unavailable"), (504, "hsm-timeout")]
    found = sorted(use for message in messages for use in world.outcomes_of(message))
    assert found == [("failed", "worker-lost")] * 11 + [("unknown", "timeout")]
    assert until(lambda: asker.signs("lone"), 15) < 10


@pytest.mark.case(46)
def test_late_signature_is_never_released_and_the_next_answer_is_its_own(world: ShimmedWorld, asker: Asker) -> None:
    world.shims["slow"].order("C_Sign delay 900 1")
    answer = asker.sign("slow", b"too late")
    assert (answer.status, answer.code) == (504, "hsm-timeout")
    assert world.outcomes_of(b"too late") == [("unknown", "timeout")]
    answer = asker.sign("slow", b"while it is silent")
    assert (answer.status, answer.code, answer.retry_after) == (503, "hsm-unavailable", 1)
    assert until(lambda: asker.signs("slow"), 10) < 5  # each is checked against the message that was asked for
    assert world.outcomes_of(b"too late") == [("unknown", "timeout")]


@pytest.mark.case(49)
@pytest.mark.parametrize("lie", LIES)
def test_wrong_signature_is_destroyed_recorded_and_its_worker_taken_out_of_service(world: ShimmedWorld, asker: Asker, lie: str) -> None:
    key = f"lie-{lie}"
    world.shims[key].order(f"C_Sign {lie} 1 1")
    answer = asker.sign(key, lie.encode())
    assert (answer.status, answer.code) == (503, "signature-self-check-failed")
    assert answer.retry_after > 0
    assert world.outcomes_of(lie.encode()) == [("failed", "self-check")]
    until(lambda: f"{key}-0 {key}/1" in world.security("self-check-failed"), 5)
    answer = asker.sign(key, b"again")
    assert (answer.status, answer.code) == (503, "hsm-unavailable")
    assert world.part(f"token {key}") == "0 of 1 sessions in service; returned a signature that does not verify"
    assert world.shims[key].calls("C_Sign") == 1


@pytest.mark.case(50)
def test_operation_left_active_costs_the_session_and_not_the_next_request(world: ShimmedWorld, asker: Asker) -> None:
    until(lambda: world.is_served("pair"), 15)
    world.shims["pair"].order("C_Sign before 0x5 1")  # SoftHSM is not called, so that its operation stays active
    assert asker.sign("pair", b"general error").status == 503
    assert [asker.sign("pair", f"next {number}".encode()).status for number in range(4)] == [200] * 4
    until(lambda: world.is_served("pair"), 15)


@pytest.mark.case(54)
def test_full_token_serves_with_the_sessions_it_has(world: ShimmedWorld, asker: Asker) -> None:
    until(lambda: world.is_served("pair"), 15)
    shim = world.shims["pair"]
    shim.order("C_OpenSession before 0xb1 -1")
    kill(world.worker("pair", 1))
    until(lambda: world.is_served("pair", 1), 10)
    answers = ask_together(world, "pair", [f"one session {number}".encode() for number in range(24)])
    assert {answer.status for answer in answers} == {200}
    kill(world.worker("pair", 0))
    until(lambda: world.is_served("pair", 0), 10)
    until(lambda: world.part("token pair") == "0 of 2 sessions in service; the token has no session left", 10)
    sent = time.monotonic()
    answer = asker.sign("pair", b"no session")
    assert (answer.status, answer.code) == (503, "overloaded")
    assert time.monotonic() - sent < 8  # it has waited a second for a session
    shim.clear()
    assert until(lambda: asker.signs("pair"), 15) < 10


def test_token_is_asked_to_sign_only_where_there_is_an_intent(world: ShimmedWorld, asker: Asker) -> None:
    shim = world.shims["lone"]
    until(lambda: world.is_served("lone"), 15)
    before = shim.calls("C_SignInit"), shim.calls("C_Sign")
    assert [asker.sign("lone", f"intent {number}".encode()).status for number in range(3)] == [200] * 3
    with Asker(world, "ci-release") as stranger:
        assert [stranger.sign("lone", b"no intent").status for _ in range(3)] == [404] * 3
    assert (shim.calls("C_SignInit"), shim.calls("C_Sign")) == (before[0] + 3, before[1] + 3)


@pytest.mark.usefixtures("asker")
def test_killing_workers_one_after_another_under_load_costs_only_what_was_under_way(world: ShimmedWorld) -> None:
    until(lambda: world.is_served("pair"), 15)
    stop = threading.Event()
    answers: list[tuple[bytes, Answer]] = []
    calls = world.shims["pair"].calls("C_Sign")

    def load(client: int) -> None:
        with Asker(world) as own:
            number = 0
            while not stop.is_set():
                message = f"load {client}/{number}".encode()
                answers.append((message, own.sign("pair", message)))
                number += 1

    kills = 4
    with ThreadPoolExecutor(6) as pool:
        clients = [pool.submit(load, client) for client in range(6)]
        for number in range(kills):
            seen = len(answers)
            until(lambda seen=seen: len(answers) > seen + 20, 10)  # type: ignore[misc]
            kill(world.worker("pair", number % 2))
            until(lambda: not world.is_served("pair"), 5)
            until(lambda: world.is_served("pair"), 15)
        stop.set()
        for client in clients:
            client.result(20)
    refused = [(message, answer) for message, answer in answers if answer.status != 200]
    outcomes = [world.outcomes_of(message) for message, _ in refused]
    assert len(refused) <= kills, outcomes
    assert all(uses == [("unknown", "worker-lost")] for uses in outcomes), outcomes
    assert len(answers) > 20 * kills
    # Nothing that was said not to have begun was begun: it was asked for again elsewhere, and would count twice.
    asked, good = world.shims["pair"].calls("C_Sign") - calls, len(answers) - len(refused)
    assert good <= asked <= good + len(refused)


# Worlds that a test restarts


@pytest.fixture
def own(tmp_path: Path) -> ShimmedWorld:
    return make_shimmed_world(tmp_path / "world", {"dev": TokenPlan({"first": Algorithm.ES256, "second": Algorithm.ES256})})


def test_key_version_that_shows_another_public_key_is_refused_on_record_and_never_used_across_restarts(own: ShimmedWorld) -> None:
    world = own.world
    with serving(own), Asker(own) as asker:
        assert asker.signs("first")
        assert asker.signs("second")
    config = world.config_file.read_text()
    world.config_file.write_text(config.replace("object: second", "object: first"))  # as if the token's key had been replaced
    signed = own.shims["dev"].calls("C_SignInit")
    for restarts in (1, 2):
        with serving(own), Asker(own) as asker:
            answer = asker.sign("second", b"replaced")
            assert (answer.status, answer.code) == (503, "hsm-unavailable")
            assert own.part("key second/1") == "refused: key-is-not-the-pinned-one"
            assert own.security("key-refused") == ["second/1: key-is-not-the-pinned-one"] * restarts
            assert own.shims["dev"].calls("C_SignInit") == signed
    world.config_file.write_text(config)
    with serving(own), Asker(own) as asker:
        assert asker.signs("second")
        assert own.part("key second/1") == ""


@pytest.mark.case(52)
def test_key_that_must_not_be_used_is_on_record_by_its_rule_and_the_others_serve(own: ShimmedWorld) -> None:
    add_bad_keys(own.world.directory / "dev", "dev")
    config = own.world.config
    for name in BAD_KEYS:
        config["authority"]["keys"][name] = {"token": "dev", "versions": [{"version": 1, "object": name}]}
        own.keys[name] = ("dev", Algorithm.ES256)
    own.world.config_file.write_text(yaml.safe_dump(config))
    grants = own.world.directory / "grants" / "shimmed.yaml"
    grants.write_text(grants.read_text().replace("  - first\n", "".join(f"  - {name}\n" for name in ("first", *BAD_KEYS))))
    with serving(own), Asker(own) as asker:
        expected = {f"{name}/1": rule for name, rule in BAD_KEYS.items()}
        assert {ref: own.part(f"key {ref}") for ref in expected} == {ref: f"refused: {rule}" for ref, rule in expected.items()}
        assert sorted(own.security("key-refused")) == sorted(f"{ref}: {rule}" for ref, rule in expected.items())
        for name in BAD_KEYS:
            answer = asker.sign(name, name.encode())
            assert (answer.status, answer.code) == (503, "hsm-unavailable")
            assert own.outcomes_of(name.encode()) == []
        assert all(map(asker.signs, ("first", "second", "orders")))
        assert own.shims["dev"].calls("C_Sign") == 2


@pytest.mark.case(45)
def test_wrong_pin_that_the_module_calls_something_else_is_not_tried_again(own: ShimmedWorld) -> None:
    """SoftHSM counts wrong PINs in the token's flags; the shim hides its answer."""
    pin = own.world.directory / "dev" / "pin"
    right = pin.read_text()
    pin.write_text("not-the-pin\n")
    shim = own.shims["dev"]
    shim.order("C_Login after 0x5 -1")
    with serving(own, without=("dev",)):
        until(lambda: own.part("token dev") == "0 of 1 sessions in service; needs an operator: attempts-spent", 15)
        time.sleep(1)
        assert shim.calls("C_Login") == 1
        pin.write_text(right)
        shim.clear()
        serving_process = own.world.serving
        assert serving_process is not None
        os.kill(serving_process.pid, signal.SIGHUP)  # `keybroker serve` passes it on
        until(lambda: own.is_served("dev"), 15)
        assert shim.calls("C_Login") == 2


def test_each_token_has_a_room_of_its_own_when_they_are_started_apart(tmp_path: Path) -> None:
    plans = {name: TokenPlan({name: Algorithm.ES256}) for name in ("one", "two")}
    world = make_shimmed_world(tmp_path / "world", plans)
    with serving_apart(world) as rooms, Asker(world) as asker:
        assert all(map(asker.signs, ("one", "two", "orders")))
        rooms["hsm-one"].kill()
        rooms["hsm-one"].wait(10)
        until(lambda: world.is_served("one", 0), 10)
        assert asker.sign("one", b"gone").code == "hsm-unavailable"
        assert all(map(asker.signs, ("two", "orders")))
        assert world.ready()[0] == 200
