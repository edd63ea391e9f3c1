"""A workload signs: every algorithm, checked by the openssl program; who is refused, and what is on record then."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from keybroker.audit.chain import ChainChecker
from keybroker.client import SignedUse
from keybroker.errors import DeniedError, NotFoundError, RefusalError
from keybroker.model.key import Algorithm
from keybroker.model.request import SignBody
from tests.worlds import World, until

MESSAGE = b"an order for 100\n" * 50
KEYS = {
    "ES256": "orders", "ES384": "p384", "ES512": "p521", "Ed25519": "sessions", "PS256": "invoices", "PS384": "invoices",
    "PS512": "invoices", "RS256": "invoices", "RS384": "invoices", "RS512": "invoices",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _grants_are_live(world: World) -> None:
    def granted() -> bool:
        with world.client() as broker:
            listed = broker.keys()
            return {key.name for key in listed} >= set(KEYS.values())

    until(granted)


def openssl_verifies(tmp_path: Path, algorithm: str, public: str, signature: bytes, message: bytes) -> str:
    """What the openssl program says."""
    for name, data in (("key.pem", public.encode()), ("signature", signature), ("message", message)):
        (tmp_path / name).write_bytes(data)
    if algorithm == "Ed25519":
        command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "key.pem", "-rawin", "-in", "message", "-sigfile", "signature"]
    else:
        command = ["openssl", "dgst", f"-sha{algorithm[2:]}", "-verify", "key.pem", "-signature", "signature"]
        if algorithm.startswith("PS"):
            command += ["-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:digest"]
        command.append("message")
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout.strip()


@pytest.mark.parametrize("algorithm", KEYS)
def test_signature_is_good_to_openssl_and_its_use_on_record(world: World, tmp_path: Path, algorithm: str) -> None:
    key = KEYS[algorithm]
    with world.client() as broker:
        signed = broker.sign(key, algorithm, message=MESSAGE)
        public = broker.public_key(key)
        intent, outcome = broker.record(signed.records.intent), broker.record(signed.records.outcome)
    assert openssl_verifies(tmp_path, algorithm, public, signed.signature, MESSAGE) in {"Verified OK", "Signature Verified Successfully"}
    assert openssl_verifies(tmp_path, algorithm, public, signed.signature, MESSAGE + b"!") != "Verified OK"
    assert outcome.fields["signature_sha256"] == hashlib.sha256(signed.signature).hexdigest()
    assert intent.fields["tbs"]["value"] == hashlib.new(Algorithm(algorithm).hash_name, MESSAGE).hexdigest()
    assert intent.fields["use"] == outcome.fields["use"] == signed.use


def test_digest_is_signed_where_sign_digest_is_granted(world: World, tmp_path: Path) -> None:
    digest = hashlib.sha256(MESSAGE).digest()
    with world.client() as broker:
        signed = broker.sign("orders", "ES256", digest=digest)
        public = broker.public_key("orders")
        with pytest.raises(NotFoundError):
            broker.sign("release", "ES256", digest=digest)
        with pytest.raises(DeniedError):
            broker.sign("p384", "ES384", digest=bytes(48))
    assert openssl_verifies(tmp_path, "ES256", public, signed.signature, MESSAGE) == "Verified OK"


def test_stranger_gets_the_same_answer_for_a_key_of_others_and_for_no_key(world: World) -> None:
    with world.client("carol") as broker:
        answers = []
        for key in ("orders", "no-such-key"):
            with pytest.raises(NotFoundError) as caught:
                broker.sign(key, "ES256", message=b"x")
            answers.append(caught.value.detail)
        assert answers[0] == answers[1]
        assert broker.keys() == ()


def test_batch_signs_every_item_and_names_the_one_that_cannot_be(world: World) -> None:
    items = [SignBody(algorithm=Algorithm.ES256, message=bytes([number])) for number in range(100)]
    items[40] = SignBody(algorithm=Algorithm.PS256, message=b"x")
    with world.client() as broker:
        results = broker.sign_batch("orders", items)
    refused = [index for index, result in enumerate(results) if isinstance(result, RefusalError)]
    assert refused == [40]
    assert len({result.use for result in results if isinstance(result, SignedUse)}) == 99


@pytest.mark.case(20)
def test_idempotency_key_gives_one_use(world: World) -> None:
    with world.client() as broker:
        first = broker.sign("orders", "ES256", message=b"once", idempotency_key="only-once")
        assert broker.sign("orders", "ES256", message=b"once", idempotency_key="only-once") == first
        with pytest.raises(RefusalError) as caught:
            broker.sign("orders", "ES256", message=b"twice", idempotency_key="only-once")
    assert caught.value.code == "idempotency-mismatch"


def test_auditor_reads_everything_and_a_workload_its_own_trail(world: World) -> None:
    with world.client() as broker:
        signed = broker.sign("orders", "ES256", message=b"x")
        assert {record.fields["trail"]["id"] for record in broker.iter_records()} == {"spiffe://example.org/payments/api"}
        with pytest.raises(DeniedError):
            broker.records(workload="spiffe://example.org/human/auditor")
    with world.client("auditor") as broker:
        everything = list(broker.iter_records())
        assert {record.fields["kind"] for record in everything} >= {"start", "admin", "intent", "outcome", "denial", "read"}
        assert [record.fields["use"] for record in broker.iter_records(use=signed.use)] == [signed.use] * 2
    with world.client("ci-release") as broker, pytest.raises(NotFoundError):
        broker.record(signed.records.intent)


def test_record_of_everything_so_far_is_whole(world: World) -> None:
    checker = ChainChecker()
    assert [fault for leaf in world.leaves() for fault in checker.take(leaf)] == []


def test_command_line_signs_verifies_and_shows(world: World, tmp_path: Path) -> None:
    (tmp_path / "order.txt").write_bytes(MESSAGE)
    signature = tmp_path / "order.sig"
    done = world.run("sign", "--key", "orders", "--alg", "ES256", "--out", str(signature), str(tmp_path / "order.txt"))
    assert done.returncode == 0, done.stderr
    verify = ["verify", "--key", "orders", "--alg", "ES256", "--signature", str(signature)]
    assert world.run(*verify, str(tmp_path / "order.txt")).returncode == 0
    (tmp_path / "order.txt").write_bytes(MESSAGE + b"!")
    assert world.run(*verify, str(tmp_path / "order.txt")).returncode == 1
    assert json.loads(world.run("whoami", "--json").stdout)["spiffe_id"] == "spiffe://example.org/payments/api"
    refused = world.run("sign", "--key", "orders", "--alg", "ES256", str(tmp_path / "order.txt"), name="ci-release")
    assert refused.returncode == 3
    assert b"Traceback" not in refused.stderr
    queried = world.run("audit", "query", "--json", "--kind", "denial", "--workload", "spiffe://example.org/ci/release", name="auditor")
    assert all(json.loads(line)["kind"] == "denial" for line in queried.stdout.splitlines())
    assert queried.stdout
