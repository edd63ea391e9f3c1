"""What a decision costs, counted in the work that the engine does and not in time, so that a busy machine does not matter."""

from __future__ import annotations

import json

from keybroker.authority.policy.wasm import FUEL, WasmInstance
from tests.policies import compiled_default, default_module, request
from tests.rule_files import rules_of


def work_of(size: int) -> int:
    """The fuel of one decision among so many grants, each for a workload of its own."""
    rules = [
        {"id": f"g{number}", "workloads": [f"spiffe://example.org/team-{number}/*"], "keys": [f"key-{number}"], "operations": ["sign"],
         "algorithms": ["ES256"]}
        for number in range(size)
    ]  # fmt: skip
    data, _ = compiled_default(rules_of(json.dumps({"grants": rules})))
    instance = WasmInstance(default_module(), data)
    team = size // 2
    answer = instance.evaluate(request(key=f"key-{team}", workload=f"spiffe://example.org/team-{team}/api"))
    assert json.loads(answer)[0]["result"]["grants"] == [f"g{team}"]
    return FUEL - int(instance._store.get_fuel())


def test_decision_among_ten_thousand_grants_costs_at_most_half_more_than_among_ten() -> None:
    few = work_of(10)
    assert few > 10_000
    assert work_of(10_000) <= 1.5 * few
