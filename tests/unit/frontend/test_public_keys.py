"""Public keys in each form, as the programs that read them see them: openssl, ssh-keygen, and a reader of JWK that is written anew."""

from __future__ import annotations

import base64
import hashlib
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from keybroker.frontend import public_keys
from keybroker.model.call import KeyReply, PublicVersion

Public = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey

KEYS: dict[str, Public] = {
    "P-256": ec.generate_private_key(ec.SECP256R1()).public_key(),
    "P-384": ec.generate_private_key(ec.SECP384R1()).public_key(),
    "P-521": ec.generate_private_key(ec.SECP521R1()).public_key(),
    "Ed25519": ed25519.Ed25519PrivateKey.generate().public_key(),
    "RSA": rsa.generate_private_key(65537, 2048).public_key(),
}
ALGORITHMS = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512", "Ed25519": "Ed25519"}


def spki(key: Any) -> bytes:
    made: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return made


def version(key: Any, number: int = 1) -> PublicVersion:
    der = spki(key)
    return PublicVersion(number, "family", "enabled", der, hashlib.sha256(der).hexdigest())


def reply(*keys: Any, algorithms: tuple[str, ...] = ()) -> KeyReply:
    return KeyReply("orders", {}, algorithms, tuple(version(key, number) for number, key in enumerate(keys, 1)))


def integer(text: str) -> int:
    return int.from_bytes(octets(text))


def octets(text: str) -> bytes:
    assert "=" not in text
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def from_jwk(jwk: dict[str, Any]) -> Public:
    """RFC 7518 section 6, RFC 8037 section 2."""
    match jwk["kty"]:
        case "EC":
            curve = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}[jwk["crv"]]
            assert len(octets(jwk["x"])) == len(octets(jwk["y"])) == (curve.key_size + 7) // 8
            return ec.EllipticCurvePublicNumbers(integer(jwk["x"]), integer(jwk["y"]), curve).public_key()
        case "OKP":
            assert jwk["crv"] == "Ed25519"
            return ed25519.Ed25519PublicKey.from_public_bytes(octets(jwk["x"]))
        case kind:
            assert kind == "RSA"
            assert octets(jwk["n"])[0] != 0
            return rsa.RSAPublicNumbers(integer(jwk["e"]), integer(jwk["n"])).public_key()


@pytest.mark.parametrize("name", KEYS)
def test_pem_is_the_same_key_to_openssl(name: str) -> None:
    pem = public_keys.pem(spki(KEYS[name]))
    done = subprocess.run(["openssl", "pkey", "-pubin", "-outform", "DER"], input=pem.encode(), capture_output=True, timeout=20, check=True)
    assert done.stdout == spki(KEYS[name])


@pytest.mark.parametrize("name", KEYS)
def test_openssh_line_is_the_same_key_with_its_name(name: str) -> None:
    line = public_keys.openssh("orders", version(KEYS[name], 3))
    assert line.endswith(" orders/3\n")
    assert spki(load_ssh_public_key(line.encode())) == spki(KEYS[name])


@pytest.mark.parametrize("name", KEYS)
def test_openssh_line_is_a_key_to_ssh_keygen(name: str, tmp_path: Path) -> None:
    line = public_keys.openssh("orders", version(KEYS[name]))
    file = tmp_path / "key.pub"
    file.write_text(line)
    done = subprocess.run(["ssh-keygen", "-l", "-E", "sha256", "-f", str(file)], capture_output=True, text=True, timeout=20, check=True)
    digest = base64.b64encode(hashlib.sha256(base64.b64decode(line.split()[1])).digest()).decode().rstrip("=")
    assert f"SHA256:{digest} orders/1" in done.stdout


@pytest.mark.parametrize("name", KEYS)
def test_jwk_is_the_same_key(name: str) -> None:
    key = reply(KEYS[name])
    jwk = public_keys.jwk(key, key.versions[0])
    assert spki(from_jwk(jwk)) == spki(KEYS[name])
    assert (jwk["kid"], jwk["use"]) == ("orders/1", "sig")
    assert jwk.get("alg") == ALGORITHMS.get(name)
    assert not {"d", "p", "q", "dp", "dq", "qi", "k"} & jwk.keys()


def test_jwk_keeps_the_zero_that_a_coordinate_begins_with() -> None:
    scalar = next(n for n in range(1, 5_000) if ec.derive_private_key(n, ec.SECP256R1()).public_key().public_numbers().x >> 248 == 0)
    key = ec.derive_private_key(scalar, ec.SECP256R1()).public_key()
    jwk = public_keys.jwk(reply(key), version(key))
    assert octets(jwk["x"])[0] == 0
    assert spki(from_jwk(jwk)) == spki(key)


@pytest.mark.parametrize(("algorithms", "alg"), [(("PS256",), "PS256"), (("PS256", "RS256"), None), ((), None)])
def test_jwk_of_rsa_names_an_algorithm_if_there_is_only_one(algorithms: tuple[str, ...], alg: str | None) -> None:
    key = reply(KEYS["RSA"], algorithms=algorithms)
    assert public_keys.jwk(key, key.versions[0]).get("alg") == alg


def test_jwk_set_has_every_version_of_every_key() -> None:
    first = reply(KEYS["P-256"], KEYS["P-384"])
    second = KeyReply("release", {}, (), (version(KEYS["RSA"], 7),))
    made = public_keys.jwk_set((first, second))
    assert [each["kid"] for each in made["keys"]] == ["orders/1", "orders/2", "release/7"]
    assert public_keys.jwk_set(()) == {"keys": []}


@pytest.mark.parametrize("key", [ed448.Ed448PrivateKey.generate().public_key(), dsa.generate_private_key(2048).public_key()])
def test_jwk_of_a_key_that_cannot_sign_here_is_refused(key: Any) -> None:
    with pytest.raises(ValueError, match="no kind"):
        public_keys.jwk(reply(key), version(key))
