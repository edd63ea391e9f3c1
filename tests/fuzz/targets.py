"""What is fuzzed: for each parser a function of bytes, which must hold whatever they are, and bytes to begin with."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from keybroker.audit import approval, dsse
from keybroker.audit.approval import ApprovalError
from keybroker.audit.chain import ChainChecker
from keybroker.audit.checkpoint import Checkpoint, SignedCheckpoint
from keybroker.audit.dsse import EnvelopeError
from keybroker.audit.export import verify
from keybroker.audit.leaf import canonical
from keybroker.audit.merkle import ProofError
from keybroker.audit.note import Note, NoteError, VerifierKey
from keybroker.audit.proof import TlogProof
from keybroker.audit.tiles import Tile, TileError, bundle, entries_in
from keybroker.authority.policy import loader
from keybroker.authority.policy.bundle import PolicyBundle
from keybroker.authority.policy.bundle_maker import pack
from keybroker.authority.policy.compiler import compile_rules
from keybroker.authority.policy.signatures import BundleKeys, sign
from keybroker.client.results import Record
from keybroker.errors import ConfigError, InvalidError, MalformedError, SvidInvalidError, WireError
from keybroker.frontend import bodies
from keybroker.frontend.changing import ProposalBody
from keybroker.frontend.freezing import FreezeBody
from keybroker.identity.bundle import TrustBundle, TrustBundles
from keybroker.identity.watched_file import WatchedFile
from keybroker.identity.x509_svid import SvidValidator
from keybroker.model.call import MAX_CALL_BYTES, Call, Sign, Whoami
from keybroker.model.identity import SpiffeId, SpiffeIdError
from keybroker.model.key import Algorithm
from keybroker.model.notice import MAX_NOTICE_CALL_BYTES, ComposeNotice, NoticeCall
from keybroker.model.pkcs11_uri import Pkcs11Uri, Pkcs11UriError
from keybroker.model.request import SignBody
from keybroker.model.task import MAX_TASK_BYTES, SignTask, Task
from keybroker.wire import FrameReader, frame_bytes
from keybroker.witness.rules import AddCheckpoint
from tests.approvals import STATEMENT, spki_of, statement, subject
from tests.authorities import NOW_US, Authority, Shape
from tests.clocks import FixedClock

Try = Callable[[bytes], None]

_SPIFFE_ID = re.compile(r"spiffe://[a-z0-9._-]{1,255}(/(?!\.{1,2}(/|\Z))[a-zA-Z0-9._-]+)*")  # SPIFFE-ID section 2, written anew


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        make: gives the function, after whatever it needs has been made once.
        seeds: small inputs of each kind that the parser knows.
    """

    make: Callable[[], Try]
    seeds: tuple[bytes, ...]


def _frames() -> Try:
    """Only WireError; and how the bytes are cut into pieces changes nothing."""

    def read(type_: type[Call | Task | NoticeCall], limit: int, pieces: list[bytes]) -> list[object]:
        reader = FrameReader(type_, limit)
        seen: list[object] = []
        try:
            for piece in pieces:
                seen.extend(reader.feed(piece))
        except WireError:
            seen.append("refused")
        return seen

    def attempt(data: bytes) -> None:
        for type_, limit in ((Call, MAX_CALL_BYTES), (Task, MAX_TASK_BYTES), (NoticeCall, MAX_NOTICE_CALL_BYTES)):
            whole = read(type_, limit, [data])
            cut = len(data) // 2
            assert read(type_, limit, [data[:cut], data[cut:]]) == whole

    return attempt


def _policy_bundle() -> Try:
    """Only ConfigError; and what is accepted, packed or as the tar in it, holds what was signed."""
    keys = BundleKeys(((_SIGNING_KEY.public_key(), ("ES256",)),), "")

    def attempt(data: bytes) -> None:
        for packed in (data, gzip.compress(data, 1)):
            with contextlib.suppress(ConfigError):
                found = PolicyBundle.read(packed, keys, "fuzz")
                assert (found.revision, found.module, found.grants) == (1, None, {"a.yaml": _BUNDLED["grants/a.yaml"]})
                assert (found.data, found.rego) == (_BUNDLED["data.json"], _BUNDLED["policy.rego"])

    return attempt


def _spiffe_id() -> Try:
    """Only SpiffeIdError; and what is accepted is what the specification's grammar says, no more and no less."""

    def attempt(data: bytes) -> None:
        text = data.decode("utf-8", errors="surrogateescape")
        try:
            parsed = SpiffeId.parse(text)
        except SpiffeIdError:
            assert len(text) > 2048 or not _SPIFFE_ID.fullmatch(text)
        else:
            assert _SPIFFE_ID.fullmatch(text)
            assert str(parsed) == "/".join([f"spiffe://{parsed.trust_domain}", *parsed.path]) == text

    return attempt


def _chain() -> Try:
    """Only SvidInvalidError: each certificate comes with its length before it, two bytes."""
    directory = Path(tempfile.mkdtemp())
    path = directory / "bundle.pem"
    path.write_bytes(_ROOT.pem)
    bundles = TrustBundles({"example.org": TrustBundle.parse("example.org", _ROOT.pem, "bundle")}, {"example.org": WatchedFile(path)})
    validator = SvidValidator(bundles, None, FixedClock(NOW_US))

    def attempt(data: bytes) -> None:
        chain = []
        while len(data) > 2:
            size = int.from_bytes(data[:2])
            chain.append(data[2 : 2 + size])
            data = data[2 + size :]
        try:
            svid = validator.validate(tuple(chain))
        except SvidInvalidError as err:
            assert len(err.reasons) == 1
        else:
            assert svid.id.trust_domain == "example.org"
            # Nobody signs anything else with this authority by chance. (The signature itself can be written in several ways.)
            assert x509.load_der_x509_certificate(chain[0]).tbs_certificate_bytes in _GOOD_LEAVES

    return attempt


def _body() -> Try:
    """Only Malformed and Invalid; and what is accepted is what a plain and strict reader of JSON sees."""

    def attempt(data: bytes) -> None:
        try:
            body = bodies.sign_body(data)
        except (MalformedError, InvalidError):
            pass
        else:
            seen = json.loads(data.decode(), object_pairs_hook=_unique)
            content = seen.get("message", seen.get("digest"))
            assert base64.b64encode(body.content).decode() == content
            assert body.algorithm.value == seen["algorithm"]
            assert body.reason == seen.get("reason", "")
        with contextlib.suppress(MalformedError, InvalidError):
            bodies.batch_items(data)

    return attempt


def _change() -> Try:
    """Only Malformed and Invalid; and what is accepted is what a plain and strict reader of JSON sees, and names one target."""

    def attempt(data: bytes) -> None:
        with contextlib.suppress(MalformedError, InvalidError):
            ask = bodies.json_body(data, FreezeBody).ask()
            seen = json.loads(data.decode(), object_pairs_hook=_unique)
            assert set(seen) == {ask.kind, "reason"}
            assert (ask.reason, ask.target) == (seen["reason"], "" if ask.kind == "everything" else seen[ask.kind])
        with contextlib.suppress(MalformedError, InvalidError):
            proposal = bodies.json_body(data, ProposalBody)
            assert json.loads(data.decode(), object_pairs_hook=_unique) | {"operation": proposal.operation} == msgspec.structs.asdict(
                proposal
            )

    return attempt


def _operation_bodies() -> Try:
    """Only Malformed and Invalid; what goes on is what a plain and strict reader of JSON sees, and has one spelling."""

    def attempt(data: bytes) -> None:
        with contextlib.suppress(MalformedError, InvalidError):
            envelope = bodies.approval(data)
            assert bodies.approval(envelope) == envelope
            assert set(json.loads(data.decode(), object_pairs_hook=_unique)) == {"payload", "payloadType", "signatures"}
        with contextlib.suppress(MalformedError, InvalidError):
            message = bodies.redemption(data)
            seen = json.loads(data.decode(), object_pairs_hook=_unique)
            assert seen == ({} if message is None else {"message": base64.b64encode(message).decode()})

    return attempt


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    assert len({name for name, _ in pairs}) == len(pairs)
    return dict(pairs)


def _grants() -> Try:
    """Only ConfigError, which names the file; and what is accepted compiles."""
    directory = Path(tempfile.mkdtemp())
    path = directory / "rules.yaml"

    def attempt(data: bytes) -> None:
        path.write_bytes(data)
        try:
            rules = loader.load(directory, frozenset({"orders"}))
        except ConfigError as err:
            assert str(path) in str(err)
        else:
            compiled, digest = compile_rules(rules, "00", "fuzz")
            assert digest in json.dumps(msgspec.json.decode(compiled))
            assert all(grant.workloads and grant.operations for grant in rules.grants)

    return attempt


def _record() -> Try:
    """A checker of logs takes anything, and finds fault with what is not a leaf."""

    def attempt(data: bytes) -> None:
        checker = ChainChecker()
        faults = [fault for line in data.split(b"\n") for fault in checker.take(line)]
        if not faults:
            assert all(canonical(msgspec.json.decode(line)) == line for line in data.split(b"\n"))
        with contextlib.suppress(msgspec.MsgspecError, UnicodeError):
            Record.parse(data)

    return attempt


def _pkcs11_uri() -> Try:
    """Only Pkcs11UriError; and a URI that is written out again is the same."""

    def attempt(data: bytes) -> None:
        text = data.decode("utf-8", errors="replace")
        try:
            uri = Pkcs11Uri.parse(text, Path("/base"))
        except Pkcs11UriError as err:
            assert "pin-value=" not in str(err)
        else:
            again = Pkcs11Uri.parse(str(uri), Path("/"))
            assert str(again) == str(uri)
            assert (again.token, again.serial, again.module_path, again.pin_file) == (uri.token, uri.serial, uri.module_path, uri.pin_file)

    return attempt


def _bundle() -> Try:
    """Only ConfigError."""

    def attempt(data: bytes) -> None:
        try:
            TrustBundle.parse("example.org", data, "bundle")
        except ConfigError as err:
            assert str(err).startswith("bundle: ")

    return attempt


def _note() -> Try:
    """Only NoteError; what is read is written back as it was; nothing that was changed is taken for signed."""

    def attempt(data: bytes) -> None:
        with contextlib.suppress(NoteError):
            note = Note.parse(data)
            assert bytes(note) == data
            with contextlib.suppress(NoteError):
                assert Checkpoint.parse(note.text).text() == note.text
            with contextlib.suppress(NoteError):
                opened = SignedCheckpoint.open(data, _LOG_KEY)
                assert opened.checkpoint.text() in _SIGNED_TEXTS
        with contextlib.suppress(NoteError):
            text = data.decode(errors="replace")
            assert str(VerifierKey.parse(text)) == text

    return attempt


def _approval() -> Try:
    """Only ApprovalError, whether the signature is good or not; and what is accepted has one spelling.

    The bytes are tried as an envelope, and as a payload that its approver has signed.
    """
    spki = spki_of(_APPROVER)

    def attempt(data: bytes) -> None:
        with contextlib.suppress(ApprovalError):
            approval.verified(data, spki)
        try:
            envelope = dsse.signed(approval.PAYLOAD_TYPE, data, _APPROVER)
            statement = approval.verified(envelope, spki)
        except (ApprovalError, EnvelopeError):
            return
        assert approval.payload_of(statement) == data == canonical(json.loads(data.decode(), object_pairs_hook=_unique))

    return attempt


def _tlog_proof() -> Try:
    """Only NoteError or ProofError; what is read is written back as it was."""

    def attempt(data: bytes) -> None:
        with contextlib.suppress(NoteError, ProofError):
            proof = TlogProof.parse(data)
            assert bytes(proof) == data or data.split(b"\n")[1] == b"extra "
            proof.verify(bytes(32), _LOG_KEY)
            raise AssertionError("a record that is not there")

    return attempt


def _export() -> Try:
    """Never an error of its own; nothing but the seed itself is verified."""

    def attempt(data: bytes) -> None:
        report = verify(data.splitlines(keepends=True), _LOG_KEY)
        assert report.findings or not report.records

    return attempt


def _witness_request() -> Try:
    """Only NoteError; what is read is written back as it was."""

    def attempt(data: bytes) -> None:
        with contextlib.suppress(NoteError):
            assert bytes(AddCheckpoint.parse(data)) == data

    return attempt


def _tile() -> Try:
    """Only TileError; a path or a bundle that is read is written back as it was."""

    def attempt(data: bytes) -> None:
        with contextlib.suppress(TileError):
            text = data.decode(errors="replace")
            assert Tile.parse(text).path == text
        with contextlib.suppress(TileError):
            assert bundle(entries_in(data)) == data

    return attempt


_TLOG = json.loads((Path(__file__).parents[1] / "vectors" / "tlog.json").read_text())
_LOG_KEY = VerifierKey.parse(_TLOG["TlogKey"])
_SIGNED_TEXTS = {each["Note"].partition("\n\n")[0] + "\n" for each in _TLOG["Notes"]}
_APPROVER = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32))
_ROOT = Authority()
_LEAF = _ROOT.issue()
_BELOW = _ROOT.intermediate().issue()
_GOOD_LEAVES = tuple(each.certificate.tbs_certificate_bytes for each in (_LEAF, _BELOW))


def _framed(chain: tuple[bytes, ...]) -> bytes:
    return b"".join(len(each).to_bytes(2) + each for each in chain)


_BODY = SignBody(algorithm=Algorithm.ES256, message=b"hello!", reason="why")
_BUNDLE = {"keys": [{"kty": "EC", "use": "x509-svid", "x5c": [base64.b64encode(_ROOT.issue().chain[0]).decode()]}], "spiffe_sequence": 1}

_GRANTS = b"""
grants:
  - id: a
    workloads: ['spiffe://example.org/payments/*']
    keys: [orders]
    operations: [sign]
    algorithms: [ES256]
    networks: [office]
networks:
  office: ['192.0.2.0/24', '2001:db8::/32']
"""
_DENIES = b"""
grants: [{id: b, workloads: ['**'], operations: [read-audit], trails: ['spiffe://example.org/**']}]
denies: [{id: c, workloads: ['**'], algorithms: [RS256]}]
"""

_SIGNING_KEY = ec.generate_private_key(ec.SECP256R1())
_BUNDLED = {
    ".manifest": b'{"revision":"1","roots":["keybroker","keybroker_rules"]}',
    "data.json": b"{}",
    "policy.rego": b"package keybroker\n",
    "grants/a.yaml": b"grants: []\n",
}
_PACKED = pack(_BUNDLED | {".signatures.json": sign(_BUNDLED, _SIGNING_KEY, "")})

TARGETS: dict[str, Target] = {
    "policy-bundle": Target(_policy_bundle, (_PACKED, gzip.decompress(_PACKED))),
    "frame": Target(
        _frames,
        (
            frame_bytes(Call(1, Whoami(), (b"der",), "127.0.0.1", "", "01J")),
            frame_bytes(Call(2, Sign("orders", _BODY, "key"), (b"der", b"der"))),
            frame_bytes(NoticeCall(4, ComposeNotice(7, "https://hooks.example/a"))),
            frame_bytes(Task(3, SignTask("orders/1", Algorithm.ES256, bytes(32)))),
        ),
    ),
    "operation-body": Target(
        _operation_bodies,
        (approval.signed(STATEMENT, _APPROVER), b"{}", b'{"message": "aGk="}', b'{"payload":"","signatures":[]}'),
    ),
    "spiffe-id": Target(
        _spiffe_id, (b"spiffe://example.org/payments/api", b"spiffe://example.org", b"spiffe://a_b.c-d/../x", b"https://x/y")
    ),
    "chain": Target(
        _chain,
        (
            _framed(_LEAF.chain),
            _framed(_BELOW.chain),
            _framed(_ROOT.issue(Shape(ca=True)).chain),
            _framed(_ROOT.issue(Shape(uris=("spiffe://example.org/a", "spiffe://example.org/b"))).chain),
        ),
    ),
    "body": Target(
        _body,
        (
            msgspec.json.encode(_BODY),
            b'{"algorithm": "Ed25519", "message": "aGVsbG8=", "reason": "caf\\u00e9"}',
            b'{"algorithm": "ES256", "digest": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", "format": "p1363"}',
            b'{"items": [{"algorithm": "ES256", "message": "aGVsbG8="}, {"algorithm": "RS256", "message": ""}]}',
        ),
    ),
    "change": Target(
        _change,
        (
            b'{"key": "orders", "reason": "incident 7"}',
            b'{"everything": true, "reason": "caf\\u00e9"}',
            b'{"base": "00", "files": {"a.yaml": "grants: []"}, "reason": "less", "operation": "01J"}',
        ),
    ),
    "grants": Target(
        _grants,
        (
            _GRANTS,
            _DENIES,
        ),
    ),
    "record": Target(
        _record,
        (
            b'{"body":{},"index":0,"kind":"intent","log":"x","time":"2026-01-01T00:00:00.000000Z","trail":{"id":"a","index":0,"previous":""},"use":"01"}',
            b'{"a":1}\n{"a":2}',
        ),
    ),
    "pkcs11-uri": Target(
        _pkcs11_uri,
        (
            b"pkcs11:token=orders;serial=0a1b?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/run/pins/orders",
            b"pkcs11:token=a%20b;manufacturer=x;model=y?module-path=m.so&pin-source=file:///run/pin",
            b"pkcs11:token=t?pin-value=1234&module-path=m",
        ),
    ),
    "note": Target(_note, (_TLOG["Notes"][1]["Note"].encode(), _TLOG["Cosigned"]["Note"].encode(), _TLOG["TlogKey"].encode())),
    "tlog-proof": Target(_tlog_proof, (_TLOG["TlogProof"].encode(),)),
    "export": Target(
        _export,
        (
            json.dumps({"checkpoint": _TLOG["Notes"][0]["Note"]}, separators=(",", ":")).encode(),
            (
                b'{"trail_export":"spiffe://example.org/a"}\n{"trail_proof":{"trail":"spiffe://example.org/a","count":0,"head":"","siblings":[],'
                b'"other":[],"heads":"{}","inclusion":[],"checkpoint":""}}'
            ),
            b'{"index":0,"kind":"start","log":"example.org/vectors","trail":{}}\n{"checkpoint":"x"}',
        ),
    ),
    "witness-request": Target(_witness_request, (bytes(AddCheckpoint(3, (bytes(32),), _TLOG["Notes"][1]["Note"].encode())),)),
    "tile": Target(_tile, (b"0/x001/x234/067.p/8", b"entries/000", bundle([b"one", b"two"]))),
    "approval": Target(
        _approval,
        (
            approval.signed(STATEMENT, _APPROVER),
            approval.payload_of(STATEMENT),
            approval.payload_of(statement(verdict="refuse", subject=subject(reason="caf\u00e9 \u202e\n"))),
        ),
    ),
    "bundle": Target(_bundle, (_ROOT.pem, json.dumps(_BUNDLE).encode())),
}
