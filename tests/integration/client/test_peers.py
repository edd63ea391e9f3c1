"""Who answers: both clients speak to the broker that they were told of, and send not one byte of a request to anybody else."""

from __future__ import annotations

import dataclasses
import ssl

import pytest

from keybroker.client import BrokerIdentityError, BrokerUnreachableError
from keybroker.errors import SvidInvalidError
from keybroker.model.identity import SpiffeId
from tests.authorities import CA_USAGE, LEAF_USAGE
from tests.integration.client.servers import (
    BROKER,
    Connection,
    Kind,
    Place,
    Server,
    asking,
    authority,
    every,
    facing,
    shape,
    whoami,
)
from tests.worlds import until


def test_broker_is_asked_where_it_proves_its_id(kind: Kind, place: Place) -> None:
    with facing(kind, place, place.server_context()) as (server, broker):
        assert broker.whoami().trust_domain == "example.org"
        assert broker.sign("orders", "ES256", message=b"x").signature == b"sig"
    assert [request.split(b" ", 2)[:2] for request in server.requests] == [[b"GET", b"/v1/whoami"], [b"POST", b"/v1/keys/orders/sign"]]
    assert server.shaken == 1  # one connection for both


def test_broker_of_another_name_is_asked_where_that_is_expected(kind: Kind, place: Place) -> None:
    other = "spiffe://example.org/signing/berlin"
    context = place.server_context(place.authority.issue(shape(other)))
    with Server(context, every(whoami)) as server, asking(kind, server, place, broker_id=SpiffeId.parse(other)) as broker:
        assert broker.whoami()


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("spiffe://example.org/payments/api", "is spiffe://example.org/payments/api, not spiffe://example.org/keybroker"),
        ("spiffe://example.org/keybroker/x", "keybroker/x, not"),
        ("spiffe://other.example/keybroker", "no valid X.509-SVID"),
        ("https://example.org/keybroker", "no valid X.509-SVID"),
        ("spiffe://example.org/keybroker\n", "no valid X.509-SVID"),
    ],
)
def test_nothing_is_sent_to_whoever_has_another_id(kind: Kind, place: Place, uri: str, told: str) -> None:
    context = place.server_context(place.authority.issue(shape(uri)))
    with facing(kind, place, context) as (server, broker):
        for _ in range(2):
            with pytest.raises(BrokerIdentityError, match=told):
                broker.sign("orders", "ES256", message=b"secret", idempotency_key="again-and-again")
    assert server.received == b""
    assert server.accepted == 2  # it is not tried again


def test_nothing_is_sent_to_whoever_has_two_ids(kind: Kind, place: Place) -> None:
    both = dataclasses.replace(shape(BROKER), uris=(BROKER, "spiffe://example.org/other"))
    with facing(kind, place, place.server_context(place.authority.issue(both))) as (server, broker), pytest.raises(BrokerIdentityError):
        broker.whoami()
    assert server.received == b""


def test_nothing_is_sent_to_a_leaf_that_may_sign_certificates(kind: Kind, place: Place) -> None:
    signing = dataclasses.replace(shape(BROKER), usage=LEAF_USAGE | CA_USAGE)
    with facing(kind, place, place.server_context(place.authority.issue(signing))) as (server, broker), pytest.raises(BrokerIdentityError):
        broker.whoami()
    assert server.received == b""


@pytest.mark.parametrize("has_same_name", [True, False])
def test_nothing_is_sent_to_the_right_id_of_an_authority_that_is_not_in_the_bundle(
    kind: Kind, place: Place, *, has_same_name: bool
) -> None:
    rogue = authority()
    if has_same_name:
        rogue.name = place.authority.name
    context = place.server_context(rogue.issue(shape(BROKER)))
    with facing(kind, place, context) as (server, broker), pytest.raises(BrokerIdentityError, match="does not vouch for"):
        broker.whoami()
    assert server.received == b""


@pytest.mark.parametrize(("since", "seconds"), [(-7_200, -3_600), (3_600, 7_200)], ids=["expired", "not yet valid"])
def test_nothing_is_sent_to_a_broker_whose_svid_is_not_valid_now(kind: Kind, place: Place, since: float, seconds: float) -> None:
    context = place.server_context(place.authority.issue(shape(BROKER, seconds, since)))
    with facing(kind, place, context) as (server, broker), pytest.raises(BrokerIdentityError, match=r"expired|not yet valid"):
        broker.whoami()
    assert server.received == b""


@pytest.mark.case(1)
def test_nothing_is_sent_over_tls_1_2(kind: Kind, place: Place) -> None:
    context = place.server_context()
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    with facing(kind, place, context) as (server, broker), pytest.raises(BrokerUnreachableError, match=r"no TLS 1\.3 connection") as caught:
        broker.sign("orders", "ES256", message=b"secret")
    assert server.received == b""
    assert not caught.value.was_sent


def test_nothing_but_a_greeting_is_sent_to_a_server_without_tls(kind: Kind, place: Place) -> None:
    def answer_plainly(connection: Connection) -> None:
        connection._receive()
        connection.answer(b"no TLS here", "400 Bad Request", media_type="text/plain")

    with facing(kind, place, None, answer_plainly) as (server, broker), pytest.raises(BrokerUnreachableError) as caught:
        broker.sign("orders", "ES256", message=b"secret")
    assert not caught.value.was_sent
    assert server.received[:1] == b"\x16"  # a TLS handshake record
    assert b"orders" not in server.received


def test_broker_is_found_by_name_and_its_name_decides_nothing(kind: Kind, place: Place) -> None:
    with Server(place.server_context(), every(whoami)) as server, asking(kind, f"https://localhost:{server.port}/", place) as broker:
        assert broker.whoami()
    assert f"Host: localhost:{server.port}\r\n".encode() in server.received


@pytest.mark.case(2)
def test_svid_that_the_broker_does_not_trust_is_refused_clearly(kind: Kind, place: Place) -> None:
    with (
        facing(kind, place, place.server_context(clients=authority())) as (server, broker),
        pytest.raises(SvidInvalidError, match="refused this SVID") as caught,
    ):
        broker.whoami()
    assert caught.value.reasons in {("unknown-ca",), ("decrypt-error",), ("bad-certificate",)}
    assert server.requests == []


@pytest.mark.case(7)
def test_connection_ends_with_our_own_svid(kind: Kind, place: Place) -> None:
    place.write_svid(place.authority.issue(shape("spiffe://example.org/payments/api", seconds=2)))
    with facing(kind, place, place.server_context()) as (server, broker):
        assert broker.whoami()

        def is_refused() -> bool:
            try:
                broker.whoami()
            except SvidInvalidError:
                return True
            return False

        until(is_refused)
        with pytest.raises(SvidInvalidError) as caught:
            broker.whoami()
        assert caught.value.reasons == ("certificate-expired",)
        assert server.accepted > server.shaken  # what was refused was another connection
        until(lambda: server.ended == server.accepted)  # and the first one is closed
        place.write_svid(place.authority.issue(shape("spiffe://example.org/payments/api")))
        assert broker.whoami()


def test_connection_ends_with_the_brokers_svid(kind: Kind, place: Place) -> None:
    context = place.server_context(place.authority.issue(shape(BROKER, seconds=2)))
    with facing(kind, place, context) as (server, broker):
        assert broker.whoami()

        def is_refused() -> bool:
            try:
                broker.whoami()
            except BrokerIdentityError:
                return True
            return False

        until(is_refused)
        asked = len(server.requests)
        with pytest.raises(BrokerIdentityError, match="expired"):
            broker.whoami()
        assert len(server.requests) == asked


def test_renewed_svid_is_shown_without_a_restart(kind: Kind, place: Place) -> None:
    with facing(kind, place, place.server_context()) as (server, broker):
        broker.whoami()
        renewed = place.authority.issue(shape("spiffe://example.org/payments/api"))
        place.write_svid(renewed)
        broker.whoami()
        broker.whoami()
    assert len(server.peers) == 2
    assert server.peers[1] == renewed.chain[0]


def test_renewed_bundle_is_followed_without_a_restart(kind: Kind, place: Place) -> None:
    old, new = place.authority, authority()
    with facing(kind, place, place.server_context(new.issue(shape(BROKER)), clients=old)) as (server, broker):
        with pytest.raises(BrokerIdentityError):
            broker.whoami()
        place.bundle.write_bytes(old.pem + new.pem)
        assert broker.whoami()
        place.bundle.write_bytes(old.pem)
        with pytest.raises(BrokerIdentityError):
            broker.whoami()
    assert len(server.requests) == 1


@pytest.mark.parametrize("name", ["svid.pem", "bundle.pem"])
def test_half_written_file_leaves_the_old_one_in_force(kind: Kind, place: Place, name: str) -> None:
    path = place.directory / name
    whole = path.read_bytes()
    with facing(kind, place, place.server_context()) as (server, broker):
        broker.whoami()
        path.write_bytes(whole[: len(whole) // 2])
        assert broker.whoami()
        path.unlink()
        assert broker.whoami()
        assert server.shaken == 1
        path.write_bytes(whole)
        assert broker.whoami()
    assert server.shaken == 2
