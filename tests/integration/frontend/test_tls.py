"""TLS as clients meet it: 1.3 with a certificate or nothing, never resumed, and hostile chains cost no more than a moment."""

from __future__ import annotations

import dataclasses
import datetime
import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.authorities import CA_SHAPE, Authority, Issued
from tests.integration.frontend.served import BROKER, WORKLOAD, Answered, Served, authority, current, request
from tests.worlds import until

SECONDS = 10.0  # for what takes well under one on a quiet machine
PRIVATE = x509.ObjectIdentifier("1.3.6.1.4.1.55555.1")


def alert_of(served: Served, context: ssl.SSLContext) -> str:
    """The TLS alert that ends a connection."""
    with (
        socket.create_connection(("127.0.0.1", served.port), SECONDS) as plain,
        pytest.raises(ssl.SSLError) as caught,
        context.wrap_socket(plain) as tls,
    ):
        tls.recv(1)  # in TLS 1.3 a server's refusal of a certificate comes after the client is done
    return str(caught.value.reason)


def failed(served: Served, result: str) -> float:
    return served.counter(f'keybroker_handshakes_total{{result="{result}"}}')


@pytest.mark.case(1)
def test_client_without_certificate_gets_an_alert(served: Served) -> None:
    before = failed(served, "no-certificate")
    assert alert_of(served, served.client_context(None)) == "TLSV13_ALERT_CERTIFICATE_REQUIRED"
    until(lambda: failed(served, "no-certificate") == before + 1)
    assert not served.authority.calls


@pytest.mark.case(1)
def test_tls_1_2_gets_an_alert_even_with_a_good_svid(served: Served) -> None:
    before = failed(served, "old-protocol")
    context = served.client_context(served.svid)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert alert_of(served, context) == "TLSV1_ALERT_PROTOCOL_VERSION"
    until(lambda: failed(served, "old-protocol") == before + 1)
    assert not served.authority.calls


def of_another_authority(_served: Served) -> Issued:
    return authority().issue(current())


def expired(served: Served) -> Issued:
    return served.root.issue(current(not_after=current().not_before + datetime.timedelta(seconds=1)))


@pytest.mark.case(2)
@pytest.mark.parametrize("make", [of_another_authority, expired])
def test_certificate_of_another_authority_or_time_gets_an_alert(served: Served, make: Callable[[Served], Issued]) -> None:
    before = failed(served, "bad-certificate")
    alert = alert_of(served, served.client_context(served.write_svid(make(served))))
    assert alert in {"TLSV1_ALERT_UNKNOWN_CA", "SSLV3_ALERT_CERTIFICATE_EXPIRED"}
    until(lambda: failed(served, "bad-certificate") == before + 1)
    assert not served.authority.calls


def test_plain_http_is_not_answered_in_plain_text(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), SECONDS) as plain:
        plain.sendall(request())
        received = b""
        while piece := plain.recv(4_096):
            received += piece
    assert b"HTTP" not in received
    until(lambda: failed(served, "not-tls") >= 1)


@pytest.mark.case(6)
def test_openssl_gets_no_session_to_resume(served: Served, tmp_path: Path) -> None:
    session = tmp_path / "session.pem"
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{served.port}", "-tls1_3", "-quiet", "-sess_out", str(session)]
    command += ["-cert", str(served.svid), "-key", str(served.svid), "-CAfile", str(served.bundle)]
    done = subprocess.run(command, input=request(close=True), capture_output=True, timeout=SECONDS * 2, check=False)
    assert b"200 OK" in done.stdout, done.stderr
    assert not session.exists()


@pytest.mark.case(6)
def test_session_of_a_server_with_our_key_is_not_resumed(served: Served) -> None:
    """Offers a pre-shared key; the twin server, which differs by its tickets only, takes it."""
    context = served.client_context(served.svid)
    with twin_with_tickets(served) as port:
        session = visit(context, port)[0]
        assert session is not None
        assert session.has_ticket
        assert visit(context, port, session)[1]
    with socket.create_connection(("127.0.0.1", served.port), SECONDS) as plain, context.wrap_socket(plain, session=session) as tls:
        assert not tls.session_reused
        tls.sendall(request(close=True))
        assert b"200 OK" in tls.recv(65_536)
    (call,) = served.authority.calls
    assert str(served.authority.validator.validate(call.chain).id) == WORKLOAD


def visit(context: ssl.SSLContext, port: int, session: ssl.SSLSession | None = None) -> tuple[ssl.SSLSession | None, bool]:
    """The session that a server gives, and whether it took the one that was offered."""
    with socket.create_connection(("127.0.0.1", port), SECONDS) as plain, context.wrap_socket(plain, session=session) as tls:
        tls.sendall(b"x")
        assert tls.recv(1) == b"x"  # tickets come before it
        return tls.session, bool(tls.session_reused)


class twin_with_tickets:  # noqa: N801  used as a statement
    """A server that echoes one byte to each of two clients, with the broker's key, and with session tickets."""

    def __init__(self, served: Served) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._context.load_cert_chain(served.directory / "broker.pem")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(SECONDS)
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> int:
        self._thread.start()
        return int(self._listener.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        self._thread.join(2 * SECONDS)
        self._listener.close()

    def _serve(self) -> None:
        for _ in range(2):
            plain, _ = self._listener.accept()
            with plain, self._context.wrap_socket(plain, server_side=True) as tls:
                tls.sendall(tls.recv(1))


def long_chain(served: Served) -> Issued:
    """100 intermediates."""
    above = served.root
    for number in range(100):
        above = above.intermediate(f"{number}", authority().shape)
    return above.issue(current())


def hundred_copies(served: Served) -> Issued:
    """A good leaf, and one certificate 100 times."""
    issued = served.root.issue(current())
    return dataclasses.replace(issued, above=(served.root.intermediate(shape=authority().shape).certificate,) * 100)


def huge_key(served: Served) -> Issued:
    """An RSA key of 16,349 bits, made of two primes that are known: 2^11213-1 and 3*2^5134-1. OpenSSL takes up to 16,384."""
    p, q, e = 2**11213 - 1, 3 * 2**5134 - 1, 65537
    d = pow(e, -1, (p - 1) * (q - 1))
    numbers = rsa.RSAPrivateNumbers(p, q, d, d % (p - 1), d % (q - 1), rsa.rsa_crt_iqmp(p, q), rsa.RSAPublicNumbers(e, p * q))
    return served.root.issue(current(), numbers.private_key(unsafe_skip_rsa_key_validation=True))


def large_certificate(served: Served) -> Issued:
    """A certificate of more than 64 KiB that OpenSSL takes."""
    return served.root.issue(current(extra=[(x509.UnrecognizedExtension(PRIVATE, bytes(64 * 1024)), False)]))


def enormous_certificate(served: Served) -> Issued:
    """A certificate of more than OpenSSL's 100 KiB."""
    return served.root.issue(current(extra=[(x509.UnrecognizedExtension(PRIVATE, bytes(110 * 1024)), False)]))


def many_names(served: Served) -> Issued:
    """A certificate with 1,500 names."""
    return served.root.issue(current(uris=[f"spiffe://example.org/{number}" for number in range(1_500)]))


HOSTILE: dict[Callable[[Served], Issued], str] = {
    long_chain: "chain-too-long",
    hundred_copies: "chain-too-long",
    huge_key: "key-too-large",
    large_certificate: "chain-too-large",
    many_names: "several-uris",
    enormous_certificate: "",
}


@pytest.mark.case(9)
@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
def test_hostile_chain_gets_an_alert_or_401_and_others_are_served(served: Served, make: Callable[[Served], Issued]) -> None:
    svid = served.write_svid(make(served))
    answers: list[Answered | str] = []

    def attack() -> None:
        try:
            answers.extend(served.ask(request(), svid) or ["no answer"])  # reset, with the alert unread
        except ssl.SSLError as err:
            answers.append(str(err.reason))

    attacker = threading.Thread(target=attack)
    began = time.monotonic()
    attacker.start()
    slowest = 0.0
    while attacker.is_alive() and time.monotonic() < began + SECONDS:
        started = time.monotonic()
        (answer,) = served.ask(request(close=True))
        assert answer.status == 200
        slowest = max(slowest, time.monotonic() - started)
    attacker.join(SECONDS)
    (got,) = answers
    if isinstance(got, Answered):
        assert (got.status, json.loads(got.body)["reasons"]) == (401, [HOSTILE[make]])
    else:
        assert "ALERT" in got or (got == "no answer" and not HOSTILE[make])
    assert time.monotonic() - began < SECONDS
    assert slowest < SECONDS / 2


@pytest.mark.case(9)
def test_chain_of_a_size_that_is_taken_is_served(served: Served) -> None:
    above: Authority = served.root
    for number in range(3):
        above = above.intermediate(f"{number}", authority(CA_SHAPE).shape)
    (answer,) = served.ask(request(close=True), served.write_svid(above.issue(current())))
    assert answer.status == 200


def test_server_shows_its_own_svid_only(served: Served) -> None:
    context = served.client_context(served.svid)
    with socket.create_connection(("127.0.0.1", served.port), SECONDS) as plain, context.wrap_socket(plain) as tls:
        names = x509.load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"").extensions
        assert tls.version() == "TLSv1.3"
        assert tls.cipher() is not None
    uris = names.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(x509.UniformResourceIdentifier)
    assert uris == [BROKER]
