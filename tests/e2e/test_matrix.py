"""Fifty workloads, fifty keys, and grants on the diagonal only: whoever asks for another's key gets 404, and nothing is signed."""

from __future__ import annotations

import datetime
import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from keybroker.audit.chain import check
from keybroker.cli.development_ca import DevelopmentCa
from keybroker.client import BrokerUnreachableError, Client
from keybroker.errors import NotFoundError, SvidInvalidError
from keybroker.model.identity import SpiffeId
from keybroker.model.key import Algorithm
from tests.faults.history import Attempt, Caller, Question
from tests.faults.model import Log, violations
from tests.worlds import World, make_world, until

SIZE = 50
CLIENTS = 10
WORKLOADS = [f"w{number:02}" for number in range(SIZE)]
KEYS = [f"k{number:02}" for number in range(SIZE)]
OTHERS = ["auditor", "admin", "alice", "broker", "ci-release", "payments-api"]
_GRANT = """\
  - id: own-{number}
    workloads: ["{workload}"]
    keys: [{key}]
    operations: [sign, read-key]
    algorithms: [ES256]
"""


def spiffe_id(workload: str) -> str:
    return f"spiffe://example.org/matrix/{workload}"


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The world, served."""
    options = [word for name in WORKLOADS for word in ("--workload", spiffe_id(name))]
    options += [word for name in KEYS for word in ("--key", f"{name}:ES256")]
    world = make_world(tmp_path_factory.mktemp("matrix") / "world", *options)
    rules = [
        _GRANT.format(number=number, workload=spiffe_id(workload), key=key)
        for number, (workload, key) in enumerate(zip(WORKLOADS, KEYS, strict=True))
    ]
    (world.directory / "grants" / "matrix.yaml").write_text("grants:\n" + "".join(rules))
    try:
        world.start()
        yield world
        assert check(world.leaves()) == []
        assert "Traceback" not in world.log.read_text()
    finally:
        world.kill()


def ask_for_all(world: World, name: str, workload: str, history: list[Attempt], text: str) -> list[Attempt]:
    """One workload asks for every key, in an order of its own."""
    with Caller(world, history, name) as caller:
        keys = random.Random(name).sample(KEYS, SIZE)
        return [caller.sign(Question(workload, key, Algorithm.ES256, f"{text} {name} {key}".encode())) for key in keys]


def denials(world: World) -> Counter[str]:
    """How many denials are on record, by trail. A record counts those that came too fast to be written one by one."""
    kept: Counter[str] = Counter()
    for record in Log(world.leaves()).records:
        if record["kind"] == "denial":
            assert record["body"]["code"] == "not-found"
            kept[record["trail"]["id"]] += record["body"]["count"]
    return kept


def uses(world: World) -> set[tuple[str, str]]:
    """Who has used which key, or tried to."""
    return {(record["trail"]["id"], record["key"]["name"]) for record in Log(world.leaves()).records if record["kind"] == "intent"}


def test_each_of_fifty_workloads_signs_with_its_own_key_and_none_of_the_other_49(matrix: World) -> None:
    history: list[Attempt] = []
    before = denials(matrix)
    with ThreadPoolExecutor(CLIENTS) as pool:
        asked = pool.map(lambda name: ask_for_all(matrix, name, spiffe_id(name), history, "matrix"), WORKLOADS)
        signed = {(attempt.question.workload, attempt.question.key) for attempts in asked for attempt in attempts if attempt.signed}
    assert len(history) == SIZE * SIZE
    diagonal = {(spiffe_id(workload), key) for workload, key in zip(WORKLOADS, KEYS, strict=True)}
    assert signed == uses(matrix) == diagonal
    assert Counter((attempt.status, attempt.code) for attempt in history) == {(200, ""): SIZE, (404, "not-found"): SIZE * (SIZE - 1)}
    expected = Counter({spiffe_id(name): SIZE - 1 for name in WORKLOADS})
    until(lambda: (denials(matrix) - before).total() >= expected.total())
    assert denials(matrix) - before == expected
    found = violations(history, matrix.leaves(), public_keys(matrix))
    assert [each for each in found if "nobody asked for" not in each and "denials told" not in each] == []  # of other tests


def test_workload_reads_its_own_key_and_none_of_the_others(matrix: World) -> None:
    for number in range(0, SIZE, 7):
        with matrix.client(WORKLOADS[number]) as broker:
            listed = broker.keys()
            assert [key.name for key in listed] == [KEYS[number]]
            for other in (KEYS[number - 1], "orders", "no-such-key"):
                with pytest.raises(NotFoundError):
                    broker.public_key(other)


@pytest.mark.parametrize("name", OTHERS)
def test_identity_without_a_grant_gets_404_for_every_key(matrix: World, name: str) -> None:
    identity = svid_identity(matrix.svid(name))
    before = denials(matrix)[identity]
    history: list[Attempt] = []
    ask_for_all(matrix, name, identity, history, "others")
    assert {(attempt.status, attempt.code) for attempt in history} == {(404, "not-found")}
    until(lambda: denials(matrix)[identity] >= before + SIZE)
    assert denials(matrix)[identity] == before + SIZE
    assert identity not in {trail for trail, _ in uses(matrix)}


def expired(own: DevelopmentCa, _other: DevelopmentCa, now: datetime.datetime) -> bytes:
    return own.svid(SpiffeId.parse(spiffe_id("w00")), "expired", now - datetime.timedelta(days=8))


def not_yet_valid(own: DevelopmentCa, _other: DevelopmentCa, now: datetime.datetime) -> bytes:
    return own.svid(SpiffeId.parse(spiffe_id("w00")), "early", now + datetime.timedelta(days=1))


def of_another_domain(_own: DevelopmentCa, other: DevelopmentCa, now: datetime.datetime) -> bytes:
    return other.svid(SpiffeId.parse("spiffe://other.example/matrix/w00"), "stranger", now)


def forged_by_another_domain(_own: DevelopmentCa, other: DevelopmentCa, now: datetime.datetime) -> bytes:
    return other.svid(SpiffeId.parse(spiffe_id("w00")), "forged", now)


@pytest.mark.case(2)
@pytest.mark.parametrize("issue", [expired, not_yet_valid, of_another_domain, forged_by_another_domain])
def test_svid_that_is_not_good_here_and_now_is_refused_in_the_handshake(
    matrix: World, tmp_path: Path, issue: Callable[[DevelopmentCa, DevelopmentCa, datetime.datetime], bytes]
) -> None:
    now = datetime.datetime.now(datetime.UTC)
    svid = tmp_path / "svid.pem"
    svid.write_bytes(issue(own_ca(matrix), DevelopmentCa.make("other.example", now), now))
    before = len(Log(matrix.leaves()).outcomes)
    broker_id = SpiffeId.parse("spiffe://example.org/keybroker")
    with (
        Client(matrix.url, svid=svid, bundle=matrix.directory / "bundle.pem", broker_id=broker_id) as broker,
        pytest.raises((SvidInvalidError, BrokerUnreachableError)),
    ):
        broker.sign("k00", "ES256", message=b"x")
    assert len(Log(matrix.leaves()).outcomes) == before
    with matrix.client("w00") as broker:  # and it was not for another reason: a good one of the same name signs
        assert broker.sign("k00", "ES256", message=b"x").key == "k00"


def own_ca(world: World) -> DevelopmentCa:
    """The world's own authority, from its files."""
    key = load_pem_private_key((world.directory / "ca-key.pem").read_bytes(), None)
    certificate = x509.load_pem_x509_certificate((world.directory / "ca.pem").read_bytes())
    return DevelopmentCa(certificate, key)  # type: ignore[arg-type]  # of P-256, as `dev init` makes it


def svid_identity(path: Path) -> str:
    leaf = x509.load_pem_x509_certificate(path.read_bytes())
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return str(names.get_values_for_type(x509.UniformResourceIdentifier)[0])


def public_keys(world: World) -> dict[str, bytes]:
    """Each key as its own workload reads it."""
    found = {}
    for workload, key in zip(WORKLOADS, KEYS, strict=True):
        with world.client(workload) as broker:
            found[key] = broker.key(key).versions[-1].spki
    return found
