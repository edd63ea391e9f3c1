"""The HTTP API, as its own OpenAPI document describes it, under generated requests, good and bad: schemathesis over mTLS, in three roles.

No answer is a 500, none is one that the document does not declare, and nothing is signed for anybody without a grant.
KEYBROKER_API_CASES sets how many requests there are in all (20,000 if absent).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import checks
from schemathesis.generation import GenerationMode

from tests.worlds import World, served

CASES = int(os.environ.get("KEYBROKER_API_CASES", "20000"))
ROLES = {"workload": "payments-api", "auditor": "auditor", "stranger": "ci-release"}
KEYS = ["orders", "invoices", "sessions", "release"]
checks.load_all_checks()
_CHECKS = [checks.CHECKS.get_one(f"{what}_conformance") for what in ("status_code", "content_type", "response_schema", "response_headers")]


@pytest.fixture(scope="module")
def api_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with served(tmp_path_factory.mktemp("api") / "world") as world:
        yield world


@dataclass(slots=True)
class Caller:
    """One role, on one keep-alive connection."""

    world: World
    name: str
    session: requests.Session = field(default_factory=requests.Session)
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.session.trust_env = False
        self.session.cert = str(self.world.svid(self.name))
        self.session.verify = str(self.world.directory / "bundle.pem")

    def operations(self) -> list[Any]:
        """Everything that the document describes."""
        found: list[Any] = list(schemathesis.openapi.from_dict(self.document()).get_all_operations())
        return [result.ok() for result in found]

    def document(self) -> dict[str, Any]:
        """The API's own description, with the names of real keys where it only says that a name is text; others come as broken requests."""
        answer = self.session.get(f"{self.world.url}/v1/openapi.json", timeout=10)
        assert answer.status_code == 200
        document: dict[str, Any] = answer.json()
        for item in document["paths"].values():
            for operation in item.values():
                for parameter in operation.get("parameters", ()):
                    if parameter["name"] == "key" and parameter["in"] == "path":
                        parameter["schema"] = {"type": "string", "enum": KEYS}
        return document


@pytest.mark.timeout(900)
@pytest.mark.parametrize("role", ROLES)
def test_generated_requests_get_declared_answers_and_no_500(api_world: World, role: str) -> None:
    caller = Caller(api_world, ROLES[role])
    operations = caller.operations()
    assert len(operations) >= 10
    wanted = CASES // len(ROLES)
    for number in range(20):
        left = wanted - sum(caller.statuses.values())
        if left <= 0:
            break
        for operation in operations:
            run(caller, operation, left // len(operations) + 20, number)
    for (label, status), count in sorted(caller.statuses.items()):
        print(f"{role:9} {status} {count:6} {label}")  # noqa: T201  shown by pytest -s
    assert sum(caller.statuses.values()) >= wanted
    signed = {label: count for (label, status), count in caller.statuses.items() if status == 200 and label.endswith("/sign")}
    assert bool(signed) is (role == "workload")


def run(caller: Caller, operation: Any, count: int, number: int = 0) -> None:
    """About so many requests to one operation, half of them as declared and half broken in some way; fewer where there are not so many."""
    good = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    bad = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)

    def send(case: Any) -> None:
        answer = case.call(base_url=caller.world.url, session=caller.session, timeout=20, verify=caller.session.verify)
        caller.statuses[operation.label, answer.status_code] += 1
        assert answer.status_code != 500, case.as_curl_command()
        case.validate_response(answer, checks=_CHECKS)

    limits = settings(
        max_examples=count // 2 + 1, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    for strategy in (good, bad):
        with contextlib.suppress(Unsatisfiable):  # nothing of an operation without parameters can be broken
            wrap: Any = given(strategy)
            seed(number)(limits(wrap(send)))()


def test_nothing_was_signed_for_anybody_without_a_grant(api_world: World) -> None:
    for role in ("auditor", "stranger"):
        caller = Caller(api_world, ROLES[role])
        for operation in caller.operations():
            if operation.method.upper() == "POST":
                run(caller, operation, 40)
    with api_world.client() as broker:
        broker.sign("orders", "ES256", message=b"x")
    signers = {json.loads(leaf)["trail"]["id"] for leaf in api_world.leaves() if b'"outcome":"signed"' in leaf}
    assert signers == {"spiffe://example.org/payments/api"}
    keys = {json.loads(leaf)["key"]["name"] for leaf in api_world.leaves() if b'"outcome":"signed"' in leaf}
    assert keys <= {"orders", "invoices", "sessions"}
    assert "Traceback" not in Path(api_world.log).read_text()
