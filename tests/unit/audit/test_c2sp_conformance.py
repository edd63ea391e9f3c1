# ruff: noqa: E501  sentences of the specifications are quoted whole
"""One test for each MUST and MUST NOT of the C2SP specifications signed-note, tlog-checkpoint, tlog-cosignature, tlog-proof and
tlog-tiles that concerns what this package reads or writes, with its words.

Left out, because they bind others, or something that is not made here:
- signed-note, ECDSA (0x02), and tlog-cosignature, ML-DSA-44 (0x06): not made and not verified here; such signatures are ignored
  like any of an unknown key ("implementations SHOULD select only the one(s) required").
- signed-note "a different key ID MUST be used for each signature type": the type byte is in the hash (`test_note_key_id`).
- tlog-cosignature "MUST use distinct public keys for each cosigner", "A given tuple MUST imply a single set of statements":
  operators of witnesses.
- tlog-tiles, pruning: logs are never pruned here, so that the minimum index is zero.
- tlog-tiles, "A client, such as a Monitor, that tails": there is no such client here; "MUST be served as a checkpoint at
  <prefix>/checkpoint" and content types: tests/e2e/test_log.py.
- tlog-checkpoint "A log MUST not sign any checkpoint which is inconsistent": tests/unit/authority/test_checkpoints.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from keybroker.audit.checkpoint import Checkpoint, SignedCheckpoint
from keybroker.audit.leaf import leaf_hash
from keybroker.audit.merkle import EMPTY_ROOT, ProofError, root_of
from keybroker.audit.note import Note, NoteError, NoteSignature, SignatureType, VerifierKey, cosigned_message
from keybroker.audit.proof import TlogProof
from keybroker.audit.tiles import ENTRIES, Tile, TileError, bundle, entries_in, hashes_in, tiles_of

DIRECTORY = Path(__file__).parents[2] / "vectors"
NOTES: dict[str, Any] = json.loads((DIRECTORY / "note.json").read_text())
TLOG: dict[str, Any] = json.loads((DIRECTORY / "tlog.json").read_text())
PETER, ENOCH = VerifierKey.parse(NOTES["peter"]), VerifierKey.parse(NOTES["enoch"])
TEXT, PETERS, ENOCHS = NOTES["text"], NOTES["peter_line"], NOTES["enoch_line"]
LOG = VerifierKey.parse(TLOG["TlogKey"])
WITNESS = VerifierKey.parse(TLOG["Cosigned"]["Key"])
CHECKPOINT: bytes = TLOG["Notes"][-1]["Note"].encode()
PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(32))
PUBLIC = PRIVATE.public_key().public_bytes_raw()


def note(*lines: str, text: str = TEXT) -> Note:
    return Note.parse((text + "\n" + "".join(lines)).encode())


def refused(data: str | bytes) -> None:
    with pytest.raises(NoteError):
        Note.parse(data.encode() if isinstance(data, str) else data)


def signed(text: str, name: str = "example.org/log") -> tuple[bytes, VerifierKey]:
    key = VerifierKey(name, SignatureType.ED25519, PUBLIC)
    return bytes(Note(text, (NoteSignature(name, key.id, PRIVATE.sign(text.encode())),))), key


# signed-note


def test_note_untrusted_text() -> None:
    """ "The text MUST be ignored unless the note is signed by a trusted key and the signature has been verified." """
    with pytest.raises(NoteError, match="not signed"):
        note(PETERS).verified([ENOCH])
    with pytest.raises(NoteError, match="not signed"):
        note(PETERS).verified([])


def test_note_utf8() -> None:
    """Format: "Signed notes MUST be valid UTF-8 and MUST NOT contain any ASCII control characters (those below U+0020) other than newline." """
    refused(b"\xff" + (TEXT + "\n" + PETERS).encode())
    for number in (*range(10), *range(11, 32)):
        refused(f"a{chr(number)}b\n\n{PETERS}")
    assert note(PETERS, text="è subito sera\x7f\n").text == "è subito sera\x7f\n"


def test_note_text_and_separator() -> None:
    """Format: "the text is separated from the signatures by the last empty line in the note", "The note text MAY contain empty lines"."""
    with_gap = "one\n\ntwo\n\n\nthree\n"
    parsed = note(PETERS, ENOCHS, text=with_gap)
    assert parsed.text == with_gap
    assert len(parsed.signatures) == 2
    assert bytes(parsed) == (with_gap + "\n" + PETERS + ENOCHS).encode()


def test_note_malformed() -> None:
    """Format: a text ending in newline, a blank line, one or more signature lines; the malformed ones of golang.org/x/mod are refused."""
    for each in NOTES["bad_notes"]:
        refused(each)


def test_note_key_names() -> None:
    """Format: "Key names MUST be non-empty and MUST NOT contain any Unicode spaces or plus (U+002B) characters." """
    rest = PETERS.rpartition(" ")[2]
    for name in ("", "a b", "a+b", "a\u00a0b", "a\u2003b", "a\u3000b", "a\u0085b"):
        refused(f"{TEXT}\n— {name} {rest}")
        with pytest.raises(NoteError):
            VerifierKey.parse(f"{name}+{PETER.id.hex()}+{NOTES['peter'].rpartition('+')[2]}")


def test_note_signature_line() -> None:
    """Format: "em dash (U+2014), space (U+0020), key name, space, base64-encoded signature, newline"; "the base64 encoding of 4+n bytes"."""
    for line in (PETERS.replace("—", "-"), PETERS.replace("— ", "—"), "— a AAAA\n", "— a AAAAAA==\n", "— a AAAAAAB=\n", "— a !AAAAAAA\n"):
        refused(TEXT + "\n" + line)
    assert str(note(PETERS).signatures[0]) == PETERS


def test_note_sixteen_signatures() -> None:
    """Format: "Verifiers SHOULD apply a maximum limit to the number of signatures in a note, but MUST accept at least up to 16 signatures." """
    large = str(NoteSignature("pq", b"abcd", bytes(5_000)))
    assert PETER in note(*[large] * 15, PETERS).verified([PETER])
    refused(TEXT + "\n" + PETERS * 101)
    refused("x" * 1_000_000 + "\n\n" + PETERS)


def test_note_unknown_keys_are_ignored() -> None:
    """Signatures: "Verifiers MUST ignore signatures from unknown keys, even if they share a name or ID (but not both) with a known key." """
    same_name = str(NoteSignature(PETER.name, b"abcd", bytes(64)))
    same_id = str(NoteSignature("other", PETER.id, bytes(64)))
    assert list(note(same_name, same_id, ENOCHS, PETERS).verified([PETER])) == [PETER]


def test_note_known_key_must_verify() -> None:
    """Signatures: "If the key name and ID match a known key, verifiers MUST verify the signature. If a signature from a known key fails to verify, clients SHOULD reject the whole note." """
    forged = str(NoteSignature(PETER.name, PETER.id, bytes(64)))
    for lines in ((forged,), (PETERS, forged), (ENOCHS, forged)):
        with pytest.raises(NoteError, match="does not verify"):
            note(*lines).verified([PETER, ENOCH])
    with pytest.raises(NoteError, match="does not verify"):
        note(PETERS, text=TEXT.replace("answer", "reply")).verified([PETER])


def test_note_none_verifies() -> None:
    """Signatures: "If no signature from a known key verifies successfully, clients MUST reject the note." """
    with pytest.raises(NoteError):
        note(ENOCHS).verified([PETER])
    assert set(note(PETERS, ENOCHS).verified([PETER, ENOCH])) == {PETER, ENOCH}


def test_note_key_id() -> None:
    """Signatures: "key ID = SHA-256(key name || 0x0A || signature type || public key)[:4]"."""
    assert PETER.id.hex() == "c74f20a3"
    assert str(PETER) == NOTES["peter"]
    by_hand = hashlib.sha256(b"example.org/log\n\x01" + PUBLIC).digest()[:4]
    assert VerifierKey("example.org/log", SignatureType.ED25519, PUBLIC).id == by_hand
    assert VerifierKey("example.org/log", SignatureType.COSIGNATURE_V1, PUBLIC).id != by_hand


def test_note_verifier_keys() -> None:
    """Verifier keys: "The key name and ID MUST match those used in the signatures"; manglings that golang.org/x/mod refuses are refused."""
    vkey = NOTES["peter"]
    mangled = [vkey[low:high] for low in range(len(vkey)) for high in range(low + 1, len(vkey) + 1) if high - low < len(vkey)]
    mangled += [vkey[:place] + chr(ord(vkey[place]) + 1) + vkey[place + 1 :] for place in range(len(vkey))]
    for each in [*mangled, *NOTES["bad_keys"], vkey.upper(), vkey + "\n"]:
        with pytest.raises(NoteError):
            VerifierKey.parse(each)


def test_note_example() -> None:
    """Verifier keys, example: "The following verifier key verifies the following signed note"."""
    for each in NOTES["c2sp"]:
        key = VerifierKey.parse(each["key"])
        assert key in Note.parse(each["note"].encode()).verified([key])


# tlog-checkpoint


def test_checkpoint_of_others_opens() -> None:
    for each in TLOG["Notes"]:
        opened = SignedCheckpoint.open(each["Note"].encode(), VerifierKey.parse(each["Key"]))
        assert base64.b64encode(opened.checkpoint.root).decode() == TLOG["Roots"][opened.checkpoint.size]
        assert opened.checkpoint.text() == Note.parse(opened.note).text


def test_checkpoint_lines() -> None:
    """Note text: "a sequence of at least three non-empty lines, separated by newlines"."""
    root = base64.b64encode(bytes(32)).decode()
    good = f"example.org/log\n7\n{root}\n"
    assert Checkpoint.parse(good) == Checkpoint("example.org/log", 7, bytes(32))
    for bad in ("", "\n", good[:-1], "\n" + good, good + "\n", "example.org/log\n7\n", f"example.org/log\n\n{root}\n"):
        with pytest.raises(NoteError):
            Checkpoint.parse(bad)


def test_checkpoint_origin() -> None:
    """Note text 1: "The origin MUST be non-empty", "clients MUST NOT assume that the origin is following this format"."""
    root = base64.b64encode(bytes(32)).decode()
    with pytest.raises(NoteError):
        Checkpoint.parse(f"\n7\n{root}\n")
    assert Checkpoint.parse(f"Any text + spaces\n7\n{root}\n").origin == "Any text + spaces"


def test_checkpoint_size() -> None:
    """Note text 2: "the ASCII decimal representation of the number of leaves in the tree, with no leading zeroes (unless the tree is empty, in which case the tree size is `0`)"."""
    root = base64.b64encode(bytes(32)).decode()
    for bad in ("07", "00", "-1", "+7", "7 ", " 7", "7.0", "0x7", "1_0", "\u0667", "²", str(2**63)):
        with pytest.raises(NoteError):
            Checkpoint.parse(f"a\n{bad}\n{root}\n")
    assert Checkpoint.parse(f"a\n{2**63 - 1}\n{root}\n").size == 2**63 - 1
    assert Checkpoint.parse(f"a\n0\n{base64.b64encode(EMPTY_ROOT).decode()}\n").size == 0


def test_checkpoint_root() -> None:
    """Note text 3: "the base64 encoding of the root of the RFC 6962 Merkle hash tree at the specified tree size"."""
    for bad in (base64.b64encode(bytes(31)).decode(), base64.b64encode(bytes(33)).decode(), "AA", "!" * 44):
        with pytest.raises(NoteError):
            Checkpoint.parse(f"a\n7\n{bad}\n")
    with pytest.raises(NoteError):
        Checkpoint.parse(f"a\n0\n{base64.b64encode(bytes(32)).decode()}\n")


def test_checkpoint_extension_lines() -> None:
    """Note text 4: "Extension lines, if any, MUST be non-empty."; they are signed with the rest."""
    root = base64.b64encode(bytes(32)).decode()
    text = f"example.org/log\n7\n{root}\nmore\n"
    assert Checkpoint.parse(text).extensions == ("more",)
    assert Checkpoint.parse(text).text() == text
    with pytest.raises(NoteError):
        Checkpoint.parse(f"example.org/log\n7\n{root}\n\nmore\n")
    data, key = signed(text)
    assert SignedCheckpoint.open(data, key).checkpoint.extensions == ("more",)
    with pytest.raises(NoteError):
        SignedCheckpoint.open(data.replace(b"more", b"less"), key)


def test_checkpoint_unknown_signatures() -> None:
    """Signatures: "clients MUST ignore unknown signatures"; one of the log must be there all the same."""
    assert SignedCheckpoint.open(CHECKPOINT + ENOCHS.encode(), LOG).cosignatures == {}
    text = Note.parse(CHECKPOINT).text
    with pytest.raises(NoteError):
        SignedCheckpoint.open((text + "\n" + ENOCHS).encode(), LOG)
    cosigned_only = (text + "\n" + str(Note.parse(TLOG["Cosigned"]["Note"].encode()).signatures[1])).encode()
    with pytest.raises(NoteError, match="log's key"):
        SignedCheckpoint.open(cosigned_only, LOG, [WITNESS])


def test_checkpoint_of_another_origin_is_refused_although_the_key_signed_it() -> None:
    data, key = signed(f"example.org/other\n7\n{base64.b64encode(bytes(32)).decode()}\n")
    with pytest.raises(NoteError, match="another log"):
        SignedCheckpoint.open(data, key)


# tlog-cosignature


def test_cosignature_key_id() -> None:
    """Format: "The key ID for Ed25519 cosignatures MUST be computed as SHA-256(<name> || "\\n" || 0x04 || 32-byte Ed25519 cosigner public key)[:4]"."""
    assert WITNESS.type is SignatureType.COSIGNATURE_V1
    assert WITNESS.id == hashlib.sha256(b"witness.example/w1\n\x04" + WITNESS.public).digest()[:4]


def test_cosignature_of_others_opens() -> None:
    """Format: "The signature MUST be a `timestamped_signature` structure."; it is found and its time is told."""
    opened = SignedCheckpoint.open(TLOG["Cosigned"]["Note"].encode(), LOG, [WITNESS])
    assert opened.cosignatures[WITNESS].timestamp == TLOG["CosignedTime"]
    assert len(opened.cosignatures[WITNESS].data) == 8 + 64


def test_cosignature_timestamp() -> None:
    """Format: "It MUST NOT exceed 2^63 - 1"; signed message: "encoded as an ASCII decimal with no leading zeroes"."""
    key = VerifierKey("w", SignatureType.COSIGNATURE_V1, PUBLIC)
    for timestamp, is_good in ((1, True), (2**63 - 1, True), (2**63, False), (2**64 - 1, False)):
        data = timestamp.to_bytes(8) + PRIVATE.sign(cosigned_message(TEXT.encode(), timestamp))
        assert key.verifies(TEXT.encode(), data) is is_good
        assert not key.verifies(TEXT.encode(), (timestamp ^ 2).to_bytes(8) + data[8:])
    assert not key.verifies(TEXT.encode(), b"short")


def test_cosignature_message() -> None:
    """Ed25519 signed message: "MUST be two newline terminated lines followed by the whole note body"; "The header line MUST be the fixed string `cosignature/v1`"; "The timestamp line MUST consist of the string `time`, a single space (0x20), and" the time; "if present [extension lines] MUST be included"."""
    text = b"example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\nmore\n"
    assert cosigned_message(text, 1679315147) == b"cosignature/v1\ntime 1679315147\n" + text


# tlog-proof


def test_proof_of_others_verifies() -> None:
    proof = TlogProof.parse(TLOG["TlogProof"].encode())
    assert bytes(proof) == TLOG["TlogProof"].encode()
    assert proof.extra == b"hello"
    assert proof.index == 69
    leaf = leaf_hash(base64.b64decode(TLOG["TlogLeaf"]))
    assert proof.verify(leaf, LOG).checkpoint.size == 600
    for wrong, key in ((bytes(32), LOG), (leaf, PETER)):
        with pytest.raises((NoteError, ProofError)):
            proof.verify(wrong, key)


def proof_lines(*lines: str) -> bytes:
    return "\n".join([*lines, "", ""]).encode() + CHECKPOINT


def test_proof_header() -> None:
    """Format: "The first line MUST be the string `c2sp.org/tlog-proof@v1`."; the malformed ones of transparency-dev are refused."""
    header, some, long = "c2sp.org/tlog-proof@v1", base64.b64encode(bytes(32)).decode(), base64.b64encode(bytes(64)).decode()
    assert TlogProof.parse(proof_lines(header, "index 0", some)).hashes == (bytes(32),)
    for bad in (
        ("wrong-header", "index 0"),
        (header + "x", "index 0"),
        (header, "extra !!notbase64!!", "index 0"),
        (header,),
        (header, "index notanumber"),
        (header, "index -5"),
        (header, "index 0", "!!notbase64!!"),
        (header, "index 0", long),
        (header, "index 0", *[some] * 64),
    ):
        with pytest.raises(NoteError):
            TlogProof.parse(proof_lines(*bad))


def test_proof_index() -> None:
    """Format: "The next line MUST start with the string `index` followed by a space (U+0020) and the zero-based index of the entry in the log, represented as an ASCII decimal with no leading zeroes (unless the index is `0`)"."""
    header = "c2sp.org/tlog-proof@v1"
    for bad in ("index 007", "index", "index  7", "Index 7", "index 7 ", "index +7"):
        with pytest.raises(NoteError):
            TlogProof.parse(proof_lines(header, bad))
    assert TlogProof.parse(proof_lines(header, "index 0")).index == 0


def test_proof_extra() -> None:
    """Format: "If no extra data is present, this line is omitted. Applications MUST NOT implicitly trust the extra data": nothing here looks at it."""
    proof = TlogProof.parse(TLOG["TlogProof"].encode())
    leaf = leaf_hash(base64.b64decode(TLOG["TlogLeaf"]))
    other = TlogProof(proof.index, proof.hashes, proof.checkpoint, b"other")
    assert other.verify(leaf, LOG) == TlogProof(proof.index, proof.hashes, proof.checkpoint).verify(leaf, LOG)
    assert b"extra" not in bytes(TlogProof(proof.index, proof.hashes, proof.checkpoint))


def test_proof_quorum_of_witnesses() -> None:
    """Verifying 3: "One possible policy is to require k valid cosignatures out of n known witnesses"."""
    proof = TlogProof.parse(TLOG["TlogProof"].encode())
    leaf = leaf_hash(base64.b64decode(TLOG["TlogLeaf"]))
    cosigned = TlogProof(proof.index, proof.hashes, TLOG["Cosigned"]["Note"].encode())
    assert WITNESS in cosigned.verify(leaf, LOG, [WITNESS], quorum=1).cosignatures
    for data, witnesses, quorum in ((proof.checkpoint, [WITNESS], 1), (cosigned.checkpoint, [], 1), (cosigned.checkpoint, [WITNESS], 2)):
        with pytest.raises(NoteError, match="needed"):
            TlogProof(proof.index, proof.hashes, data).verify(leaf, LOG, witnesses, quorum=quorum)


def test_proof_of_a_record_after_the_checkpoint_is_refused() -> None:
    with pytest.raises(ProofError, match="older"):
        TlogProof(600, (), CHECKPOINT).verify(bytes(32), LOG)


# tlog-tiles


def test_tiles_level() -> None:
    """Merkle Tree: "`<L>` is the “level” of the tile, and MUST be a decimal ASCII integer between 0 and 63, with no additional leading zeroes." """
    assert Tile.parse("0/000").level == 0
    assert Tile.parse("63/000").level == 63
    assert Tile.parse("entries/000").level == ENTRIES
    for bad in ("64/000", "00/000", "01/000", "-1/000", "a/000", "\u0663/000", "Entries/000"):
        with pytest.raises(TileError):
            Tile.parse(bad)


def test_tiles_index() -> None:
    """Merkle Tree: "`<N>` MUST be a non-negative integer encoded into zero-padded 3-digit path elements. All but the last path element MUST begin with an `x`. For example, index 1234067 will be encoded as `x001/x234/067`"."""
    assert Tile(0, 1_234_067).path == "0/x001/x234/067"
    assert Tile.parse("0/x001/x234/067") == Tile(0, 1_234_067)
    for bad in (
        "0/0",
        "0/0000",
        "0/1234",
        "0/001/234/067",
        "0/x001/x234/x067",
        "0/x000/067",
        "0/x001/67",
        "0/",
        "0/000/",
        "0/..",
        "0/x00\u0661/000",
    ):
        with pytest.raises(TileError):
            Tile.parse(bad)


def test_tiles_width() -> None:
    """Merkle Tree: "`<W>` is the width of the tile, a decimal ASCII integer between 1 and 255, with no additional leading zeroes." """
    assert Tile.parse("1/000.p/255") == Tile(1, 0, 255)
    assert Tile(1, 0, 1).path == "1/000.p/1"
    for bad in ("1/000.p/0", "1/000.p/256", "1/000.p/01", "1/000.p/", "1/000.p", "1/000.p/-1", "1/000.p/1000"):
        with pytest.raises(TileError):
            Tile.parse(bad)


def test_tiles_of_a_size() -> None:
    """Partial tiles: "a tree of size 70,000 will be represented by 273 full level 0 tiles, one partial level 0 tile of width 112, one full level 1 tile, one partial level 1 tile of width 17, and one partial level 2 tile of width 1. Note that a tree of size 256 will be represented by a full level 0 tile and a partial level 1 tile of width 1."; "Empty tiles MUST NOT be served"; "MUST NOT be hashed into a tile at the level above"."""
    tiles = [tile for tile in tiles_of(70_000) if tile.level != ENTRIES]
    assert [tile for tile in tiles if tile.level] == [Tile(1, 0), Tile(1, 1, 17), Tile(2, 0, 1)]
    assert [tile for tile in tiles if not tile.level] == [*(Tile(0, index) for index in range(273)), Tile(0, 273, 112)]
    assert [tile for tile in tiles_of(256) if tile.level != ENTRIES] == [Tile(0, 0), Tile(1, 0, 1)]
    assert not list(tiles_of(0))
    assert Tile(0, 273, 112).is_in(70_000)
    assert not Tile(0, 273, 113).is_in(70_000)
    assert not Tile(0, 273).is_in(70_000)


def test_tiles_hold_256_hashes() -> None:
    """Merkle Tree: "Full tiles MUST be exactly 256 hashes wide, or 8,192 bytes."; "A partial tile contains between 1 and 255 hashes"."""
    assert len(hashes_in(bytes(8_192))) == 256
    assert len(hashes_in(bytes(32))) == 1
    for bad in (b"", bytes(31), bytes(33), bytes(8_192 + 32)):
        with pytest.raises(TileError):
            hashes_in(bad)


def test_tiles_bundles() -> None:
    """Log entries: "Entry bundles are sequences of big-endian uint16 length-prefixed log entries."; "Each entry in a bundle hashes to the corresponding entry in the corresponding “level 0” Merkle Tree tile"."""
    entries = [b"leaf %d" % number for number in range(256)]
    data = bundle(entries)
    assert data.startswith(b"\x00\x06leaf 0\x00\x06leaf 1")
    assert entries_in(data) == entries
    assert base64.b64encode(root_of([leaf_hash(entry) for entry in entries_in(data)])).decode() == TLOG["Roots"][256]
    assert entries_in(bundle([b"", bytes(65_535)])) == [b"", bytes(65_535)]
    for bad in (b"", b"\x00", data[:-1], data + b"\x00", data + b"\x00\x00"):
        with pytest.raises(TileError):
            entries_in(bad)
    for wrong in ([], [b""] * 257, [bytes(65_536)]):
        with pytest.raises(TileError):
            bundle(wrong)
