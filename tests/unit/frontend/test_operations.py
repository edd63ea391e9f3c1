"""The operations address: what it says while the authority is well, unwell or away; and several texts of metrics as one."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request

from keybroker.errors import OverloadedError, RoomUnavailableError
from keybroker.frontend.authority_link import AuthorityLink
from keybroker.frontend.metrics import FrontendMetrics
from keybroker.frontend.operations import Operations, merged
from keybroker.model.call import HealthReply

ONE = '# HELP a What a is\n# TYPE a counter\na 1.0\n# HELP b What b is\n# TYPE b gauge\nb{x="y"} 2.0\n'
OTHER = '# HELP b What b is\n# TYPE b gauge\nb{x="z"} 3.0\n# HELP c What c is\n# TYPE c gauge\nc 4.0\n'
NOBODY = cast("Request", None)  # no answer here depends on the request


class FakeAuthority:
    """Says what it is told to say, or raises it."""

    def __init__(self, health: HealthReply | Exception, text: bytes | Exception = b"") -> None:
        self._health = health
        self._text = text

    async def health(self) -> HealthReply:
        if isinstance(self._health, Exception):
            raise self._health
        return self._health

    async def metrics_text(self) -> bytes:
        if isinstance(self._text, Exception):
            raise self._text
        return self._text


def operations(authority: FakeAuthority, *, is_draining: bool = False) -> Operations:
    return Operations(cast("AuthorityLink", authority), FrontendMetrics(), lambda: is_draining)


GOOD = HealthReply(ready=True, parts={"store": "well"})


def test_ready_is_200_while_the_authority_can_sign() -> None:
    answer = asyncio.run(operations(FakeAuthority(GOOD)).readyz(NOBODY))
    assert (answer.status_code, answer.body) == (200, b'{"ready":true,"parts":{"store":"well"}}')


@pytest.mark.parametrize(
    "health", [HealthReply(ready=False, parts={"hsm": "away"}), RoomUnavailableError("away"), TimeoutError(), OverloadedError("much")]
)
def test_ready_is_503_while_it_cannot_or_does_not_say(health: HealthReply | Exception) -> None:
    answer = asyncio.run(operations(FakeAuthority(health)).readyz(NOBODY))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert b'"ready":false' in answer.body
    assert (b"does not answer" in answer.body) == isinstance(health, Exception)


def test_ready_is_503_while_this_room_drains() -> None:
    answer = asyncio.run(operations(FakeAuthority(GOOD), is_draining=True).readyz(NOBODY))
    assert (answer.status_code, b"draining" in answer.body, b"well" in answer.body) == (503, True, True)


def test_live_is_200_whatever_the_authority_does() -> None:
    answer = asyncio.run(operations(FakeAuthority(TimeoutError())).livez(NOBODY))
    assert answer.status_code == 200


@pytest.mark.parametrize("text", [OTHER.encode(), RoomUnavailableError("away"), TimeoutError()])
def test_metrics_are_there_with_and_without_the_authority(text: bytes | Exception) -> None:
    answer = asyncio.run(operations(FakeAuthority(GOOD, text)).metrics(NOBODY))
    families = {family.name for family in text_string_to_metric_families(bytes(answer.body).decode())}
    assert answer.status_code == 200
    assert "keybroker_connections" in families
    assert ("c" in families) == isinstance(text, bytes)


def test_family_of_two_texts_is_there_once_with_the_samples_of_both() -> None:
    text = merged(ONE, OTHER)
    assert text.count("# HELP b ") == text.count("# TYPE b ") == 1
    lines = text.splitlines()
    assert lines.index('b{x="z"} 3.0') == lines.index('b{x="y"} 2.0') + 1
    samples = {(each.name, *each.labels.values()): each.value for family in text_string_to_metric_families(text) for each in family.samples}
    assert samples == {("a_total",): 1.0, ("b", "y"): 2.0, ("b", "z"): 3.0, ("c",): 4.0}


@pytest.mark.parametrize("texts", [(), ("",), ("", "")])
def test_nothing_merged_is_nothing(texts: tuple[str, ...]) -> None:
    assert not merged(*texts)


def test_one_text_is_left_as_it_is() -> None:
    assert merged(ONE) == ONE
    assert merged(ONE, "") == merged("", ONE) == ONE


def test_metrics_of_two_rooms_merge_into_what_prometheus_reads() -> None:
    text = FrontendMetrics().text().decode()
    again = merged(text, text)
    names = [family.name for family in text_string_to_metric_families(again)]
    assert len(names) == len(set(names)) == len(list(text_string_to_metric_families(text)))
