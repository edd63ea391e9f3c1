"""A token with one key for each thing that can be wrong with one: `python -m tests.bad_keys DIRECTORY LABEL`, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pkcs11
from pkcs11 import Attribute, KeyType, ObjectClass
from pkcs11.util.ec import encode_named_curve_parameters

from keybroker.hsm.pkcs11_token import Pkcs11Token
from keybroker.hsm.softhsm import module_path
from keybroker.model.key import Algorithm
from keybroker.model.pkcs11_uri import Pkcs11Uri

BAD_KEYS = {
    "extractable": "key-extractable",
    "not-sensitive": "key-not-sensitive",
    "twice": "key-ambiguous",
    "missing": "key-missing",
    "cannot-sign": "key-cannot-sign",
    "asks-each-time": "key-always-authenticate",
    "koblitz": "key-unsupported",
    "rsa-1024": "key-unsupported",
    "no-public-half": "key-no-public-half",
    "data": "key-wrong-class",
}
"""Labels, and the rule that each breaks."""


def add_bad_keys(home: Path, label: str) -> None:
    """Add them to the token that `make_token` made in a directory; also `rsa-3072` and `rsa-4096`, which are good."""
    environment = {**os.environ, "SOFTHSM2_CONF": str(home / "softhsm2.conf")}
    command = [sys.executable, "-m", "tests.bad_keys", str(home), label]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr


def _fill(home: Path, label: str) -> None:
    token = Pkcs11Token.log_in(Pkcs11Uri(label, "", "", "", module_path(), home / "pin"), can_write=True)
    session = token._session

    def pair(label: str, curve: str = "secp256r1", **private: object) -> tuple[pkcs11.PublicKey, pkcs11.PrivateKey]:
        template = {Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False} | {Attribute[name]: value for name, value in private.items()}
        parameters = {Attribute.EC_PARAMS: encode_named_curve_parameters(curve)}
        domain = session.create_domain_parameters(KeyType.EC, parameters, local=True)
        made: tuple[pkcs11.PublicKey, pkcs11.PrivateKey] = domain.generate_keypair(
            id=os.urandom(8), label=label, store=True, private_template=template
        )
        return made

    pair("extractable", EXTRACTABLE=True)
    pair("not-sensitive", SENSITIVE=False)
    pair("twice")
    pair("twice")
    pair("cannot-sign", SIGN=False)
    pair("asks-each-time", ALWAYS_AUTHENTICATE=True)
    pair("koblitz", curve="secp256k1")
    public, _ = pair("no-public-half")
    public.destroy()
    token.generate(Algorithm.PS256, "rsa-1024", b"\x01\x02", rsa_bits=1024)
    for bits in (3072, 4096):
        token.generate(Algorithm.PS256, f"rsa-{bits}", bits.to_bytes(2), rsa_bits=bits)
    session.create_object({Attribute.CLASS: ObjectClass.DATA, Attribute.LABEL: "data", Attribute.VALUE: b"x", Attribute.TOKEN: True})
    token.close()


if __name__ == "__main__":
    _fill(Path(sys.argv[1]), sys.argv[2])
