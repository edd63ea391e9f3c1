"""The URL of a broker, and what failures mean. The servers of tests/integration/client show the rest."""

from __future__ import annotations

import socket
import ssl
import time

import httpcore
import pytest

from keybroker.client.deadline import DeadlineBackend
from keybroker.client.errors import BrokerIdentityError, BrokerUnreachableError, SettingsError
from keybroker.client.tls import WrongPeerError
from keybroker.client.transport import Answer, authority_of, failure
from keybroker.errors import OverloadedError


@pytest.mark.parametrize(
    ("url", "authority"),
    [
        ("https://127.0.0.1:8443", "127.0.0.1:8443"),
        ("https://127.0.0.1:8443/", "127.0.0.1:8443"),
        ("https://broker.example.org", "broker.example.org:443"),
        ("HTTPS://Broker.Example.ORG:1", "broker.example.org:1"),
        ("https://[::1]:8443", "[::1]:8443"),
        ("https://[2001:db8::1]", "[2001:db8::1]:443"),
    ],
)
def test_url_of_a_broker_is_a_host_and_a_port(url: str, authority: str) -> None:
    assert authority_of(url) == authority


@pytest.mark.parametrize(
    "url",
    [
        "", "127.0.0.1:8443", "http://127.0.0.1:8443", "https://", "https://:8443", "https://host:port", "https://host:99999", "https://[::1",
        "https://user@host", "https://user:word@host", "https://host/v1", "https://host?x", "https://host?", "https://host#x", "https://host#",
        "https://hö.example", "https://ho st", "https://host\n", "https://ho\tst", "file:///etc/passwd", "https://host:0x10",
    ],
)  # fmt: skip
def test_what_is_more_or_less_than_that_is_refused_with_the_cure(url: str) -> None:
    with pytest.raises(SettingsError, match="--url"):
        authority_of(url)


def mapped(origin: Exception, kind: type[Exception] = httpcore.ReadError) -> Exception:
    """As httpcore raises it: the pool clears the cause, the context stays."""
    try:
        try:
            raise origin
        except Exception as err:
            raise kind(str(err)) from err
    except Exception as err:  # noqa: BLE001
        err.__cause__ = None
        return err


def ssl_error(reason: str) -> ssl.SSLError:
    err = ssl.SSLError(1, f"[SSL: {reason}]")
    err.reason = reason
    return err


def test_wrong_peer_is_named() -> None:
    err = failure(mapped(WrongPeerError("whoever answers is X"), httpcore.ConnectError), "https://h:1", 1)
    assert isinstance(err, BrokerIdentityError)
    assert str(err) == "whoever answers is X"


def test_older_error_of_the_caller_is_not_taken_for_the_cause() -> None:
    try:
        raise WrongPeerError("an older one")
    except WrongPeerError:
        err = failure(mapped(ConnectionRefusedError(111, "Connection refused"), httpcore.ConnectError), "https://h:1", 1)
        late = failure(mapped(httpcore.ReadTimeout("late"), httpcore.ReadTimeout), "https://h:1", 1)
    assert isinstance(err, BrokerUnreachableError)
    assert isinstance(late, BrokerUnreachableError)


@pytest.mark.parametrize(
    ("origin", "was_sent"),
    [
        (httpcore.ConnectError("refused"), False),
        (httpcore.ConnectTimeout("late"), False),
        (httpcore.PoolTimeout("no connection is free"), False),
        (httpcore.ReadError("reset"), True),
        (httpcore.WriteError("reset"), True),
        (httpcore.ReadTimeout("late"), True),
        (httpcore.RemoteProtocolError("nonsense"), True),
        (TimeoutError(), True),
        (ssl_error("TLSV1_ALERT_INTERNAL_ERROR"), True),
    ],
)
def test_failure_says_whether_anything_may_have_happened(origin: Exception, was_sent: bool) -> None:
    err = failure(origin, "https://h:1", 1)
    assert isinstance(err, BrokerUnreachableError)
    assert err.was_sent is was_sent
    assert str(err).startswith("https://h:1")


def test_answer_is_its_body_or_the_refusal() -> None:
    good = Answer(200, [(b"Content-Type", b"application/json")])
    good.take(b"{")
    good.take(b"}")
    assert good.body() == b"{}"
    bad = Answer(503, [(b"CONTENT-TYPE", b"application/problem+json"), (b"Retry-After", b"3")])
    bad.take(b'{"type": "urn:keybroker:problem:overloaded"}')
    with pytest.raises(OverloadedError) as caught:
        bad.body()
    assert caught.value.retry_after == 3


def test_no_read_or_write_begins_after_the_moment_at_which_the_call_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(httpcore.ConnectTimeout):
            DeadlineBackend().connect_tcp("127.0.0.1", port, time.monotonic() - 1)
        stream = DeadlineBackend().connect_tcp("127.0.0.1", port, time.monotonic() + 10)
        try:
            stream.write(b"x", time.monotonic() + 10)
            with pytest.raises(httpcore.WriteTimeout):
                stream.write(b"x", time.monotonic() - 1)
            with pytest.raises(httpcore.ReadTimeout):
                stream.read(1, time.monotonic() - 1)
            with pytest.raises(httpcore.ReadTimeout):
                stream.read(1, time.monotonic() + 0.05)
            with pytest.raises(httpcore.ConnectTimeout):
                stream.start_tls(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), "h", time.monotonic() - 1)
        finally:
            stream.close()
