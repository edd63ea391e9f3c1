"""Leaf bytes: RFC 8785 by comparison with another implementation, RFC 6962 by its own test vector."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from keybroker.audit import leaf as leaves
from keybroker.model.record import Draft, KeyFacts, RecordKind, TrailFacts

PLAIN = st.recursive(
    st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="ascii"), max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = {
    "approvals", "body", "decision", "index", "key", "kind", "log", "operation_id", "outcome", "request", "retry_of", "salt",
    "signature_sha256", "svid", "taken", "tbs", "time", "token", "trace_id", "trail", "use", "v",
}  # fmt: skip


def encode(draft: Draft, trail: TrailFacts | None = None) -> bytes:
    return leaves.encode(draft, log="example.org/test", index=7, time="2026-11-24T08:00:00.000000Z", salt="00" * 16, trail=trail)


@given(PLAIN)
def test_canonical_json_equals_rfc8785_for_what_a_leaf_may_hold(value: Any) -> None:
    assert leaves.canonical(value) == rfc8785.dumps(value)


@given(st.text(st.characters(codec="utf-8")), st.dictionaries(st.text(st.characters(codec="ascii"), max_size=8), st.text(), max_size=3))
def test_leaf_is_canonical_whatever_the_texts_are(reason: str, body: dict[str, str]) -> None:
    try:
        raw = leaves.canonical({"reason": reason})
        data = encode(Draft(kind=RecordKind.INTENT, request=msgspec.Raw(raw), body=body))
    except UnicodeEncodeError:
        return  # a lone surrogate has no UTF-8 form, so it cannot be recorded, let alone signed for
    assert rfc8785.dumps(json.loads(data)) == data


def test_leaf_has_every_field_and_no_null_where_nothing_is_known() -> None:
    record = json.loads(encode(Draft(kind=RecordKind.START)))
    assert set(record) == FIELDS
    assert None not in record.values()
    assert record["key"] == record["svid"] == record["tbs"] == record["token"] == record["trail"] == record["request"] == {}


def test_leaf_keeps_what_the_draft_says() -> None:
    trail = TrailFacts("spiffe://example.org/a", 3, "ab")
    record = json.loads(encode(Draft(kind=RecordKind.INTENT, use="01J", key=KeyFacts("orders", 1, "cd")), trail))
    assert record["trail"] == {"id": "spiffe://example.org/a", "index": 3, "previous": "ab"}
    assert record["key"] == {"name": "orders", "version": 1, "spki_sha256": "cd"}
    assert (record["kind"], record["use"], record["index"], record["v"]) == ("intent", "01J", 7, 1)


def test_leaf_is_refused_when_larger_than_a_tile_entry() -> None:
    with pytest.raises(leaves.LeafTooLargeError):
        encode(Draft(kind=RecordKind.READ, body={"text": "x" * 65_535}))


def test_leaf_hash_equals_rfc6962_vector_for_the_empty_leaf() -> None:
    # RFC 6962 reference tests: the hash of an empty leaf.
    assert leaves.leaf_hash(b"").hex() == "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"


@pytest.mark.parametrize("data", [b"", b"nonsense", b"[]", b"1", b"\xff", b"[" * 100_000])
def test_decode_refuses_what_is_no_record(data: bytes) -> None:
    with pytest.raises(ValueError, match="not"):
        leaves.decode(data)
