"""Records as values."""

from __future__ import annotations

import msgspec
import pytest

from keybroker.client.results import Record

RAW = b'{"body":{},"index":7,"key":{"name":"orders"},"kind":"outcome","outcome":"signed","time":"t","trail":{"id":"spiffe://a/b"},"use":"01J"}'


def test_record_keeps_its_bytes_and_shows_its_head() -> None:
    record = Record.parse(RAW)
    assert record.raw == RAW
    assert (record.index, record.time, record.kind, record.trail) == (7, "t", "outcome", "spiffe://a/b")
    assert (record.key, record.use, record.outcome) == ("orders", "01J", "signed")
    assert record.fields["body"] == {}
    assert "raw" not in repr(record)


def test_record_about_the_broker_itself_has_no_trail_and_no_key() -> None:
    record = Record.parse(b'{"index":0,"time":"t","kind":"start","trail":{},"key":{},"use":"","outcome":""}')
    assert (record.trail, record.key) == ("", "")


@pytest.mark.parametrize("raw", [b"", b"[]", b'{"index":"7"}', RAW[:-1], RAW.replace(b'"index":7', b'"index":7.5')])
def test_other_bytes_are_not_a_record(raw: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        Record.parse(raw)
