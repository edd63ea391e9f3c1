"""What concurrent clients asked and what they got: every attempt, answered or not, with the times at which it began and ended.

The clients are raw on purpose: one request on the wire is one attempt in the history, so nothing is asked again behind its back.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import itertools
import random
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import msgspec

from keybroker.client.problems import ProblemDocument
from keybroker.client.results import SignedUse
from keybroker.client.tls import Credentials
from keybroker.model.key import Algorithm
from tests.worlds import World

LOST, UNSENT = 0, -1  # in place of a status: no whole answer came; there was no connection to ask on
ANSWER_SECONDS = 20.0
_PAUSE_SECONDS = 1.0  # between the attempts of a careful client: what Retry-After says during a restart
_BATCH = 5


@dataclass(frozen=True, slots=True)
class Question:
    """One thing to be signed. Messages are unique, so the digest on record tells which question an intent belongs to."""

    workload: str
    key: str
    algorithm: Algorithm
    message: bytes = field(repr=False)
    idempotency_key: str = ""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One question on the wire, once.

    Attributes:
        number: how often the same client had asked it, this time included.
        sent: monotonic seconds before the first byte left.
        ended: monotonic seconds after the last byte of the answer, or when the connection broke.
        status: HTTP's, or LOST or UNSENT.
        code: of the problem; empty for a signature.
    """

    question: Question
    number: int
    sent: float
    ended: float
    status: int
    code: str = ""
    signed: SignedUse | None = None


class Caller:
    """One workload's connection. For one thread."""

    def __init__(self, world: World, history: list[Attempt], name: str = "payments-api") -> None:
        host, _, port = world.url.removeprefix("https://").partition(":")
        credentials = Credentials(world.svid(name), world.directory / "bundle.pem", None)
        self._http = http.client.HTTPSConnection(host, int(port), timeout=ANSWER_SECONDS, context=credentials.context())
        self._history = history

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def sign(self, question: Question, number: int = 1) -> Attempt:
        """Ask for one signature."""
        sent = time.monotonic()
        status, data = self._post(f"/v1/keys/{question.key}/sign", _item(question), question.idempotency_key)
        attempt = _attempt(question, number, sent, time.monotonic(), status, data)
        self._history.append(attempt)
        return attempt

    def send(self, question: Question) -> None:
        """Ask, and do not wait for the answer."""
        self._http.request(
            "POST", f"/v1/keys/{question.key}/sign", msgspec.json.encode(_item(question)), _headers(question.idempotency_key)
        )

    @property
    def socket(self) -> socket.socket:
        """What the last request went through."""
        sock: socket.socket = self._http.sock
        return sock

    def sign_batch(self, questions: Sequence[Question], idempotency_key: str = "", number: int = 1) -> list[Attempt]:
        """Ask for several with one key at once: each is an attempt of its own."""
        sent = time.monotonic()
        body = {"items": [_item(question) for question in questions]}
        status, data = self._post(f"/v1/keys/{questions[0].key}/sign/batch", body, idempotency_key)
        ended = time.monotonic()
        if status == 200:
            results = msgspec.json.decode(data, type=_Results).results
            answers = [(int(msgspec.json.decode(raw).get("status", 200)), bytes(raw)) for raw in results]
        else:
            answers = [(status, data)] * len(questions)
        attempts = [_attempt(question, number, sent, ended, *answer) for question, answer in zip(questions, answers, strict=True)]
        self._history.extend(attempts)
        return attempts

    def _post(self, path: str, body: Any, idempotency_key: str) -> tuple[int, bytes]:
        try:
            if self._http.sock is None:
                self._http.connect()
        except OSError:
            self._http.close()
            return UNSENT, b""
        try:
            self._http.request("POST", path, msgspec.json.encode(body), _headers(idempotency_key))
            response = self._http.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException):
            self._http.close()
            return LOST, b""


class _Results(msgspec.Struct):
    results: list[msgspec.Raw]


def _headers(idempotency_key: str) -> dict[str, str]:
    return {"Content-Type": "application/json"} | ({"Idempotency-Key": idempotency_key} if idempotency_key else {})


def _item(question: Question) -> dict[str, str]:
    return {"algorithm": question.algorithm.value, "message": base64.b64encode(question.message).decode()}


def _attempt(question: Question, number: int, sent: float, ended: float, status: int, data: bytes) -> Attempt:
    if status == 200:
        return Attempt(question, number, sent, ended, status, signed=msgspec.json.decode(data, type=SignedUse))
    code = msgspec.json.decode(data, type=ProblemDocument).type.rpartition(":")[2] if data else ""
    return Attempt(question, number, sent, ended, status, code)


KEYS = {"orders": Algorithm.ES256, "sessions": Algorithm.ED25519, "invoices": Algorithm.PS256}
WORKLOAD, STRANGER = "spiffe://example.org/payments/api", "spiffe://example.org/ci/release"


class Load:
    """Clients of every kind, each in a thread of its own, from `start` to `stop`.

    Some ask once and go on; some ask again, with an idempotency key, until there is an answer; two ask the same at the same time;
    one asks for batches; and one has no business there.

    Args:
        world: served.
        seed: of what they ask.
    """

    def __init__(self, world: World, seed: int) -> None:
        self.history: list[Attempt] = []
        self.faults: list[BaseException] = []
        self._world = world
        self._seed = seed
        self._stop = threading.Event()
        self._pair = threading.Barrier(2)
        kinds: list[tuple[str, Callable[[Caller, random.Random, str], None]]] = [
            *[("payments-api", self._careless)] * 5,
            *[("payments-api", self._careful)] * 3,
            *[("payments-api", self._one_of_two)] * 2,
            ("payments-api", self._batches),
            ("ci-release", self._stranger),
        ]
        self._threads = [threading.Thread(target=self._run, args=(number, *kind), daemon=True) for number, kind in enumerate(kinds)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """No new question; wait for the answers under way."""
        self._stop.set()
        self._pair.abort()
        for thread in self._threads:
            thread.join(2 * ANSWER_SECONDS)
            assert not thread.is_alive(), "a client hangs"
        for fault in self.faults:
            raise fault

    def _run(self, number: int, svid: str, ask: Callable[[Caller, random.Random, str], None]) -> None:
        rng = random.Random(f"{self._seed}/{number}")
        try:
            with Caller(self._world, self.history, svid) as caller:
                for turn in itertools.count():
                    if self._stop.is_set():
                        return
                    ask(caller, rng, f"{self._seed}-{number}-{turn}")
        except BaseException as err:  # a client's own fault must fail the test, not vanish with its thread
            self.faults.append(err)
            raise

    def _careless(self, caller: Caller, rng: random.Random, name: str) -> None:
        if caller.sign(_question(rng, name)).status != 200:
            self._stop.wait(0.1)  # leave the machine to the rooms that are coming back
        self._stop.wait(rng.uniform(0, 0.005))

    def _careful(self, caller: Caller, rng: random.Random, name: str) -> None:
        question = _question(rng, name, idempotency_key=name)
        self._until_answered(rng, lambda number: [caller.sign(question, number)])
        self._stop.wait(rng.uniform(0, 0.005))

    def _one_of_two(self, caller: Caller, rng: random.Random, name: str) -> None:
        """The same question as somebody else, under the same idempotency key; now and then another question under it."""
        seed, number, turn = name.rsplit("-", 2)
        with contextlib.suppress(threading.BrokenBarrierError):
            self._pair.wait()
        mine = number if int(turn) % 8 == 0 else "both"
        question = Question(WORKLOAD, "orders", Algorithm.ES256, f"{seed}-{mine}-{turn}".encode(), f"{seed}-pair-{turn}")
        self._until_answered(rng, lambda number: [caller.sign(question, number)])

    def _batches(self, caller: Caller, rng: random.Random, name: str) -> None:
        key = rng.choice(["", name])
        questions = [Question(WORKLOAD, "orders", Algorithm.ES256, f"{name}/{n}".encode(), key and f"{key}/{n}") for n in range(_BATCH)]
        if key:
            self._until_answered(rng, lambda number: caller.sign_batch(questions, key, number))
        else:
            caller.sign_batch(questions)
        self._stop.wait(rng.uniform(0.01, 0.05))

    def _stranger(self, caller: Caller, rng: random.Random, name: str) -> None:
        caller.sign(Question(STRANGER, "orders", Algorithm.ES256, name.encode()))
        self._stop.wait(rng.uniform(0.1, 0.3))

    def _until_answered(self, rng: random.Random, ask: Callable[[int], list[Attempt]]) -> None:
        for number in itertools.count(1):
            if not any(is_passing(attempt) for attempt in ask(number)) or self._stop.wait(_PAUSE_SECONDS * rng.uniform(0.8, 1.2)):
                return


def _question(rng: random.Random, name: str, idempotency_key: str = "") -> Question:
    key = rng.choices(list(KEYS), (8, 1, 1))[0]
    return Question(WORKLOAD, key, KEYS[key], name.encode(), idempotency_key)


def public_keys(world: World) -> dict[str, bytes]:
    """The public keys that signatures are checked with, DER SubjectPublicKeyInfo."""
    with world.client() as broker:
        return {name: broker.key(name).versions[-1].spki for name in KEYS}


def is_passing(attempt: Attempt) -> bool:
    """Whether asking again makes sense."""
    return attempt.status in {LOST, UNSENT, 409} or attempt.status >= 500


def availability(history: Iterable[Attempt], retries: int) -> float:
    """Of the questions of careful clients, the share that had a signature within so many retries."""
    asked: dict[bytes, list[Attempt]] = {}
    for attempt in history:
        if attempt.question.idempotency_key:
            asked.setdefault(attempt.question.message, []).append(attempt)
    needed = [
        next((each.number for each in attempts if each.status == 200), retries + 2)
        for attempts in asked.values()
        if all(is_passing(each) or each.status == 200 for each in attempts)  # the loser of two questions under one key asked in vain
        and (attempts[-1].status == 200 or attempts[-1].number > retries)  # the load ended before it was asked again
    ]
    return sum(number <= retries + 1 for number in needed) / max(1, len(needed))


def first_answer_after(history: Sequence[Attempt], moment: float) -> float | None:
    """When the first signature arrived that was asked for after a moment; None if none has yet."""
    found = None
    for attempt in reversed(history):
        if attempt.ended < moment:
            break  # attempts are in the order of their ends, but for threads that overtake each other by a hair
        if attempt.status == 200 and attempt.sent > moment:
            found = attempt.ended
    return found
