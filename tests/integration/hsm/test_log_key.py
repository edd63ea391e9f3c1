"""The log's key in a real SoftHSM: it signs checkpoints, and no frame gets anything else out of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from keybroker.audit.checkpoint import SignedCheckpoint
from keybroker.audit.note import VerifierKey
from keybroker.hsm.softhsm import LOG_KEY_FILE, LOG_LABEL, make_token
from keybroker.model.key import Algorithm
from keybroker.model.task import CheckpointRefused, CheckpointSigned, KeyOpened, KeyRefused, LogOpened, OpenLog, SignCheckpoint, TaskFailed
from tests.tokens import HsmRoom, served

ORIGIN = "example.org/log"


def make_room(directory: Path, log: dict[str, str]) -> HsmRoom:
    made = make_token(directory, {"p256": Algorithm.ES256, "ed": Algorithm.ED25519}, label="dev", log=ORIGIN)
    socket = directory / "dev.sock"
    section = {
        "uri": made.uri.replace("file:pin", f"file:{directory / 'pin'}"),
        "sockets": [str(socket)],
        "module_environment": {"SOFTHSM2_CONF": str(made.configuration)},
        "log": log,
    }
    config_file = directory / "hsm.yaml"
    config_file.write_text(yaml.safe_dump({"hsm": {"tokens": {"dev": section}}}))
    return HsmRoom(directory, config_file, {"dev": [socket]})


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HsmRoom]:
    with served(make_room(tmp_path_factory.mktemp("hsm"), {"origin": ORIGIN, "object": LOG_LABEL})) as room:
        yield room


def key_of(room: HsmRoom) -> VerifierKey:
    return VerifierKey.parse((room.directory / LOG_KEY_FILE).read_text().strip())


def test_worker_signs_checkpoints_and_remembers_them_across_connections(room: HsmRoom) -> None:
    key = key_of(room)
    with room.connect() as connection:
        assert connection.ask(OpenLog()) == LogOpened(str(key), b"")
        product = connection.ask(SignCheckpoint(7, b"\x07" * 32))
        assert isinstance(product, CheckpointSigned)
        head = SignedCheckpoint.open(product.note, key).checkpoint
        assert (head.origin, head.size, head.root, head.extensions) == (ORIGIN, 7, b"\x07" * 32, ())
    with room.connect() as connection:
        assert connection.ask(OpenLog()) == LogOpened(str(key), product.note)
        assert connection.ask(SignCheckpoint(6, b"\x06" * 32, product.note)) == CheckpointRefused("smaller-than-signed", product.note)
        assert connection.ask(SignCheckpoint(9, b"\x09" * 32)) == CheckpointRefused("previous-is-not-the-last", product.note)


def test_log_key_is_given_out_under_no_name(room: HsmRoom) -> None:
    spki_end = key_of(room).public
    with room.connect() as connection:
        refused = connection.open(LOG_LABEL)
        assert isinstance(refused, KeyRefused)
        assert refused.rule == "key-is-the-log-key"
        for name in (LOG_LABEL, "log"):
            failed = connection.sign(name, Algorithm.ED25519, b"anything")
            assert failed == TaskFailed("key-not-open", may_have_signed=False, is_session_lost=False)
        other = connection.open("ed")
        assert isinstance(other, KeyOpened)
        assert not other.spki.endswith(spki_end)


@pytest.mark.parametrize(
    ("log", "rule"),
    [
        ({"origin": ORIGIN, "object": "nothing"}, "key-missing"),
        ({"origin": ORIGIN, "object": "p256"}, "log-key-not-ed25519"),
        ({}, "log-not-here"),
    ],
)
def test_nothing_is_signed_when_there_is_no_good_log_key(tmp_path: Path, log: dict[str, str], rule: str) -> None:
    room = make_room(tmp_path, log)
    if not log:
        config = yaml.safe_load(room.config_file.read_text())
        del config["hsm"]["tokens"]["dev"]["log"]
        room.config_file.write_text(yaml.safe_dump(config))
    with served(room), room.connect() as connection:
        for work in (OpenLog(), SignCheckpoint(7, bytes(32))):
            refused = connection.ask(work)
            assert isinstance(refused, KeyRefused)
            assert refused.rule == rule
        assert isinstance(connection.open("ed"), KeyOpened)
