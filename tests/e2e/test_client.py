"""The SDK against a served broker, blocking and awaited: what each method answers where it is allowed, denied, and not to be decided."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
from collections.abc import Iterator
from typing import Any, cast

import pytest

from keybroker.client import AUTO, RecordPage, SignBody, SignedUse
from keybroker.client.verify import is_good, signed_content
from keybroker.errors import DeniedError, NotFoundError, PolicyFailedError, RefusalError
from keybroker.model.key import Algorithm
from tests.integration.client.servers import Awaited, Blocking, Kind, Made
from tests.policies import compile_rego
from tests.worlds import World, make_world

MESSAGE = b"an order for 100"
NONSENSE = 'package keybroker\n\ndecision := {"allow": "true"}\n'
HOW = pytest.mark.parametrize("kind", [Blocking, Awaited], ids=["blocking", "awaited"])


class Files:
    """The files of one identity of a world, as the clients of these tests take them."""

    def __init__(self, world: World, name: str) -> None:
        self.svid = world.svid(name)
        self.bundle = world.directory / "bundle.pem"


@contextlib.contextmanager
def asking(kind: Kind, world: World, name: str = "payments-api", **options: Any) -> Iterator[Made]:
    made = kind(world.url, cast("Any", Files(world, name)), **options)
    try:
        yield made
    finally:
        made.close()
        made.end()


@pytest.fixture(scope="module")
def undecided(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A world whose policy answers something that is not a decision."""
    world = make_world(tmp_path_factory.mktemp("undecided") / "world")
    (world.directory / "nonsense.wasm").write_bytes(compile_rego(tmp_path_factory.mktemp("rego"), NONSENSE))
    world.config_file.write_text(
        world.config_file.read_text().replace("  grants: grants", "  policy: {module: nonsense.wasm}\n  grants: grants")
    )
    try:
        world.start()
        yield world
    finally:
        world.kill()


@HOW
def test_whoami(world: World, undecided: World, kind: Kind) -> None:
    for name, path, roles in (
        ("payments-api", "payments/api", ("workload",)),
        ("auditor", "human/auditor", ("auditor",)),
        ("bob", "human/bob", ()),
    ):
        with asking(kind, world, name) as broker:
            seen = broker.whoami()
        assert (seen.spiffe_id, seen.trust_domain, seen.roles) == (f"spiffe://example.org/{path}", "example.org", roles)
    with asking(kind, undecided) as broker, pytest.raises(PolicyFailedError):
        broker.whoami()


@HOW
def test_keys_that_may_be_looked_at(world: World, undecided: World, kind: Kind) -> None:
    with asking(kind, world) as broker:
        found = broker.keys()
        listed = {key.name: key for key in found}
        assert listed["orders"] == broker.key("orders")
        (version,) = listed["orders"].versions
        assert version.spki_sha256 == hashlib.sha256(version.spki).hexdigest()
        assert base64.b64encode(version.spki).decode()[:40] in broker.public_key("orders").replace("\n", "")
        assert broker.public_key("orders", "pem", 1) == broker.public_key("orders")
        assert json.loads(broker.public_key("sessions", "jwk"))["crv"] == "Ed25519"
        assert broker.public_key("invoices", "openssh").startswith("ssh-rsa ")
        assert len(broker.jwks()["keys"]) == len(listed)
        with pytest.raises(NotFoundError):
            broker.public_key("orders", "pem", 2)
    with asking(kind, world, "carol") as broker:
        assert broker.keys() == ()
        assert broker.jwks() == {"keys": []}
        for ask in (broker.key, broker.public_key):
            with pytest.raises(NotFoundError):
                ask("orders")
    with asking(kind, undecided) as broker:
        for ask in (broker.keys, broker.jwks, lambda: broker.key("orders"), lambda: broker.public_key("orders")):
            with pytest.raises(PolicyFailedError):
                ask()


@HOW
def test_sign(world: World, undecided: World, kind: Kind) -> None:
    with asking(kind, world) as broker:
        signed = broker.sign("orders", "ES256", message=MESSAGE, reason="a test", media_type="text/plain", format="p1363")
        (version,) = broker.key("orders").versions
        content = signed_content(Algorithm.ES256, io.BytesIO(MESSAGE))
        assert is_good(version.spki, Algorithm.ES256, content, signed.signature, "p1363")
        assert (signed.key, signed.version, signed.algorithm) == ("orders", 1, Algorithm.ES256)
        assert broker.sign("orders", "ES256", digest=hashlib.sha256(MESSAGE).digest()).use != signed.use
        with pytest.raises(DeniedError) as denied:
            broker.sign("orders", "ES384", message=MESSAGE)
        assert denied.value.reasons
        assert denied.value.request_id
    with asking(kind, world, "ci-release") as broker, pytest.raises(NotFoundError):
        broker.sign("orders", "ES256", message=MESSAGE)
    with asking(kind, undecided) as broker, pytest.raises(PolicyFailedError) as failed:
        broker.sign("orders", "ES256", message=MESSAGE)
    assert failed.value.retry_after > 0


@HOW
@pytest.mark.case(20)
def test_sign_with_an_idempotency_key_is_one_use_and_with_auto_a_new_one_each_time(world: World, kind: Kind) -> None:
    with asking(kind, world) as broker:
        mine = f"mine-{kind.__name__}"
        first, again = (broker.sign("orders", "ES256", message=MESSAGE, idempotency_key=mine) for _ in range(2))
        assert first == again
        with pytest.raises(RefusalError) as caught:
            broker.sign("orders", "ES256", message=MESSAGE + b"!", idempotency_key=mine)
        assert caught.value.code == "idempotency-mismatch"
        one, two = (broker.sign("orders", "ES256", message=MESSAGE, idempotency_key=AUTO) for _ in range(2))
        assert one.use != two.use


@HOW
def test_sign_batch(world: World, undecided: World, kind: Kind) -> None:
    good = SignBody(algorithm=Algorithm.ES256, message=MESSAGE)
    bad = SignBody(algorithm=Algorithm.ES384, message=MESSAGE)
    with asking(kind, world) as broker:
        first, second, third = broker.sign_batch("orders", [good, bad, good], idempotency_key=AUTO)
        assert isinstance(first, SignedUse)
        assert isinstance(third, SignedUse)
        assert isinstance(second, DeniedError)
        assert first.use != third.use
        with pytest.raises(RefusalError) as caught:
            broker.sign_batch("orders", [good] * 1_001)
        assert caught.value.code in {"invalid", "too-large"}
    for unlucky, name, refusal in ((world, "ci-release", NotFoundError), (undecided, "payments-api", PolicyFailedError)):
        with asking(kind, unlucky, name) as broker:
            try:
                results = broker.sign_batch("orders", [good, good])
            except RefusalError as err:
                results = (err,)
            assert {type(each) for each in results} == {refusal}


@HOW
def test_explain(world: World, undecided: World, kind: Kind) -> None:
    with asking(kind, world) as broker:
        allowed = broker.explain("orders", "ES256", message=MESSAGE)
        assert (allowed.allow, allowed.grants) == (True, ("payments",))
        denied = broker.explain("orders", "ES384", message=MESSAGE)
        assert not denied.allow
        assert denied.reasons
    with asking(kind, world, "ci-release") as broker, pytest.raises(NotFoundError):
        broker.explain("orders", "ES256", message=MESSAGE)
    with asking(kind, undecided) as broker, pytest.raises(PolicyFailedError):
        broker.explain("orders", "ES256", message=MESSAGE)


@HOW
def test_records(world: World, undecided: World, kind: Kind) -> None:
    with asking(kind, world) as broker:
        signed = broker.sign("orders", "ES256", message=MESSAGE)
        page: RecordPage = broker.records(use=signed.use)
        assert [(record.kind, record.outcome, record.key) for record in page.records] == [
            ("intent", "", "orders"),
            ("outcome", "signed", "orders"),
        ]
        assert page.next is None
        intent = broker.record(signed.records.intent)
        assert intent == page.records[0]
        assert intent.raw in world.leaves()
        one = broker.records(limit=1)
        assert len(one.records) == 1
        two = broker.records(limit=1, cursor=one.next)
        assert two.records[0].index > one.records[0].index
        with pytest.raises(DeniedError):
            broker.records(workload="spiffe://example.org/human/auditor")
        with pytest.raises(NotFoundError):
            broker.record(0)
    with asking(kind, world, "auditor") as broker:
        assert broker.records(workload="spiffe://example.org/payments/api", kind="outcome", outcome="signed").records
        assert broker.record(0).kind == "start"
    with asking(kind, undecided, "auditor", timeout_s=1) as broker:
        for ask in (broker.records, lambda: broker.record(0)):
            with pytest.raises((PolicyFailedError, NotFoundError)):
                ask()


def test_blocking_client_goes_through_all_records(world: World) -> None:
    with world.client("auditor") as broker:
        indexes = [record.index for record in broker.iter_records()]
    assert indexes == list(range(len(indexes)))
    assert len(indexes) > 5


def test_certificates_of_another_world_are_refused_on_both_sides(world: World, undecided: World) -> None:
    for kind in (Blocking, Awaited):
        files = Files(world, "payments-api")
        files.svid = undecided.svid("payments-api")
        stranger = kind(world.url, cast("Any", files))
        with pytest.raises(RefusalError) as caught:
            stranger.sign("orders", "ES256", message=MESSAGE)
        assert caught.value.code == "svid-invalid"
        stranger.close()
        stranger.end()
