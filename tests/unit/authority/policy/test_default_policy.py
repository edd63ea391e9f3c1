"""The default policy, from grant files to verdicts: each sentence of what a grant means, with what it allows and what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from keybroker.model.decision import NO_GRANT, Verdict
from tests.policies import GOOD, decide, default_engine, load, request

API = "spiffe://example.org/payments/api"
AUDITOR = "spiffe://example.org/human/auditor"
FILE = """\
grants:
  - {id: one-segment, workloads: ["spiffe://example.org/payments/*"], keys: [orders], operations: [sign], algorithms: [ES256, ES384]}
  - {id: exact, workloads: ["spiffe://example.org/ci/release"], keys: [release], operations: [sign-digest], algorithms: [ES256]}
  - {id: open, workloads: ["spiffe://example.org/team/**"], keys: ["*"], operations: [read-key]}
  - {id: middle, workloads: ["spiffe://example.org/*/signer/**"], keys: [invoices], operations: [sign], algorithms: [PS256]}
  - {id: twice, workloads: ["spiffe://example.org/ops/a", "spiffe://example.org/ops/*", "spiffe://example.org/**"], keys: [ops],
     operations: [sign], algorithms: [ES256]}
  - {id: also, workloads: ["spiffe://example.org/ops/a"], keys: ["*"], operations: [sign], algorithms: [ES256]}
  - {id: at-work, workloads: ["spiffe://example.org/desk"], keys: [desk], operations: [sign], algorithms: [ES256], networks: [office, lab]}
  - {id: reads-all, workloads: ["spiffe://example.org/human/auditor"], trails: ["**"], operations: [read-audit]}
  - {id: reads-ci, workloads: ["spiffe://example.org/human/dana"], trails: ["spiffe://example.org/ci/*"], operations: [read-audit]}
denies:
  - {id: no-old-rsa, workloads: ["**"], algorithms: [RS256]}
  - {id: no-key, workloads: ["spiffe://example.org/payments/bad"], keys: [orders]}
  - {id: no-ops, workloads: ["spiffe://example.org/ops/*"], networks: [lab]}
  - {id: no-trail, workloads: ["spiffe://example.org/human/*"], trails: ["spiffe://example.org/ceo/**"]}
  - {id: no-reading, workloads: ["spiffe://example.org/team/b/**"], operations: [read-key, read-audit]}
networks: {office: [192.0.2.0/24], lab: [198.51.100.0/24]}
"""


@pytest.mark.parametrize(
    ("asked", "grants", "reasons"),
    [
        # nothing said means no, and looks like no key
        (request(workload="spiffe://example.org/stranger"), "", "no-grant"),
        (request(workload="spiffe://example.com/payments/api"), "", "no-grant"),
        (request(key="release"), "", "no-grant"),
        (request(key="*"), "", "no-grant"),
        (request(key=""), "", "no-grant"),
        # what a grant covers, and what it does not
        (request(), "one-segment", ""),
        (request(algorithm="ES384"), "one-segment", ""),
        (request(algorithm="ES512"), "", "algorithm-not-granted"),
        (request(algorithm=""), "", "algorithm-not-granted"),
        (request("sign-digest"), "", "operation-not-granted"),
        (request("admin-destroy"), "", "operation-not-granted"),
        (request("read-key"), "one-segment", ""),  # who may sign with it may read its public half
        (request("read-key", "release"), "", "no-grant"),
        # `*` is one segment
        (request(workload="spiffe://example.org/payments"), "", "no-grant"),
        (request(workload="spiffe://example.org/payments/a/b"), "", "no-grant"),
        (request(workload="spiffe://example.org/paymentsx/api"), "", "no-grant"),
        (request("sign-digest", "release", workload="spiffe://example.org/ci/release"), "exact", ""),
        (request("sign-digest", "release", workload="spiffe://example.org/ci/release", algorithm="PS256"), "", "algorithm-not-granted"),
        (request("sign-digest", "release", workload="spiffe://example.org/ci/release/x"), "", "no-grant"),
        (request("sign-digest", "release", workload="spiffe://example.org/ci/Release"), "", "no-grant"),
        # `**` is one or more
        (request("read-key", "anything", workload="spiffe://example.org/team/a"), "open", ""),
        (request("read-key", "anything", workload="spiffe://example.org/team/a/b/c"), "open", ""),
        (request("read-key", "anything", workload="spiffe://example.org/team"), "", "no-grant"),
        (request("sign", "anything", workload="spiffe://example.org/team/a"), "", "operation-not-granted"),
        (request(key="invoices", algorithm="PS256", workload="spiffe://example.org/x/signer/1"), "middle", ""),
        (request(key="invoices", algorithm="PS256", workload="spiffe://example.org/x/signer"), "", "no-grant"),
        (request(key="invoices", algorithm="PS256", workload="spiffe://example.org/x/y/signer/1"), "", "no-grant"),
        # all that match bind together, each once
        (request(key="ops", workload="spiffe://example.org/ops/a"), "also twice", ""),
        (request(key="ops", workload="spiffe://example.org/ops/b"), "twice", ""),
        # networks
        (request(key="desk", workload="spiffe://example.org/desk", networks=("office",)), "at-work", ""),
        (request(key="desk", workload="spiffe://example.org/desk", networks=("home", "lab")), "at-work", ""),
        (request(key="desk", workload="spiffe://example.org/desk", networks=("home",)), "", "network-not-granted"),
        (request(key="desk", workload="spiffe://example.org/desk"), "", "network-not-granted"),
        # a deny wins
        (request(key="ops", workload="spiffe://example.org/ops/a", networks=("office",)), "also twice", ""),
        (request(key="ops", workload="spiffe://example.org/ops/a", networks=("lab",)), "", "denied-by:no-ops"),
        (request(workload="spiffe://example.org/payments/bad"), "", "denied-by:no-key"),
        (request("read-key", workload="spiffe://example.org/payments/bad"), "", "denied-by:no-key"),
        (request(algorithm="RS256"), "", "algorithm-not-granted denied-by:no-old-rsa"),
        (request(algorithm="RS256", workload="spiffe://example.org/stranger"), "", "no-grant denied-by:no-old-rsa"),
        (request("read-key", "x", workload="spiffe://example.org/team/b/c"), "", "denied-by:no-reading"),
        (request("read-key", "x", workload="spiffe://example.org/team/b"), "open", ""),
        # trails
        (request(trail=API), "own-trail", ""),
        (request(trail="spiffe://example.org/payments/other"), "", "no-grant"),
        (request(trail=""), "", "no-grant"),
        (request(trail="", workload="spiffe://example.org/human/dana"), "", "no-grant denied-by:no-trail"),
        (request(trail="spiffe://example.org/ci/release", workload="spiffe://example.org/human/dana"), "reads-ci", ""),
        (request(trail="spiffe://example.org/ci/a/b", workload="spiffe://example.org/human/dana"), "", "no-grant"),
        (request(trail="spiffe://example.com/ci/release", workload="spiffe://example.org/human/dana"), "", "no-grant"),
        (request(trail=API, workload=AUDITOR), "reads-all", ""),
        (request(trail=AUDITOR, workload=AUDITOR), "own-trail reads-all", ""),
        (request(trail="spiffe://example.org/ceo/a", workload=AUDITOR), "", "denied-by:no-trail"),
        (request(trail="", workload=AUDITOR), "", "denied-by:no-trail"),  # the whole record holds the trail that is denied
        (request(trail="spiffe://example.org/team/b/c", workload="spiffe://example.org/team/b/c"), "", "denied-by:no-reading"),
    ],
)
def test_request_gets_the_verdict_that_the_rules_say(tmp_path: Path, asked: bytes, grants: str, reasons: str) -> None:
    decision = decide(default_engine(load(tmp_path, a=FILE)), asked)
    assert (sorted(decision.grants), list(decision.reasons)) == (grants.split(), reasons.split())
    assert decision.verdict is (Verdict.ALLOW if grants else Verdict.DENY)
    assert tuple(each.grant for each in decision.obligations) == decision.grants
    assert all(each.is_empty for each in decision.obligations)


def test_whole_record_is_read_by_whoever_may_read_every_trail(tmp_path: Path) -> None:
    engine = default_engine(load(tmp_path, a=FILE.replace("no-trail, workloads", "no-trail, keys: [x], workloads")))
    assert decide(engine, request(trail="", workload=AUDITOR)).reasons == ("denied-by:no-trail",)
    engine = default_engine(
        load(tmp_path, a=FILE.replace('"spiffe://example.org/human/*"], trails', '"spiffe://example.org/robot/*"], trails'))
    )
    assert decide(engine, request(trail="", workload=AUDITOR)).grants == ("reads-all",)


def test_no_rules_at_all_allow_nothing(tmp_path: Path) -> None:
    engine = default_engine(load(tmp_path, a="grants: []\n"))
    assert decide(engine, request()).reasons == (NO_GRANT,)
    assert decide(engine, request(trail="")).reasons == (NO_GRANT,)


def test_identity_of_a_trust_domain_itself_matches_only_anybody(tmp_path: Path) -> None:
    bare = request(workload="spiffe://example.org")
    assert decide(default_engine(load(tmp_path, a=GOOD.replace("/payments/*", "/**"))), bare).reasons == (NO_GRANT,)
    assert decide(default_engine(load(tmp_path, a=GOOD.replace("spiffe://example.org/payments/*", "**"))), bare).verdict is Verdict.ALLOW


@pytest.mark.parametrize(("matching", "walked"), [(300, 0), (1, 5_000)])
def test_crowd_within_the_bounds_is_decided_and_one_beyond_fails(tmp_path: Path, matching: int, walked: int) -> None:
    def crowd(times: int) -> str:
        keys = ["orders"] * matching * times + ["other"] * walked * times
        rules = [f"- {{id: g{n}, workloads: ['{API[:-3]}*'], keys: [{key}], operations: [read-key]}}\n" for n, key in enumerate(keys)]
        return "grants:\n" + "".join(rules)

    assert len(decide(default_engine(load(tmp_path, a=crowd(1))), request("read-key")).grants) == matching
    assert decide(default_engine(load(tmp_path, a=crowd(2))), request("read-key")).verdict is Verdict.FAILED
