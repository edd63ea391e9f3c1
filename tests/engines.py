"""Both engines on the same rules and requests. Their answers are one, whole object by whole object, or a test fails."""

from __future__ import annotations

import json
from typing import Any

from keybroker.audit.leaf import canonical
from keybroker.authority.policy.engine import decision_of
from keybroker.authority.policy.wasm import WasmInstance
from keybroker.model.decision import Verdict
from tests.policies import OpaServer, compiled_default, default_module
from tests.rule_files import rules_of


def compare(server: OpaServer, text: str, asked: list[dict[str, Any]]) -> list[Verdict]:
    """Ask both engines; what they say.

    Args:
        server: gets these rules in the place of those before.
        text: a grant file.
        asked: policy inputs.

    Raises:
        AssertionError: they differ. What an attacker would look for is said loudest: the embedded engine allows, and OPA does not.
    """
    data, digest = compiled_default(rules_of(text))
    instance = WasmInstance(default_module(), data)
    server.load(data)
    verdicts = []
    for request in asked:
        given = canonical(request)
        embedded, served = instance.evaluate(given), server.decide(given)
        result = json.loads(served)
        of_opa = canonical([{"result": result["result"]}]) if "result" in result else b"[]"
        ours, theirs = (decision_of(answer, digest, "compared") for answer in (embedded, of_opa))
        where = f"\nrules: {text}\nrequest: {given.decode()}\nembedded: {embedded.decode()}\nOPA:      {of_opa.decode()}"
        is_open = ours.verdict is Verdict.ALLOW and theirs.verdict is not Verdict.ALLOW
        assert not is_open, f"THE EMBEDDED ENGINE ALLOWS WHAT OPA DOES NOT ALLOW{where}"
        assert canonical(json.loads(embedded)) == of_opa, f"the engines differ{where}"
        assert ours.record == theirs.record, f"the same answer became two decisions{where}"
        verdicts.append(ours.verdict)
    return verdicts
