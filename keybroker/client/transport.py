"""Requests to one broker: mutual TLS 1.3, bounded in time and size, tried again only where that cannot use a key twice.

RFC 9110 (HTTP), RFC 9457 (problem details). No proxy, no redirect, nothing from the environment.
"""

from __future__ import annotations

import random
import ssl
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from keybroker.client import problems, tls
from keybroker.client.errors import BrokerAnswerError, BrokerIdentityError, BrokerUnreachableError, SettingsError
from keybroker.errors import RefusalError, SvidInvalidError
from keybroker.model.identity import SpiffeId

TIMEOUT_S = 30.0
MAX_ATTEMPTS = 4
MAX_ANSWER_BYTES = 32 * 1024 * 1024  # a page of records is cut at 8 MiB
_CONNECT_S = 5.0
_FIRST_PAUSE_S = 0.1
_OK = 200


class Transport:
    """The way to one broker. Not for use by several threads at once.

    Args:
        url: `https://HOST:PORT`.
        svid: PEM file with our own chain and key; read again when it changes.
        bundle: file with the CA certificates of our trust domain; read again when it changes.
        broker_id: the SPIFFE ID that the broker must prove; None for `spiffe://<our trust domain>/keybroker`.
        timeout_s: seconds for one call, all attempts together.

    Raises:
        SettingsError: the URL cannot be used.
        ConfigError: the SVID or the bundle cannot be used.
    """

    def __init__(self, url: str, svid: Path, bundle: Path, broker_id: SpiffeId | None, timeout_s: float) -> None:
        self._url = _base(url)
        self._credentials = tls.Credentials(svid, bundle, broker_id)
        self._timeout_s = timeout_s
        self._context: ssl.SSLContext | None = None
        self._http: httpx.Client | None = None
        self._connect()

    def get(self, path: str, parameters: Mapping[str, str] | None = None) -> bytes:
        """The body of a 200 answer."""
        return self._ask(lambda http: http.build_request("GET", path, params=parameters), is_repeatable=True)

    def post(self, path: str, body: bytes, idempotency_key: str = "") -> bytes:
        """The body of a 200 answer. Tried again only with an idempotency key."""
        headers = {"Content-Type": "application/json"} | ({"Idempotency-Key": idempotency_key} if idempotency_key else {})
        return self._ask(lambda http: http.build_request("POST", path, content=body, headers=headers), is_repeatable=bool(idempotency_key))

    def close(self) -> None:
        """End all connections."""
        if self._http is not None:
            self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _ask(self, build: Callable[[httpx.Client], httpx.Request], *, is_repeatable: bool) -> bytes:
        """Ask, and ask again after a pause while that is safe and there is time.

        Raises:
            RefusalError: the broker said no; the subclass of the problem's code.
            BrokerUnreachableError: no answer.
            BrokerIdentityError: another than the broker answered.
            BrokerAnswerError: the answer makes no sense.
        """
        deadline = time.monotonic() + self._timeout_s
        attempt = 0
        while True:
            attempt += 1
            try:
                return self._once(build, deadline)
            except (RefusalError, BrokerUnreachableError) as err:
                asked_for = err.retry_after if isinstance(err, RefusalError) else 0
                is_passing = asked_for > 0 or isinstance(err, BrokerUnreachableError)
                pause = asked_for + _FIRST_PAUSE_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)  # noqa: S311  spreads load
                if not (is_repeatable and is_passing and attempt < MAX_ATTEMPTS and time.monotonic() + pause < deadline):
                    raise
            time.sleep(pause)

    def _once(self, build: Callable[[httpx.Client], httpx.Request], deadline: float) -> bytes:
        http = self._connect()
        request = build(http)
        left = deadline - time.monotonic()
        if left <= 0:
            raise BrokerUnreachableError(f"{self._url}: no answer in {self._timeout_s:g} s")
        request.extensions["timeout"] = httpx.Timeout(left, connect=min(left, _CONNECT_S)).as_dict()
        try:
            response = http.send(request, stream=True)
            try:
                body = self._read(response, deadline)
            finally:
                response.close()
        except httpx.HTTPError as err:
            raise _translated(err, self._url) from err
        if response.status_code == _OK:
            return body
        raise problems.refusal(response.status_code, response.headers, body)

    def _read(self, response: httpx.Response, deadline: float) -> bytes:
        body = bytearray()
        for piece in response.iter_raw():
            body += piece
            if len(body) > MAX_ANSWER_BYTES:
                raise BrokerAnswerError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
            if time.monotonic() > deadline:
                raise BrokerUnreachableError(f"{self._url}: no complete answer in {self._timeout_s:g} s")
        return bytes(body)

    def _connect(self) -> httpx.Client:
        """The connection pool; a new one after the SVID or the bundle has changed."""
        context = self._credentials.context()
        if self._http is None or context is not self._context:
            self.close()
            self._context = context
            headers = {"Accept": "application/json, application/problem+json", "Accept-Encoding": "identity"}
            self._http = httpx.Client(base_url=self._url, verify=context, trust_env=False, follow_redirects=False, headers=headers)
        return self._http


def _base(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as err:
        raise SettingsError("the URL of the broker is not a URL; give --url https://HOST:PORT") from err
    if parsed.scheme != "https" or not parsed.host or parsed.path not in {"", "/"} or parsed.query or parsed.userinfo or parsed.fragment:
        raise SettingsError("the URL of the broker must be https://HOST:PORT and nothing more (--url, KEYBROKER_URL)")
    return f"https://{parsed.netloc.decode()}"


def _translated(err: httpx.HTTPError, url: str) -> Exception:
    """What a failure of the connection means."""
    cause: BaseException | None = err
    while cause is not None:
        if isinstance(cause, tls.WrongPeerError):
            return BrokerIdentityError(cause.detail)
        if isinstance(cause, ssl.SSLCertVerificationError):
            return BrokerIdentityError(f"{url} shows a certificate that the bundle does not vouch for: {cause.verify_message}")
        if isinstance(cause, ssl.SSLError):
            return _alert(cause, url)
        cause = cause.__cause__ or cause.__context__
    if isinstance(err, httpx.ConnectTimeout):
        return BrokerUnreachableError(f"{url} does not answer")
    if isinstance(err, httpx.TimeoutException):
        return BrokerUnreachableError(f"{url} took too long to answer")
    return BrokerUnreachableError(f"{url}: {str(err) or type(err).__name__}")


def _alert(err: ssl.SSLError, url: str) -> Exception:
    """An alert about our certificate is the broker's refusal of it (RFC 8446 section 6.2); anything else is trouble with TLS."""
    name = (err.reason or "").partition("_ALERT_")[2].lower().replace("_", "-")
    if "certificate" in name or name in {"unknown-ca", "access-denied"}:
        return SvidInvalidError("The broker refused this SVID in the TLS handshake.", reasons=(name,))
    return BrokerUnreachableError(f"{url}: no TLS 1.3 connection: {err.reason or err}")
