"""The engine that asks an OPA server, where what answers is not what it should be: whatever comes, it is no yes, and it comes in time."""

from __future__ import annotations

import asyncio
import datetime
import gzip
import ipaddress
import json
import ssl
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from keybroker.authority.policy.opa_address import OpaAddress
from keybroker.authority.policy.opa_engine import OpaEngine
from keybroker.authority.policy.opa_server import OpaServer
from keybroker.authority.policy.wasm import WasmInstance
from keybroker.errors import ConfigError
from keybroker.model.decision import Decision, Verdict
from tests.authorities import CA_SHAPE, HOUR, Authority, Shape
from tests.impostor import Answer, Impostor, http, impostor
from tests.policies import GOOD, compiled_default, default_module, load, request

DEADLINE = 30.0  # seconds, of what ends by itself
SHORT = 1.5  # of what waits for its deadline; long enough for a busy machine to ask at all
SLACK = 15.0  # seconds that a busy machine may take on top
REVISION = 3
_NOW = datetime.datetime.now(datetime.UTC)
LIVE: dict[str, Any] = {"not_before": _NOW - HOUR, "not_after": _NOW + HOUR}
SERVER = Shape(uris=(), extra=((x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False),), **LIVE)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a real OPA would answer: an allow."""
    data, _ = compiled_default(load(tmp_path_factory.mktemp("grants") / "g", a=GOOD))
    (answer,) = json.loads(WasmInstance(default_module(), data).evaluate(request()))
    assert answer["result"]["allow"] is True
    provenance = {"version": "1.22.2", "bundles": {"keybroker": {"revision": str(REVISION)}}}
    return {"result": answer["result"], "provenance": provenance}


async def ask(url: str, digest: str, deadline: float = DEADLINE, times: int = 1) -> list[Decision]:
    server = OpaServer(OpaAddress.of(url, None, None), deadline)
    engine = OpaEngine(server, digest, REVISION)
    try:
        return [await engine.decide(request()) for _ in range(times)]
    finally:
        await server.close()


def decided(answer: Answer, digest: str, deadline: float = DEADLINE) -> tuple[Decision, Impostor, float]:
    """The decision, what the server saw, and how many seconds it took."""

    async def run() -> tuple[Decision, Impostor, float]:
        async with impostor(answer) as server:
            started = time.monotonic()
            (decision,) = await ask(server.url, digest, deadline)
            return decision, server, time.monotonic() - started

    return asyncio.run(run())


def failed(decision: Decision, code: str) -> bool:
    whole = (decision.verdict, decision.reasons, decision.grants, decision.obligations)
    return whole == (Verdict.FAILED, (code,), (), ()) and json.loads(decision.record)["allow"] is False


def test_whole_answer_of_the_right_policy_is_an_allow_or_a_deny(good: dict[str, Any]) -> None:
    decision, server, _ = decided(http(json.dumps(good).encode()), good["result"]["policy"], 30)
    assert (decision.verdict, decision.grants, decision.engine) == (Verdict.ALLOW, ("payments",), "opa/1.22.2")
    assert json.loads(server.bodies[0]) == {"input": json.loads(request())}
    assert server.heads[0].startswith("POST /v1/data/keybroker/decision?provenance=True&strict-builtin-errors=True HTTP/1.1\r\n")
    no = good["result"] | {"allow": False, "reasons": ["no-grant"], "grants": [], "obligations": []}
    decision, _, _ = decided(http(json.dumps(good | {"result": no}).encode()), good["result"]["policy"], 30)
    assert (decision.verdict, decision.reasons) == (Verdict.DENY, ("no-grant",))


@pytest.mark.case(21)
@pytest.mark.parametrize(
    "result",
    ["null", '"true"', "true", "1", "{}", "[]", '[{"allow": true}]', '{"allow": "true"}', '{"allow": 1}', '{"allow": true}'],
)  # fmt: skip
def test_result_that_is_no_decision_is_a_policy_error(good: dict[str, Any], result: str) -> None:
    body = json.dumps(good | {"result": json.loads(result)}).encode()
    decision, _, _ = decided(http(body), good["result"]["policy"])
    assert failed(decision, "policy-error")


@pytest.mark.case(21)
@pytest.mark.parametrize("member", ["allow", "reasons", "grants", "policy", "obligations"])
@pytest.mark.parametrize("value", [None, "true", 1, {"a": "b"}, "gone"])
def test_allow_with_one_wrong_member_is_a_policy_error(good: dict[str, Any], member: str, value: Any) -> None:
    result = dict(good["result"])
    if value == "gone":
        del result[member]
    else:
        result[member] = value
    decision, _, _ = decided(http(json.dumps(good | {"result": result}).encode()), good["result"]["policy"], SHORT)
    assert failed(decision, "policy-error")


@pytest.mark.case(21)
@pytest.mark.parametrize("result", [b'"\xff"', b'{"policy":"\xff"}', b"1e999999", b'{"allow":true,"allow":true}'])
def test_result_that_is_hardly_json_is_a_policy_error(good: dict[str, Any], result: bytes) -> None:
    decision, _, _ = decided(http(b'{"result":%s}' % result), good["result"]["policy"])
    assert failed(decision, "policy-error")


@pytest.mark.case(21)
def test_undefined_rule_is_a_policy_error(good: dict[str, Any]) -> None:
    undefined = {"provenance": good["provenance"]}
    for body in (b"{}", json.dumps(undefined).encode()):
        decision, _, _ = decided(http(body), good["result"]["policy"])
        assert failed(decision, "policy-error")


@pytest.mark.parametrize(
    "change",
    [
        {"provenance": {"version": "1.22.2", "bundles": {"keybroker": {"revision": "2"}}}},
        {"provenance": {"version": "1.22.2", "bundles": {"keybroker": {}}}},
        {"provenance": {"version": "1.22.2", "bundles": {}}},
        {"provenance": {"version": "1.22.2"}},
        {"provenance": {}},
    ],
)
def test_allow_from_another_bundle_is_a_policy_error(good: dict[str, Any], change: dict[str, Any]) -> None:
    decision, _, _ = decided(http(json.dumps(good | change).encode()), good["result"]["policy"], SHORT)
    assert failed(decision, "policy-error")


def test_allow_that_names_no_bundle_is_a_policy_error(good: dict[str, Any]) -> None:
    decision, _, _ = decided(http(json.dumps({"result": good["result"]}).encode()), good["result"]["policy"], SHORT)
    assert failed(decision, "policy-error")


def test_allow_of_another_digest_is_a_policy_error(good: dict[str, Any]) -> None:
    decision, _, _ = decided(http(json.dumps(good).encode()), "0" * 64, SHORT)
    assert failed(decision, "policy-error")
    assert decision.policy == "0" * 64


async def endless(writer: asyncio.StreamWriter) -> None:
    """An answer that goes on and on, as fast as it is read; at most 200 MB of it."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
    for _ in range(2_000):
        writer.write(b"186A0\r\n" + b" " * 100_000 + b"\r\n")
        await writer.drain()


async def dripping(writer: asyncio.StreamWriter) -> None:
    """An answer of which a byte comes every 50 ms."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(1_000):
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.05)


async def silent(writer: asyncio.StreamWriter) -> None:
    """No answer."""
    del writer
    await asyncio.sleep(60)


GARBAGE: dict[str, Answer] = {
    "nothing": b"",
    "no HTTP": b"\x00\xff" * 100,
    "a banner": b"220 mail.example.org ESMTP\r\n",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "head of 1 MB": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 1_000_000 + b"\r\n\r\n",
    "half a body": b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"result"',
    "no JSON": http(b"<html>welcome</html>"),
    "empty body": http(b""),
    "a list": http(b"[]"),
    "a yes": http(b"true"),
    "deep": http(b"[" * 100_000),
    "10 MB": http(b'{"result":"' + b"x" * 10_000_000 + b'"}'),
    "10 MB of a good answer": http(b" " * 10_000_000),
    "endless": endless,
    "dripping": dripping,
    "silent": silent,
    "400": http(b"{}", "400 Bad Request"),
    "401": http(b'{"code": "unauthorized"}', "401 Unauthorized"),
    "404": http(b"{}", "404 Not Found"),
    "500": http(b"{}", "500 Internal Server Error"),
    "502": http(b"{}", "502 Bad Gateway"),
    "503": http(b"{}", "503 Service Unavailable"),
    "504": http(b"{}", "504 Gateway Timeout"),
    "204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "gzip of garbage": http(b"\x1f\x8b\x08\x00" + b"\0" * 50, "200 OK", "Content-Encoding: gzip"),
}


@pytest.mark.case(22)
@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_unavailable_within_the_deadline_and_is_asked_for_once(good: dict[str, Any], name: str) -> None:
    deadline = SHORT if name in {"dripping", "silent"} else DEADLINE
    decision, server, seconds = decided(GARBAGE[name], good["result"]["policy"], deadline)
    assert failed(decision, "policy-unavailable")
    assert seconds < SHORT + SLACK
    assert (server.connections, len(server.heads)) == (1, 1)


@pytest.mark.case(22)
def test_server_that_is_not_there_is_unavailable() -> None:
    async def run() -> list[Decision]:
        async with impostor(b"") as server:
            url = server.url
        return await ask(url, "0" * 64)

    assert failed(asyncio.run(run())[0], "policy-unavailable")


def test_good_answer_under_a_content_encoding_is_not_unpacked(good: dict[str, Any]) -> None:
    packed = gzip.compress(json.dumps(good).encode())
    decision, server, _ = decided(http(packed, "200 OK", "Content-Encoding: gzip"), good["result"]["policy"])
    assert failed(decision, "policy-unavailable")
    assert "\r\nAccept-Encoding: identity\r\n" in server.heads[0]


@pytest.mark.parametrize(
    "status", ["301 Moved Permanently", "302 Found", "303 See Other", "307 Temporary Redirect", "308 Permanent Redirect"]
)
def test_redirect_is_not_followed_even_to_a_good_answer(good: dict[str, Any], status: str) -> None:
    async def run() -> None:
        async with impostor(http(json.dumps(good).encode())) as other:
            location = f"Location: {other.url}/v1/data/keybroker/decision"
            async with impostor(http(json.dumps(good).encode(), status, location)) as server:
                (decision,) = await ask(server.url, good["result"]["policy"])
                assert failed(decision, "policy-unavailable")
                assert (server.connections, other.connections) == (1, 0)

    asyncio.run(run())


def test_proxy_and_netrc_of_the_environment_are_ignored(good: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login mallory password secret\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))

    async def run() -> None:
        async with impostor(http(json.dumps(good).encode())) as proxy, impostor(http(b"{}")) as server:
            for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
                monkeypatch.setenv(name, proxy.url)
            (decision,) = await ask(server.url, good["result"]["policy"], 30)
            assert failed(decision, "policy-error")
            assert (server.connections, proxy.connections) == (1, 0)
            assert "authorization" not in server.heads[0].lower()

    asyncio.run(run())


def test_cookie_of_the_server_is_not_kept(good: dict[str, Any]) -> None:
    async def run() -> None:
        body = json.dumps(good).encode()
        async with impostor(http(body, "200 OK", "Set-Cookie: a=b")) as server:
            decisions = await ask(server.url, good["result"]["policy"], 30, times=2)
            assert [each.verdict for each in decisions] == [Verdict.ALLOW, Verdict.ALLOW]
            assert len(server.heads) == 2  # nothing is remembered: the same question is asked again
            assert all("cookie" not in head.lower() for head in server.heads)

    asyncio.run(run())


def test_token_of_a_file_is_sent_and_a_file_that_holds_none_is_refused(good: dict[str, Any], tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("abc.DEF-123\n")

    async def run() -> None:
        async with impostor(http(json.dumps(good).encode())) as server:
            opa = OpaServer(OpaAddress.of(server.url, None, token), 30)
            assert (await OpaEngine(opa, good["result"]["policy"], REVISION).decide(request())).verdict is Verdict.ALLOW
            await opa.close()
            assert "\r\nAuthorization: Bearer abc.DEF-123\r\n" in server.heads[0]

    asyncio.run(run())
    for text in ("", "a b\n", "a\nb\n", "a\r\nX: y", "\u00e4"):
        token.write_text(text)
        with pytest.raises(ConfigError, match="not a bearer token on one line"):
            OpaAddress.of("http://127.0.0.1:1", None, token)


@pytest.mark.parametrize(
    "url",
    ["http://opa.example.org:8181", "http://localhost:8181", "http://192.0.2.1:8181", "http://0.0.0.0:8181", "http://127.0.0.1@192.0.2.1:8181",
     "http://[::ffff:192.0.2.1]:8181", "https://opa.example.org:8181", "ftp://127.0.0.1", "127.0.0.1:8181", "", "http://", "http://127.0.0.1:x",
     "http://127.0.0.1:99999", "http://127.0.0.1/v1", "http://127.0.0.1?x=y", "http://127.0.0.1#x", "http://127.0.0.1 /", "http://127.0.0.1\n",
     "unix:opa.sock", "unix:", "http://127.1:8181"],
)  # fmt: skip
def test_address_that_is_not_safe_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        OpaAddress.of(url, None, None)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8181", "http://127.0.0.1:8181/", "http://[::1]:8181", "http://127.3.2.1", "unix:/run/opa.sock"]
)
def test_address_that_stays_on_this_host_needs_no_tls(url: str) -> None:
    assert OpaAddress.of(url, None, None).tls is None


def test_tls_server_of_the_named_ca_is_asked_and_any_other_is_not(good: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = (Authority(name, replace(CA_SHAPE, **LIVE)) for name in ("ours", "theirs"))
    answer = http(json.dumps(good).encode())

    async def run(signer: Authority, ca: Authority, host: str) -> tuple[Decision, int]:
        (tmp_path / "ca.pem").write_bytes(ca.pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(signer.issue(SERVER).write(tmp_path / "server.pem"))
        async with impostor(answer, context) as server:
            opa = OpaServer(OpaAddress.of(f"https://{host}:{server.port}", tmp_path / "ca.pem", None), 30)
            decision = await OpaEngine(opa, good["result"]["policy"], REVISION).decide(request())
            await opa.close()
            return decision, len(server.heads)

    decision, asked = asyncio.run(run(ours, ours, "127.0.0.1"))
    assert (decision.verdict, asked) == (Verdict.ALLOW, 1)
    for signer, host in ((theirs, "127.0.0.1"), (ours, "localhost")):
        decision, asked = asyncio.run(run(signer, ours, host))
        assert failed(decision, "policy-unavailable")
        assert asked == 0
