"""The key of notices on a real SoftHSM: it signs notices that the worker has written itself, and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key

from keybroker.model.key import Algorithm
from keybroker.model.message_signature import content_digest, signature_base
from keybroker.model.task import KeyOpened, KeyRefused, NoticeSigned, OpenKey, SignNotice, SignTask, TaskFailed
from tests.tokens import HsmRoom, make_room, served

TARGET = "https://hooks.example/team"
DIGEST = content_digest(b"{}")


def room_with(directory: Path, notices: str) -> HsmRoom:
    """A room whose token has two keys, one of which signs notices."""
    room = make_room(directory, {"dev": {"orders": Algorithm.ES256, "notices": Algorithm.ES256, "ed": Algorithm.ED25519}})
    config = yaml.safe_load(room.config_file.read_text())
    config["hsm"]["tokens"]["dev"]["notices"] = {"object": notices}
    room.config_file.write_text(yaml.safe_dump(config))
    return room


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HsmRoom]:
    with served(room_with(tmp_path_factory.mktemp("hsm"), "notices")) as room:
        yield room


def test_notice_is_signed_over_what_the_worker_has_written(room: HsmRoom) -> None:
    with room.connect() as connection:
        signed = connection.ask(SignNotice(TARGET, DIGEST, 1_800_000_000))
    assert isinstance(signed, NoticeSigned)
    key = load_der_public_key(signed.spki)
    assert isinstance(key, ec.EllipticCurvePublicKey)
    der = encode_dss_signature(int.from_bytes(signed.signature[:32]), int.from_bytes(signed.signature[32:]))
    base = signature_base(TARGET, DIGEST, 1_800_000_000, hashlib.sha256(signed.spki).hexdigest())
    key.verify(der, base, ec.ECDSA(SHA256()))


def test_key_of_notices_is_given_to_nobody_else(room: HsmRoom) -> None:
    with room.connect() as connection:
        refused = connection.ask(OpenKey("notices/1", "notices", b""))
        assert isinstance(refused, KeyRefused)
        assert refused.rule == "key-is-the-notice-key"
        for ref in ("notices/1", "notices"):
            failed = connection.ask(SignTask(ref, Algorithm.ES256, bytes(32)))
            assert isinstance(failed, TaskFailed)
            assert failed.ckr == "key-not-open"
        assert isinstance(connection.ask(OpenKey("orders/1", "orders", b"")), KeyOpened)


@pytest.mark.parametrize(
    "task",
    [
        SignNotice("http://hooks.example/team", DIGEST, 1_800_000_000),
        SignNotice(f'{TARGET}\n"@method": GET', DIGEST, 1_800_000_000),
        SignNotice(TARGET, "anything at all", 1_800_000_000),
        SignNotice(TARGET, DIGEST, -1),
    ],
)
def test_what_is_no_notice_is_not_signed(room: HsmRoom, task: SignNotice) -> None:
    with room.connect() as connection:
        refused = connection.ask(task)
    assert isinstance(refused, KeyRefused)
    assert refused.rule == "notice-malformed"


@pytest.mark.parametrize(("label", "rule"), [("ed", "notice-key-not-p256"), ("none", "key-missing")])
def test_key_that_cannot_sign_notices_is_refused_and_the_others_serve(tmp_path: Path, label: str, rule: str) -> None:
    with served(room_with(tmp_path, label)) as room, room.connect() as connection:
        refused = connection.ask(SignNotice(TARGET, DIGEST, 1_800_000_000))
        assert isinstance(refused, KeyRefused)
        assert refused.rule == rule
        assert isinstance(connection.ask(OpenKey("orders/1", "orders", b"")), KeyOpened)
