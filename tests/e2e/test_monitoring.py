"""Alerts and dashboard ask for metrics and labels that a served broker really has."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.worlds import World

MONITORING = Path(__file__).parents[2] / "deploy" / "monitoring"
_SELECTOR = re.compile(r"(keybroker_[a-z_]+)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'([a-z_]+)\s*(=~|!=|=)\s*"([^"]*)"')
_FROM_PROMETHEUS = {"instance", "job"}


def expressions() -> Iterator[str]:
    for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]:
        yield from (rule["expr"] for rule in group["rules"])
    for panel in json.loads((MONITORING / "dashboard.json").read_text())["panels"]:
        yield from (target["expr"] for target in panel["targets"])


@pytest.fixture(scope="module")
def samples(world: World) -> dict[str, list[dict[str, str]]]:
    """The labels of each sample, by metric."""
    with world.client() as broker:
        broker.sign("orders", "ES256", message=b"x")
    with urllib.request.urlopen(f"http://{world.operations}/metrics", timeout=10) as answer:
        lines = [line for line in answer.read().decode().splitlines() if line and not line.startswith("#")]
    found: dict[str, list[dict[str, str]]] = {}
    for line in lines:
        name, _, labels = line.rpartition(" ")[0].partition("{")
        found.setdefault(name, []).append(dict(re.findall(r'([a-z_]+)="([^"]*)"', labels)))
    return found


@pytest.mark.parametrize("expression", sorted(set(expressions())))
def test_expression_asks_for_what_there_is(expression: str, samples: dict[str, list[dict[str, str]]]) -> None:
    selectors = _SELECTOR.findall(expression)
    assert selectors or expression.startswith("up{")
    for name, matchers in selectors:
        assert name in samples, name
        for label, operator, value in _MATCHER.findall(matchers):
            if label in _FROM_PROMETHEUS:
                continue
            values = {sample[label] for sample in samples[name]}
            wanted = value.split("|") if operator == "=~" else [value]
            assert operator == "!=" or set(wanted) <= values, f"{name} has no {label}={value}; it has {sorted(values)}"


def test_rules_are_good_and_fire_on_what_they_are_for() -> None:
    for words in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]):
        done = subprocess.run(["promtool", *words], cwd=MONITORING, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_says_what_to_do() -> None:
    for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in {"page", "ticket"}
            assert rule["annotations"]["summary"]
            assert rule["annotations"]["action"]
