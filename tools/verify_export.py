#!/usr/bin/env python3
"""Verifies an export of a keybroker log, or of one workload's trail, and shares no code with keybroker.

    verify_export.py EXPORT --log-key VKEY-OR-FILE [--checkpoint KEPT-EARLIER ...]

It needs Python 3.11 and the `cryptography` package. Exit status: 0 all is as it was signed, 1 it is not (the first record that can be
meant is named), 2 wrong usage. The formats are in docs/reference/log.md; read this file beside it, from top to bottom.
"""

import argparse
import base64
import hashlib
import itertools
import json
import re
import sys
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

NOTHING = hashlib.sha256(b"").digest()


class WrongError(Exception):
    """Something does not hold. Names the first and the last record that can be meant, by position."""

    def __init__(self, first, last, why):
        super().__init__(why)
        self.first, self.last, self.why = first, max(first, last), why


# --- Hashes: RFC 6962 section 2.1


def sha256(*parts):
    return hashlib.sha256(b"".join(parts)).digest()


def leaf_hash(leaf):
    return sha256(b"\x00", leaf)


class Tree:
    """Grows leaf by leaf. Keeps a stack of (leaves below, hash) of complete subtrees, which get smaller to the right."""

    def __init__(self):
        self.size, self.stack = 0, []

    def add(self, leaf):
        count = 1
        while self.stack and self.stack[-1][0] == count:
            count, leaf = 2 * count, sha256(b"\x01", self.stack.pop()[1], leaf)
        self.stack.append((count, leaf))
        self.size += 1

    def root(self):
        if not self.stack:
            return NOTHING
        root = self.stack[-1][1]
        for _, left in reversed(self.stack[:-1]):
            root = sha256(b"\x01", left, root)
        return root


def root_of_last_leaf(leaf, size, path):
    """The root of a tree of `size` leaves whose last one is known, with its audit path from the bottom up."""
    index, last, root, path = size - 1, size - 1, leaf, list(path)
    while last:
        if index % 2:
            if not path:
                return None
            root = sha256(b"\x01", path.pop(0), root)
        index, last = index // 2, last // 2  # an even last node has no sibling, and is its own parent
    return None if path else root


# --- The map of trails: docs/reference/log.md


def bits_of(key):
    return f"{int.from_bytes(key, 'big'):0256b}"


def map_leaf(trail, count, head):
    key = sha256(trail.encode())
    return sha256(b"\x00", key, sha256(count.to_bytes(8, "big"), head))


class TrailMap:
    """Where every trail ends. A subtree is None, a pair (one trail: bits, leaf) or a list (its hash, once it is known, and its halves)."""

    def __init__(self):
        self.top = None

    def set(self, trail, count, head):
        self.top = self.put(self.top, bits_of(sha256(trail.encode())), map_leaf(trail, count, head), 0)

    def put(self, tree, bits, leaf, depth):
        if tree is None or (isinstance(tree, tuple) and tree[0] == bits):
            return bits, leaf
        if isinstance(tree, tuple):  # another trail has this place to itself, and moves down
            tree = [None, tree, None] if tree[0][depth] == "0" else [None, None, tree]
        half = 1 + int(bits[depth])
        tree[0], tree[half] = None, self.put(tree[half], bits, leaf, depth + 1)
        return tree

    def root(self):
        return self.hash_of(self.top)

    def hash_of(self, tree):
        if tree is None or isinstance(tree, tuple):
            return tree[1] if tree else NOTHING
        if tree[0] is None:
            tree[0] = sha256(b"\x01", self.hash_of(tree[1]), self.hash_of(tree[2]))
        return tree[0]


def root_of_map_proof(trail, count, head, siblings, other):
    """The root that a proof leads to. For a trail without records: from what stands in its place, nothing or one other trail."""
    bits = bits_of(sha256(trail.encode()))
    if count:
        found = None if other else map_leaf(trail, count, head)
    elif other:
        key, value = other
        is_here = key != sha256(trail.encode()) and bits_of(key).startswith(bits[: len(siblings)])
        found = sha256(b"\x00", key, value) if is_here else None
    else:
        found = NOTHING
    if found is None or len(siblings) > 256:
        return None
    for depth, sibling in zip(range(len(siblings) - 1, -1, -1), siblings, strict=True):
        found = sha256(b"\x01", sibling, found) if bits[depth] == "1" else sha256(b"\x01", found, sibling)
    return found


# --- Checkpoints: C2SP signed-note and tlog-checkpoint


class LogKey:
    """A verifier key, NAME+ID+BASE64, of type 1: Ed25519. Its name is the log's origin."""

    def __init__(self, text):
        self.name, key_id, encoded = text.strip().split("+", 2)
        data = base64.b64decode(encoded, validate=True)
        self.id = sha256(self.name.encode(), b"\n", data)[:4]
        if len(data) != 33 or data[0] != 1 or self.id.hex() != key_id:
            raise ValueError("not an Ed25519 verifier key, or mistyped")
        self.public = Ed25519PublicKey.from_public_bytes(data[1:])

    def open(self, note):
        """Size and root of a checkpoint that this key has signed. Raises ValueError for any other."""
        text, gap, signatures = note.rpartition("\n\n")
        lines = text.split("\n")
        if not gap or not note.endswith("\n") or len(lines) < 3 or not all(lines) or lines[0] != self.name:
            raise ValueError("not a checkpoint of this log")
        size, root = lines[1:3]
        if not re.fullmatch("0|[1-9][0-9]{0,18}", size):
            raise ValueError("not a size")
        is_signed = False
        for line in signatures.split("\n")[:-1]:
            dash, name, encoded = line.split(" ")
            data = base64.b64decode(encoded, validate=True)
            if dash != "\u2014":
                raise ValueError("not a signature line")
            if (name, data[:4]) == (self.name, self.id):
                try:
                    self.public.verify(data[4:], (text + "\n").encode())
                except InvalidSignature:
                    raise ValueError("a wrong signature") from None
                is_signed = True
        root = base64.b64decode(root, validate=True)
        if not is_signed or len(root) != 32:
            raise ValueError("not signed by the log's key")
        return int(size), root


# --- Leaves: docs/reference/record.md


def no_constant(word):
    raise ValueError(word)


def fields_of(leaf, place):
    """A leaf's fields, if its bytes are the one way to write them: sorted keys, no blanks, UTF-8 (RFC 8785)."""
    try:
        record = json.loads(leaf.decode(), parse_constant=no_constant)
        written = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise WrongError(place, place, "not JSON") from None
    if not isinstance(record, dict) or written != leaf or not isinstance(record.get("trail"), dict):
        raise WrongError(place, place, "not canonical")
    return record


def check_place_in_trail(record, count, head, place):
    """That a record is the next of its trail, which has `count` records so far, the last with this leaf hash."""
    if (record["trail"].get("index"), record["trail"].get("previous")) != (count, head.hex()):
        raise WrongError(place, place, "not the next of its trail")


# --- The two kinds of export


def verify_log(lines, key, kept):
    """A whole log: every record in its place, every `heads` record true, every checkpoint of the same tree. Says what was found."""
    tree, trails, grown, trail_map = Tree(), {}, set(), TrailMap()
    covered, time = 0, ""
    for line in lines:
        place = tree.size
        if line.startswith(b'{"checkpoint":'):
            try:
                size, root = key.open(json.loads(line)["checkpoint"])
            except (ValueError, TypeError, AttributeError, KeyError):
                raise WrongError(covered, place - 1, "a checkpoint that the log's key has not signed") from None
            if size != tree.size:
                raise WrongError(min(size, place), place - 1, "a checkpoint of another size")
            if root != tree.root():
                raise WrongError(covered, size - 1, "not what was signed")
            covered = size
            continue
        record = fields_of(line, place)
        if (
            record.get("index") != place
            or record.get("log") != key.name
            or not isinstance(record.get("time"), str)
            or record["time"] < time
        ):
            raise WrongError(place, place, "not the next record of this log")
        time = record["time"]
        if record.get("kind") == "heads":
            for name in grown:
                trail_map.set(name, *trails[name])
            grown.clear()
            if record.get("body") != {"root": trail_map.root().hex(), "trails": len(trails)}:
                raise WrongError(place, place, "does not say where the trails end")
        if record["trail"]:
            name = str(record["trail"].get("id"))
            count, head = trails.get(name, (0, b""))
            check_place_in_trail(record, count, head, place)
            trails[name] = (count + 1, leaf_hash(line))
            grown.add(name)
        tree.add(leaf_hash(line))
        if tree.size in kept and kept.pop(tree.size) != tree.root():
            raise WrongError(covered, place, "not what was signed before")
    if covered < tree.size or not covered:
        raise WrongError(covered, tree.size - 1, "no checkpoint covers these records")
    if kept:
        raise WrongError(tree.size, max(kept) - 1, "the log was longer when a kept checkpoint was signed")
    return f"{tree.size} records of {len(trails)} workloads are what {key.name} has signed"


def verify_trail(trail, lines, key):
    """One workload's records: a chain whose end the map of trails names, under a root that is in the log's last leaf."""
    count, head, proof = 0, b"", None
    for line in lines:
        if proof is not None:
            raise WrongError(count, count, "something after the proof")
        if line.startswith(b'{"trail_proof":'):
            proof = json.loads(line)["trail_proof"]
            continue
        record = fields_of(line, count)
        if record["trail"].get("id") != trail:
            raise WrongError(count, count, "a record of another trail")
        check_place_in_trail(record, count, head, count)
        count, head = count + 1, leaf_hash(line)
    if proof is None:
        raise WrongError(count, count, "no proof at the end")
    first, last = sorted((proof["count"], count))
    if (proof["trail"], proof["count"], proof["head"]) != (trail, count, head.hex()):
        raise WrongError(first, last - 1, "not where the trail ends")
    try:
        size, root = key.open(proof["checkpoint"])
        heads = fields_of(proof["heads"].encode(), last)
        path, siblings, other = ([bytes.fromhex(each) for each in proof[name]] for name in ("inclusion", "siblings", "other"))
    except (ValueError, TypeError, AttributeError):
        raise WrongError(first, last - 1, "the proof cannot be read, or its checkpoint is not signed") from None
    if (
        heads.get("kind") != "heads"
        or heads.get("log") != key.name
        or root_of_last_leaf(leaf_hash(proof["heads"].encode()), size, path) != root
    ):
        raise WrongError(first, last - 1, "the heads record is not the last one under the checkpoint")
    if root_of_map_proof(trail, count, head, siblings, other) != bytes.fromhex(heads["body"]["root"]):
        raise WrongError(first, last - 1, "the map of trails says something else")
    return f"{count} records are all that {trail} has among the first {size} of {key.name}"


def verify(lines, key, kept):
    """An export of either kind, line by line. `kept` is the roots of checkpoints that were kept earlier, by size. Says what was found."""
    first = next(lines, b"")
    if not first.startswith(b'{"trail_export":'):
        return verify_log(itertools.chain([first], lines), key, dict(kept))
    try:
        return verify_trail(str(json.loads(first)["trail_export"]), lines, key)
    except (ValueError, KeyError, TypeError, OverflowError):
        raise WrongError(0, 0, "not the export of a trail that can be read") from None


def main():
    parser = argparse.ArgumentParser(description="Verify an export of a keybroker log.")
    parser.add_argument("export", type=Path)
    parser.add_argument("--log-key", required=True, help="the log's verifier key, or a file that holds it")
    parser.add_argument("--checkpoint", type=Path, action="append", default=[], help="a checkpoint that was kept earlier; repeatable")
    words = parser.parse_args()
    try:
        key = LogKey(words.log_key if "+" in words.log_key else Path(words.log_key).read_text())
        kept = dict(key.open(path.read_text()) for path in words.checkpoint)
        file = words.export.open("rb")
    except (ValueError, OSError) as err:
        print(f"--log-key, --checkpoint or the export cannot be used: {err}", file=sys.stderr)
        return 2
    with file:
        try:
            said = verify((line.removesuffix(b"\n") for line in file), key, kept)
        except WrongError as wrong:
            where = f"record {wrong.first}" if wrong.first == wrong.last else f"one of the records {wrong.first} to {wrong.last}"
            print(f"NOT VERIFIED: {where}: {wrong.why}")
            return 1
    print(f"verified: {said}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
