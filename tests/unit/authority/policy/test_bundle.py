"""Signed bundles: what a good one is, and everything that is not one."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from keybroker.authority.policy import bundle as bundle_module
from keybroker.authority.policy import bundle_maker
from keybroker.authority.policy.bundle import PolicyBundle
from keybroker.authority.policy.bundle_maker import pack
from keybroker.authority.policy.signatures import BundleKeys, PrivateKey, sign, signing_key
from keybroker.errors import ConfigError
from tests.opa import Publisher, write_keys
from tests.policies import GOOD, KEYS, OPA

Members = dict[str, bytes]


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path / "p")


def members_of(packed: bytes) -> Members:
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as archive:
        return {each.name: archive.extractfile(each).read() for each in archive}  # type: ignore[union-attr]  # plain files


def signed(members: Members, publisher: Publisher, scope: str = "") -> bytes:
    """The same files under a new signature."""
    rest = {name: data for name, data in members.items() if name != ".signatures.json"}
    return pack(rest | {".signatures.json": sign(rest, signing_key(publisher.directory / "signing.pem"), scope)})


def read(packed: bytes, publisher: Publisher, scope: str = "") -> PolicyBundle:
    return PolicyBundle.read(packed, BundleKeys.load([publisher.key], scope), "b.tar.gz")


def refusal(packed: bytes, publisher: Publisher, scope: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        read(packed, publisher, scope)
    assert str(caught.value).startswith("b.tar.gz: ")
    return str(caught.value).removeprefix("b.tar.gz: ")


def test_bundle_holds_what_was_put_into_it(publisher: Publisher) -> None:
    made = read(publisher.make(GOOD, 7), publisher)
    assert (made.revision, made.grants, made.module) == (7, {"a.yaml": GOOD.encode()}, None)
    assert made.rego == (bundle_maker.POLICIES / "keybroker.rego").read_bytes()
    assert json.loads(made.data)["keybroker_rules"]["grants"]


@pytest.mark.parametrize("make", [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1, "rsa"])
def test_bundle_signed_with_each_kind_of_key_is_good(publisher: Publisher, make: Callable[[], ec.EllipticCurve] | str) -> None:
    key: PrivateKey = rsa.generate_private_key(65537, 2048) if isinstance(make, str) else ec.generate_private_key(make())
    write_keys(publisher.directory, key=key)
    assert read(publisher.make(GOOD), publisher).revision == 1


def test_same_files_and_rsa_key_make_the_same_bytes(publisher: Publisher) -> None:
    write_keys(publisher.directory, key=rsa.generate_private_key(65537, 2048))
    assert publisher.make(GOOD, 1) == publisher.make(GOOD, 1)


def test_any_of_several_keys_may_have_signed(publisher: Publisher) -> None:
    packed = publisher.make(GOOD)
    write_keys(publisher.directory, "other")
    keys = BundleKeys.load([publisher.directory / "other.pub.pem", publisher.key], "")
    assert PolicyBundle.read(packed, keys, "b").revision == 1


@pytest.mark.case(25)
def test_bundle_of_another_key_or_of_nobody_is_refused(publisher: Publisher) -> None:
    packed = publisher.make(GOOD)
    write_keys(publisher.directory)
    assert refusal(packed, publisher) == "is not signed by a key that this broker trusts"
    members = members_of(packed)
    del members[".signatures.json"]
    assert refusal(pack(members), publisher) == "is not signed; sign it, for example with `keybroker policy bundle`"


@pytest.mark.case(25)
@pytest.mark.parametrize(("asked", "given"), [("", "lab"), ("prod", ""), ("prod", "lab"), ("prod", "prod ")])
def test_bundle_of_another_scope_is_refused(publisher: Publisher, asked: str, given: str) -> None:
    publisher.scope = given
    packed = publisher.make(GOOD)
    assert read(packed, publisher, given).revision == 1
    assert refusal(packed, publisher, asked).startswith("is signed for the scope ")


@pytest.mark.case(25)
@pytest.mark.parametrize("name", [".manifest", "data.json", "policy.rego", "grants/a.yaml"])
def test_file_that_was_changed_removed_or_added_after_signing_is_refused(publisher: Publisher, name: str) -> None:
    members = members_of(publisher.make(GOOD))
    changed = members[name].replace(b"payments", b"payment5").replace(b'"1"', b'"2"').replace(b"package", b"# no\npackage", 1)
    assert changed != members[name]
    assert refusal(pack(members | {name: changed}), publisher) == f"{name} is not what was signed"
    assert "is not over the files that it holds" in refusal(pack({each: members[each] for each in members if each != name}), publisher)
    assert "is not over the files that it holds" in refusal(pack(members | {"grants/z.yaml": b"grants: []"}), publisher)


@pytest.mark.case(25)
def test_every_flipped_byte_of_a_bundle_is_found(publisher: Publisher) -> None:
    packed = publisher.make("grants: []")
    good = read(packed, publisher)
    raw = gzip.decompress(packed)
    for place in range(0, len(raw), 97):
        changed = bytearray(raw)
        changed[place] ^= 1
        try:
            found = read(gzip.compress(bytes(changed), 1), publisher)
        except ConfigError:
            continue
        # Padding, modes and owners are signed by nobody, and mean nothing.
        assert (found.revision, found.grants, found.data, found.rego, found.module) == (
            good.revision, good.grants, good.data, good.rego, good.module,
        )  # fmt: skip


TOKENS: dict[str, Callable[[bytes, PrivateKey], str]] = {
    "none": lambda claims, _: jwt.PyJWS().encode(claims, None, "none"),  # type: ignore[arg-type]  # what an attacker sends
    "an HMAC": lambda claims, _: jwt.PyJWS().encode(claims, "0" * 64, "HS256"),
    "no token": lambda _, __: "a.b.c",
    "empty": lambda _, __: "",
    "unknown header": lambda claims, key: jwt.PyJWS().encode(claims, key, "ES256", headers={"jku": "https://mallory.example"}),
    "claims are no object": lambda _, key: jwt.PyJWS().encode(b"[]", key, "ES256"),
    "claims are no JSON": lambda _, key: jwt.PyJWS().encode(b"\xff", key, "ES256"),
    "no files": lambda _, key: jwt.PyJWS().encode(b"{}", key, "ES256"),
    "a file twice": lambda claims, key: jwt.PyJWS().encode(json.dumps({"files": json.loads(claims)["files"] * 2}).encode(), key, "ES256"),
    "weak hash": lambda claims, key: jwt.PyJWS().encode(claims.replace(b"SHA-256", b"MD5"), key, "ES256"),
}


@pytest.mark.case(25)
@pytest.mark.parametrize("name", TOKENS)
def test_signature_that_is_none_is_refused(publisher: Publisher, name: str) -> None:
    members = members_of(publisher.make(GOOD))
    token = json.loads(members[".signatures.json"])["signatures"][0]
    key = signing_key(publisher.directory / "signing.pem")
    claims = jwt.PyJWS().decode(token, key.public_key(), algorithms=["ES256"])
    forged = json.dumps({"signatures": [TOKENS[name](claims, key)]}).encode()
    assert refusal(pack(members | {".signatures.json": forged}), publisher)


@pytest.mark.case(25)
@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"signatures": []}', '{"signatures": [1]}', '{"signatures": null}', "\xff", "[" * 100_000]
)
def test_signature_file_that_holds_not_exactly_one_is_refused(publisher: Publisher, text: str) -> None:
    members = members_of(publisher.make(GOOD))
    assert refusal(pack(members | {".signatures.json": text.encode("latin-1")}), publisher)
    token = json.loads(members[".signatures.json"])["signatures"][0]
    assert refusal(pack(members | {".signatures.json": json.dumps({"signatures": [token, token]}).encode()}), publisher)


@pytest.mark.case(25)
@pytest.mark.parametrize(
    "manifest",
    [b"", b"{}", b"[]", b'{"revision": 1}', b'{"revision":"1"}', b'{"revision":"1","roots":[]}', b'{"revision":"1","roots":[""]}',
     b'{"revision":"1","roots":["keybroker","keybroker_rules","system"]}', b'{"revision":"1","roots":["keybroker"]}',
     b'{"revision":"","roots":["keybroker","keybroker_rules"]}', b'{"revision":"v1","roots":["keybroker","keybroker_rules"]}',
     b'{"revision":"-1","roots":["keybroker","keybroker_rules"]}', b'{"revision":"01","roots":["keybroker","keybroker_rules"]}',
     b'{"revision":"1 ","roots":["keybroker","keybroker_rules"]}',
     b'{"revision":"1234567890123456","roots":["keybroker","keybroker_rules"]}',
     b'{"revision":"1","roots":["keybroker","keybroker_rules"],"rego_version":0}',
     b'{"revision":"1","roots":["keybroker","keybroker_rules"],"wasm":[{"entrypoint":"x","module":"policy.wasm"}]}'],
)  # fmt: skip
def test_manifest_that_is_not_one_of_ours_is_refused_even_when_signed(publisher: Publisher, manifest: bytes) -> None:
    members = members_of(publisher.make(GOOD))
    try:
        packed = signed(members | {".manifest": manifest}, publisher)
    except ValueError:  # not JSON: nobody can sign it
        packed = pack(members | {".manifest": manifest})
    assert refusal(packed, publisher)


@pytest.mark.case(25)
@pytest.mark.parametrize("name", [".manifest", "data.json", "policy.rego"])
def test_signed_bundle_without_one_of_its_files_is_refused(publisher: Publisher, name: str) -> None:
    members = members_of(publisher.make(GOOD))
    del members[name]
    assert refusal(signed(members, publisher), publisher).startswith(f"holds no {name}")


@pytest.mark.case(25)
@pytest.mark.parametrize(
    "name",
    ["../data.json", "grants/../../x.yaml", "//data.json", "/etc/passwd", "other.rego", "grants/more/a.yaml", "grants/.a.yaml",
     "grants/a.yml", "data.yaml", "a/data.json", "grants/a.rego", "policy.rego\n", "grants/\u00e4.yaml", "plan.json"],
)  # fmt: skip
def test_file_that_does_not_belong_into_a_bundle_is_refused_even_when_signed(publisher: Publisher, name: str) -> None:
    members = members_of(publisher.make(GOOD))
    assert refusal(signed(members | {name: b"{}"}, publisher), publisher)


def tar_of(*members: tarfile.TarInfo, format_: int = tarfile.USTAR_FORMAT) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=format_) as tar:
        for each in members:
            tar.addfile(each, io.BytesIO(b"x" * each.size) if each.isreg() else None)
    return made.getvalue()


def member(name: str = "data.json", kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.size, made.linkname = kind, size, link
    return made


ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "a symbolic link": (lambda: tar_of(member(kind=tarfile.SYMTYPE, link="/etc/passwd")), "not a plain file"),
    "a hard link": (lambda: tar_of(member(), member("policy.rego", tarfile.LNKTYPE, link="data.json")), "not a plain file"),
    "a directory": (lambda: tar_of(member("grants", tarfile.DIRTYPE)), "not a plain file"),
    "a device": (lambda: tar_of(member(kind=tarfile.CHRTYPE)), "not a plain file"),
    "a pipe": (lambda: tar_of(member(kind=tarfile.FIFOTYPE)), "not a plain file"),
    "a pax header": (lambda: tar_of(member("grants/" + "a" * 190 + ".yaml"), format_=tarfile.PAX_FORMAT), "not a plain file"),
    "a file twice": (lambda: tar_of(member(), member()), "holds data.json twice"),
    "a file twice, once with a slash": (lambda: tar_of(member(), member("/data.json")), "holds data.json twice"),
    "a file twice, once with a dot": (lambda: tar_of(member(), member("./data.json")), "holds data.json twice"),
    "too many files": (lambda: tar_of(*(member(f"grants/{n}.yaml") for n in range(2_001))), "holds more than 2000 files"),
    "no tar": (lambda: b"x" * 2_048, "is not a tar archive"),
    "cut off in a file": (lambda: tar_of(member(size=5_000))[:2_048], "is cut off"),
    "cut off after a file": (lambda: tar_of(member(size=512))[:1_024], "cut off there"),
    "something behind the end": (lambda: tar_of(member()) + b"x", "something behind its last file"),
    "another archive behind the end": (lambda: tar_of(member()) + tar_of(member("policy.rego")), "something behind its last file"),
    "a broken header behind a file": (lambda: tar_of(member())[:512] + b"x" * 512 + bytes(1_024), "something behind its last file"),
}  # fmt: skip


@pytest.mark.case(25)
@pytest.mark.parametrize("name", ARCHIVES)
def test_archive_that_could_be_read_in_two_ways_is_refused(publisher: Publisher, name: str) -> None:
    make, why = ARCHIVES[name]
    assert why in refusal(gzip.compress(make()), publisher)


@pytest.mark.case(25)
def test_file_that_is_no_gzip_cut_off_doubled_or_empty_is_refused(publisher: Publisher) -> None:
    packed = publisher.make(GOOD)
    assert refusal(b"", publisher) == "is cut off"
    assert refusal(b"x" * 100, publisher) == "is not a gzip file"
    assert refusal(gzip.decompress(packed), publisher) == "is not a gzip file"
    for size in (5, 20, len(packed) // 2, len(packed) - 1):
        assert refusal(packed[:size], publisher) in {"is cut off", "is not a gzip file"}
    assert refusal(packed + b"\0", publisher) == "has something behind its end"
    assert refusal(packed + packed, publisher) == "has something behind its end"
    assert refusal(packed[:-8] + b"\0" * 8, publisher) == "is not a gzip file"  # its checksum


@pytest.mark.case(25)
def test_bomb_and_large_file_are_refused_before_they_are_unpacked(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = gzip.compress(bytes(200 * 1024 * 1024), 1)
    assert len(bomb) < 1_000_000
    assert refusal(bomb, publisher) == f"unpacks to more than {128 * 1024 * 1024} bytes"
    monkeypatch.setattr(bundle_module, "MAX_BUNDLE_BYTES", 1_000)
    assert refusal(publisher.make(GOOD), publisher) == "larger than 1000 bytes"


def test_key_that_cannot_verify_bundles_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "k.pem"
    weak = rsa.generate_private_key(65537, 1024)  # noqa: S505  that is the point
    odd: list[PublicKeyTypes] = [
        ec.generate_private_key(ec.SECP256K1()).public_key(),
        ed25519.Ed25519PrivateKey.generate().public_key(),
        weak.public_key(),
    ]
    for key in odd:
        file.write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        with pytest.raises(ConfigError, match="bundles are signed with"):
            BundleKeys.load([file], "")
    for text in (b"", b"secret", weak.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())):
        file.write_bytes(text)
        with pytest.raises(ConfigError, match="not a public key in PEM"):
            BundleKeys.load([file], "")
    with pytest.raises(ConfigError, match="cannot be read"):
        BundleKeys.load([tmp_path / "absent"], "")
    with pytest.raises(ConfigError, match="at least one key"):
        BundleKeys.load([], "")


@pytest.mark.parametrize(
    ("file", "why"),
    [("data.yaml", "cannot be the name of a grant file in a bundle"), ("a b.yaml", "cannot be the name of a grant file in a bundle")],
)
def test_grant_file_that_opa_would_take_for_data_is_not_packed(publisher: Publisher, file: str, why: str) -> None:
    (publisher.directory / "grants" / file).write_text("grants: []")
    with pytest.raises(ConfigError, match=why):
        publisher.make(GOOD)


def test_grants_that_a_broker_would_refuse_and_wrong_revisions_are_not_packed(publisher: Publisher) -> None:
    with pytest.raises(ConfigError, match=r"a\.yaml:1: nonsense: unknown field"):
        publisher.make("nonsense: 1")
    for revision in (-1, 10**15):
        with pytest.raises(ConfigError, match="a revision is a whole number"):
            publisher.make(GOOD, revision)
    with pytest.raises(ConfigError, match="there is no grant file"):
        bundle_maker.make(publisher.state, 1, signing_key(publisher.directory / "signing.pem"), "", None, KEYS)


# OPA's own tools.


def test_bundle_that_opa_signed_is_good_and_hashes_are_the_same(publisher: Publisher, tmp_path: Path) -> None:
    directory = tmp_path / "b"
    members = members_of(publisher.make(GOOD, 4))
    del members[".signatures.json"]
    odd = {
        "a": ['\u2028\u2029\u00e4<>&"\\/\b\f\n\r\t\u0001\u007f\U0001f600', 0, -5, 12345678901234567890, True, None],
        "\u00e4": {},
        "Z": [],
    }
    manifest = json.loads(members[".manifest"]) | {"metadata": odd}
    members[".manifest"] = json.dumps(manifest, indent=3).encode()
    for name, data in members.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    command = [str(OPA), "sign", "--signing-alg", "ES256", "--signing-key", str(publisher.directory / "signing.pem"), "--bundle", ".",
               "-o", str(tmp_path)]  # fmt: skip
    subprocess.run(command, cwd=directory, check=True, timeout=60)
    assert read(pack(members | {".signatures.json": (tmp_path / ".signatures.json").read_bytes()}), publisher).revision == 4
