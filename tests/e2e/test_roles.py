"""Roles are rules, as people meet them: one freezes, two unfreeze, one narrows the rules, two widen them. A real broker throughout."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from keybroker.audit.leaf import decode
from keybroker.client.errors import PendingError
from keybroker.errors import RateLimitedError
from tests.programs import lines, loaded, refused
from tests.worlds import World, make_world

SIGN = ("sign", "--key", "orders", "--alg", "ES256", "-")
RELEASE = ("sign", "--key", "release", "--alg", "ES256", "-")
ROLES = """\
# alice and bob are those of release.yaml
grants:
  - {id: responders, workloads: ["spiffe://example.org/human/*"], operations: [freeze], subjects: ["**"], keys: ["*"], tokens: ["*"]}
  - id: unfreezing
    workloads: ["spiffe://example.org/human/*"]
    operations: [unfreeze]
    subjects: ["**"]
    keys: ["*"]
    tokens: ["*"]
    quorum: {approvals: 1, of: [responders], expires: 1h}
  - id: admins
    workloads: ["spiffe://example.org/human/admin", "spiffe://example.org/human/admin-2"]
    operations: [admin-policy]
    quorum: {approvals: 1, of: [admins], expires: 1h}
  - {id: glass, workloads: ["spiffe://example.org/human/alice", "spiffe://example.org/human/bob"], operations: [break-glass],
     waives: [release]}
people:
  ada: ["spiffe://example.org/human/admin", "spiffe://example.org/human/admin-2"]
groups:
  responders: [alice, bob]
  admins: [ada, bob]
"""


@pytest.fixture(scope="module")
def ruled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A broker whose rules are in its store."""
    world = make_world(tmp_path_factory.mktemp("roles") / "world", "--workload", "spiffe://example.org/human/admin-2")
    (world.directory / "grants" / "roles.yaml").write_text(ROLES)
    config = world.config_file.read_text()
    assert config.count("  grants: grants\n") == 1
    world.config_file.write_text(config.replace("  grants: grants\n", "  grants: grants\n  policy_changes: operations\n"))
    try:
        world.start()
        yield world
    finally:
        world.kill()


def pending(world: World, *words: str, name: str) -> str:
    """The operation that a command begins."""
    done = world.run(*words, name=name)
    assert done.returncode == 4, done.stderr
    found = re.search(rb"operation ([0-9A-Z]{26}) is pending", done.stderr)
    assert found, done.stderr
    return found[1].decode()


def second_admin(world: World) -> str:
    (found,) = [path.stem for path in (world.directory / "svids").glob("*admin-2*.pem")]
    return found


def records(world: World, kind: str) -> list[dict[str, object]]:
    return [each for each in map(decode, world.leaves()) if each["kind"] == kind]


def test_one_freezes_and_two_unfreeze(ruled: World) -> None:
    assert "responder" in loaded(ruled.run("whoami", "--json", name="alice"))["roles"]
    lines(ruled.run(*SIGN, stdin=b"1"))
    frozen = loaded(ruled.run("freeze", "--key", "orders", "--reason", "incident 7", "--json", name="alice"))
    assert "frozen" in refused(ruled.run(*SIGN, stdin=b"2"), 3)
    refused(ruled.run("freeze", "--key", "orders", "--reason", "mine", name="payments-api"), 3)
    assert frozen["id"] in ruled.run("freezes", name="bob").stdout.decode()
    operation = pending(ruled, "unfreeze", frozen["id"], name="alice")
    refused(ruled.run("operations", "approve", operation, "--yes", name="alice"), 3)
    assert pending(ruled, "unfreeze", frozen["id"], "--operation", operation, name="alice") == operation
    lines(ruled.run("operations", "approve", operation, "--yes", name="bob"))
    refused(ruled.run("unfreeze", frozen["id"], "--operation", operation, name="bob"), 3)  # bob did not ask for it
    refused(ruled.run("operations", "redeem", operation, name="alice"), 3)
    assert loaded(ruled.run("unfreeze", frozen["id"], "--operation", operation, "--json", name="alice"))["id"] == frozen["id"]
    lines(ruled.run(*SIGN, stdin=b"3"))
    lifted = records(ruled, "freeze")[-1]
    assert (lifted["operation_id"], len(lifted["approvals"])) == (operation, 1)  # type: ignore[arg-type]  # a list


def test_frozen_approver_approves_nothing_and_what_he_has_approved_is_worth_nothing(ruled: World) -> None:
    frozen = loaded(ruled.run("freeze", "--token", "development", "--reason", "incident 8", "--json", name="alice"))
    operation = pending(ruled, "unfreeze", frozen["id"], name="alice")
    lines(ruled.run("operations", "approve", operation, "--yes", name="bob"))
    stopped = loaded(ruled.run("freeze", "--workload", "spiffe://example.org/human/bob", "--reason", "8", "--json", name="alice"))
    assert pending(ruled, "unfreeze", frozen["id"], "--operation", operation, name="alice") == operation
    assert "frozen" in refused(ruled.run("freeze", "--everything", "--reason", "8", name="bob"), 3)
    other = pending(ruled, "unfreeze", stopped["id"], name="alice")
    assert ruled.run("operations", "approve", other, "--yes", name="bob").returncode == 3
    with ruled.client("admin") as admin:
        in_force = admin.freezes()
    for freeze in in_force:  # admin is no responder, but a human like the others: he asks, alice approves
        asked = pending(ruled, "unfreeze", freeze.id, name="admin")
        lines(ruled.run("operations", "approve", asked, "--yes", name="alice"))
        lines(ruled.run("unfreeze", freeze.id, "--operation", asked, name="admin"))
    lines(ruled.run(*SIGN, stdin=b"4"))


@pytest.mark.case(72)
@pytest.mark.case(73)
@pytest.mark.case(74)
def test_one_narrows_the_rules_and_two_widen_them(ruled: World, tmp_path: Path) -> None:
    rules = tmp_path / "rules"
    lines(ruled.run("policy", "live", "--out", str(rules), name="admin"))
    live = loaded(ruled.run("policy", "live", "--json", name="admin"))
    first, revision = live["base"], live["revision"]
    refused(ruled.run("policy", "live", name="payments-api"), 3)
    world_grants = next(path for path in rules.glob("*.yaml") if "ES256, PS256, Ed25519" in path.read_text())
    wide = world_grants.read_text()

    world_grants.write_text(wide.replace("[ES256, PS256, Ed25519]", "[PS256, Ed25519]"))
    lines(ruled.run("policy", "propose", str(rules), "--reason", "less", name="admin"))
    refused(ruled.run(*SIGN, stdin=b"5"), 3)
    assert "before" in refused(ruled.run("policy", "propose", str(rules), "--reason", "again", "--base", first, name="admin"), 1)

    world_grants.write_text(wide)
    assert "changed" in refused(ruled.run("policy", "propose", str(rules), "--reason", "old", "--base", first, name="admin"), 1)
    operation = pending(ruled, "policy", "propose", str(rules), "--reason", "back", name="admin")
    shown = ruled.run("operations", "show", operation, name="bob").stdout.decode()
    assert "grant payments: more algorithms" in shown
    for own in ("admin", second_admin(ruled)):  # the same person, whatever identity he uses
        refused(ruled.run("operations", "approve", operation, "--yes", name=own), 3)
    pending(ruled, "policy", "propose", str(rules), "--reason", "back", "--operation", operation, name="admin")
    refused(ruled.run(*SIGN, stdin=b"6"), 3)
    lines(ruled.run("operations", "approve", operation, "--yes", name="bob"))
    world_grants.write_text(wide.replace("payments/api", "**"))
    refused(ruled.run("policy", "propose", str(rules), "--reason", "other", "--operation", operation, name="admin"), 3)
    world_grants.write_text(wide)
    lines(ruled.run("policy", "propose", str(rules), "--reason", "back", "--operation", operation, name="admin"))
    lines(ruled.run(*SIGN, stdin=b"7"))
    base = json.loads(ruled.run("policy", "live", "--json", name="admin").stdout)
    assert base["revision"] == revision + 2
    changed = records(ruled, "admin")[-1]
    assert (changed["operation_id"], len(changed["approvals"])) == (operation, 1)  # type: ignore[arg-type]  # a list
    events = {each["body"]["event"] for each in records(ruled, "security")}  # type: ignore[index]  # an object
    assert {"policy-widening", "policy-stale-base", "policy-replayed"} <= events

    assert ruled.stop() == 0
    ruled.start()
    assert loaded(ruled.run("policy", "live", "--json", name="admin"))["revision"] == revision + 2
    lines(ruled.run(*SIGN, stdin=b"8"))


@pytest.mark.case(75)
def test_broken_glass_waives_the_quorum_for_a_while_and_waits_for_a_review_by_another(ruled: World) -> None:
    pending(ruled, *RELEASE, name="ci-release")
    refused(ruled.run("break-glass", "open", "--grant", "release", "--for", "30m", "--reason", "me", name="ci-release"), 3)
    refused(ruled.run("break-glass", "open", "--grant", "release", "--for", "2h", "--reason", "long", name="alice"), 2)
    opened = loaded(
        ruled.run("break-glass", "open", "--grant", "release", "--for", "30m", "--reason", "incident 9", "--json", name="alice")
    )
    assert records(ruled, "admin")[-1]["body"]["change"] == "break-glass-open"  # type: ignore[index]  # an object
    lines(ruled.run(*RELEASE, name="ci-release", stdin=b"1"))
    intent = records(ruled, "intent")[-1]
    assert intent["body"]["break_glass"] == [opened["id"]]  # type: ignore[index]  # an object
    assert intent["decision"]["obligations"][0]["quorum"]  # type: ignore[index]  # what was waived stays on record

    assert ruled.stop() == 0
    ruled.start()
    lines(ruled.run(*RELEASE, name="ci-release", stdin=b"2"))
    ended = loaded(ruled.run("break-glass", "close", opened["id"], "--note", "done", "--json", name="alice"))
    assert (ended["is_open"], ended["is_reviewed"]) == (False, False)
    pending(ruled, *RELEASE, name="ci-release")
    assert opened["id"] in ruled.run("break-glass", "list", name="bob").stdout.decode()
    assert loaded(ruled.run("break-glass", "close", opened["id"], "--note", "two releases", "--json", name="bob"))["is_reviewed"]
    assert lines(ruled.run("break-glass", "list", name="bob")) == []
    assert "glass-broken" in {each["body"]["event"] for each in records(ruled, "security")}  # type: ignore[index]  # an object


def test_limit_is_watched_before_it_binds_and_one_person_may_do_both(ruled: World) -> None:
    limit = "    limits: [{max: 1, window: 1h, per: workload}]\n"
    free = "    algorithms: [ES256, PS256, Ed25519]\n"
    with ruled.client("admin") as admin, ruled.client("bob") as bob, ruled.client() as api:
        before = admin.live_policy()
        (name,) = [each for each, text in before.files.items() if free in text]

        def with_demand(demand: str) -> dict[str, str]:
            return before.files | {name: before.files[name].replace(free, free + demand)}

        watched = admin.propose_policy(before.base, with_demand(f"{limit}    observe_only: true\n"), reason="watch")
        for message in (b"1", b"2"):
            api.sign("orders", "ES256", message=message)
        seen = [each["body"]["observed"] for each in records(ruled, "intent")[-2:]]  # type: ignore[index]  # an object
        assert seen == [[], ["limit:payments"]]

        bound = admin.propose_policy(watched.base, with_demand(limit), reason="bind")
        with pytest.raises(RateLimitedError):  # the unit that was taken while it was watched is taken
            api.sign("orders", "ES256", message=b"3")
        with pytest.raises(PendingError) as waits:
            admin.propose_policy(bound.base, before.files, reason="back")
        operation = waits.value.pending.operation
        bob.approve(bob.operation(operation))
        admin.propose_policy(bound.base, before.files, reason="back", operation=operation)
        api.sign("orders", "ES256", message=b"4")
