"""The JSON Schema of grant files, and the examples: what the schema refuses, the loader refuses too."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

from keybroker.authority.policy import loader
from keybroker.authority.policy.grants import schema
from tests.policies import GOOD, KEYS, deny, edited, refusal

EXAMPLES = Path(__file__).parents[4] / "policies" / "examples"


def validator() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(schema())
    return jsonschema.Draft202012Validator(schema())


def test_examples_load_and_are_valid_by_the_schema() -> None:
    rules = loader.load(EXAMPLES, KEYS)
    assert rules.grants
    assert rules.denies
    assert rules.warnings == ()
    for path in EXAMPLES.glob("*.yaml"):
        validator().validate(yaml.safe_load(path.read_text()))
        assert path.read_text().startswith("# yaml-language-server: $schema=../grants.schema.json\n")


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "rules: []",
        "grants:",
        "grants: [7]",
        "grants: [{id: a}]",
        edited("id: payments", "id: Payments"),
        edited("keys: [orders]", "keys: []"),
        edited("keys: [orders]", "keys:"),
        edited("keys: [orders]", "keys: [Orders]"),
        edited("keys: [orders]", "key: [orders]"),
        edited("[sign]", "[sing]"),
        edited("[ES256]", "[HS256]"),
        edited('["spiffe://example.org/payments/*"]', "[]"),
        edited('["spiffe://example.org/payments/*"]', '["*"]'),
        edited('["spiffe://example.org/payments/*"]', '["spiffe://*/payments"]'),
        GOOD + "    limits: []\n",
        GOOD + "    limits: [{max: 0, window: 1m, per: key}]\n",
        GOOD + "    limits: [{max: 1, window: 1w, per: key}]\n",
        GOOD + "    limits: [{max: 1, window: 1m, per: user}]\n",
        GOOD + "    hours: [{days: monday, from: '08:00', to: '18:00', zone: UTC}]\n",
        GOOD + "    hours: [{days: mon, from: '8:00', to: '18:00', zone: UTC}]\n",
        GOOD + "    hours: [{days: mon, from: '08:00', to: '18:00', zone: UTC, except: [christmas]}]\n",
        GOOD + "    not_after: tomorrow\n",
        GOOD + "    quorum: {approvals: 0, of: [legal], expires: 1h}\n",
        GOOD + "    quorum: {approvals: 1, of: [], expires: 1h}\n",
        GOOD + "    evidence: [tpm]\n",
        "people: {alice: []}",
        "groups: {Legal: [alice]}",
        deny("networks: []"),
        deny("algorithms:"),
        "networks: {office: []}",
        "networks: {Office: [192.0.2.0/24]}",
        "networks: {office: 192.0.2.0/24}",
    ],
)
def test_broken_file_is_refused_by_the_schema_and_by_the_loader(tmp_path: Path, text: str) -> None:
    assert not validator().is_valid(yaml.safe_load(text))
    assert refusal(tmp_path, a=text)
