"""Differential fuzzing: the embedded engine against a real OPA server, on grant files with every field and on requests near them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from keybroker.authority.policy import wasm
from keybroker.authority.policy.grants import Deny, Grant
from keybroker.model.decision import Verdict
from tests.engines import compare
from tests.policies import GOOD, OpaServer, opa_server, request
from tests.rule_files import requests, rule_files

SETTINGS = settings(
    max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline is not what is compared."""
    monkeypatch.setattr(wasm, "DEADLINE_TICKS", 2_000)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpaServer]:
    with opa_server(tmp_path_factory.mktemp("opa") / "log") as running:
        yield running


@SETTINGS
@given(text=rule_files(), asked=st.lists(requests(), min_size=10, max_size=25))
def test_engines_agree_on_whole_answers_for_any_rules_and_requests(server: OpaServer, text: str, asked: list[dict[str, Any]]) -> None:
    compare(server, text, asked)


def test_what_is_compared_has_every_field_and_comes_to_every_verdict(server: OpaServer) -> None:
    fields: Counter[str] = Counter()
    verdicts: Counter[Verdict] = Counter()

    @seed(7)
    @SETTINGS
    @given(text=rule_files(), asked=st.lists(requests(), min_size=10, max_size=25))
    def look(text: str, asked: list[dict[str, Any]]) -> None:
        rules = json.loads(text)
        fields.update(name for each in (*rules["grants"], *rules["denies"]) for name in each)
        verdicts.update(compare(server, text, asked))

    look()
    assert set(fields) == set(Grant.__struct_encode_fields__) | set(Deny.__struct_encode_fields__)
    assert verdicts[Verdict.ALLOW] > 20
    assert verdicts[Verdict.DENY] > 20


@pytest.mark.parametrize(
    ("old", "new", "loud"),
    [
        (b'"allow":true', b'"allow":false', True),
        (b'"grants":["payments"]', b'"grants":["payment5"]', False),
        (b'"result"', b'"resul"', True),
    ],
)
def test_difference_between_the_engines_is_found(server: OpaServer, old: bytes, new: bytes, loud: bool) -> None:
    asked = [json.loads(request())]
    assert compare(server, GOOD, asked) == [Verdict.ALLOW]

    class Liar:
        load = server.load

        def decide(self, asked: bytes) -> bytes:
            answer = server.decide(asked)
            assert old in answer
            return answer.replace(old, new)

    with pytest.raises(AssertionError, match="THE EMBEDDED ENGINE ALLOWS" if loud else "the engines differ"):
        compare(Liar(), GOOD, asked)  # type: ignore[arg-type]  # a server that lies
