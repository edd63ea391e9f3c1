"""Rules that are live, and others that take their place: never a moment without rules, and never a mix of two."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from keybroker.authority.policy import holder, loader, wasm
from keybroker.authority.policy.grants import Rules
from keybroker.authority.policy.holder import PolicyHolder
from keybroker.errors import ConfigError
from keybroker.model.decision import Decision, Verdict
from tests.policies import GOOD, KEYS, Compile, deny, edited, request

NOT_ORDERS = edited("[orders]", "[invoices]")
NETWORKS = "networks: {office: [192.0.2.0/24]}\n"

Test = Callable[[PolicyHolder, Path], Awaitable[None]]


def with_holder(tmp_path: Path, test: Test, text: str = GOOD) -> None:
    """A holder that has loaded one file, `a.yaml`, and has seen that nothing else is new."""

    async def run() -> None:
        directory = tmp_path / "grants"
        directory.mkdir()
        (directory / "a.yaml").write_text(text)
        made = await PolicyHolder.load(directory, None, KEYS)
        assert await made.refresh() is None
        await test(made, directory)

    asyncio.run(run())


async def ask(made: PolicyHolder, key: str = "orders") -> Decision:
    return await made.engine.decide(request(key=key))


async def is_live(made: PolicyHolder, key: str) -> bool:
    """Whether the live rules are those that grant this key, and not the other."""
    verdicts = {name: (await ask(made, name)).verdict for name in ("orders", "invoices")}
    other = "invoices" if key == "orders" else "orders"
    return verdicts == {key: Verdict.ALLOW, other: Verdict.DENY}


def test_changed_file_becomes_a_candidate_and_decides_once_it_is_adopted(tmp_path: Path) -> None:
    async def test(made: PolicyHolder, directory: Path) -> None:
        old = made.engine.digest
        (directory / "a.yaml").write_text(NOT_ORDERS)
        candidate = await made.refresh()
        assert candidate is not None
        assert made.engine.digest == old
        assert await is_live(made, "orders")
        made.adopt(candidate)
        assert made.engine.digest == candidate.digest != old
        assert await is_live(made, "invoices")
        assert (await ask(made)).policy == candidate.digest
        assert await made.refresh() is None

    with_holder(tmp_path, test)


def test_candidate_that_was_not_adopted_is_found_again(tmp_path: Path) -> None:
    async def test(made: PolicyHolder, directory: Path) -> None:
        (directory / "a.yaml").write_text(NOT_ORDERS)
        found = [await made.refresh() for _ in range(3)]
        assert len({each.digest for each in found if each}) == 1
        assert None not in found

    with_holder(tmp_path, test)


def test_new_and_removed_files_become_candidates(tmp_path: Path) -> None:
    async def test(made: PolicyHolder, directory: Path) -> None:
        (directory / "b.yaml").write_text(deny("keys: [orders]"))
        candidate = await made.refresh()
        assert candidate is not None
        made.adopt(candidate)
        assert (await ask(made)).reasons == ("denied-by:d",)
        (directory / "b.yaml").rename(directory / "b.yaml.off")
        candidate = await made.refresh()
        assert candidate is not None
        made.adopt(candidate)
        assert await is_live(made, "orders")

    with_holder(tmp_path, test)


def test_same_content_is_no_candidate_however_it_was_touched(tmp_path: Path) -> None:
    async def test(made: PolicyHolder, directory: Path) -> None:
        file = directory / "a.yaml"
        file.touch()
        assert await made.refresh() is None
        file.write_text(GOOD)
        assert await made.refresh() is None
        file.write_text("# a remark\n" + GOOD)
        assert await made.refresh() is None
        file.rename(directory / "z.yaml")
        assert await made.refresh() is None
        (directory / ".a.yaml.swp").write_text("an editor's")
        (directory / "notes.txt").write_text("somebody's")
        assert await made.refresh() is None
        assert made.problems == ()
        assert await is_live(made, "orders")

    with_holder(tmp_path, test)


def test_files_that_have_not_changed_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Path] = []
    load = loader.load

    def counted(directory: Path, known_keys: frozenset[str]) -> Rules:
        loads.append(directory)
        return load(directory, known_keys)

    async def test(made: PolicyHolder, directory: Path) -> None:
        monkeypatch.setattr(loader, "load", counted)
        for _ in range(10):
            assert await made.refresh() is None
        assert loads == []
        (directory / "a.yaml").touch()
        for _ in range(10):
            assert await made.refresh() is None
        assert len(loads) == 2  # once because it is new, once more because it might have changed within a tick of the clock
        (directory / "a.yaml").write_text("grants: [")
        for _ in range(10):
            assert await made.refresh() is None
        assert len(loads) == 4

    with_holder(tmp_path, test)


def test_change_of_the_same_size_with_its_old_time_is_found(tmp_path: Path) -> None:
    async def test(made: PolicyHolder, directory: Path) -> None:
        file = directory / "a.yaml"
        before = file.stat()
        file.write_text(GOOD.replace("ES256", "ES384"))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_size == before.st_size
        assert await made.refresh() is not None

    with_holder(tmp_path, test)


def test_second_change_within_a_tick_of_the_clock_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(made: PolicyHolder, directory: Path) -> None:
        monkeypatch.setattr(holder, "fingerprint", lambda path: (len(path.name),))
        (directory / "b.yaml").write_text(deny("keys: [orders]"))
        first = await made.refresh()
        assert first is not None
        made.adopt(first)
        (directory / "b.yaml").write_text(deny("keys: [invoices]"))
        second = await made.refresh()
        assert second is not None
        assert second.digest != first.digest

    with_holder(tmp_path, test)


BROKEN = {
    "parse error": "grants: [\n",
    "empty": "",
    "unknown field": GOOD + "    colour: red\n",
    "not built": GOOD + "    limits: []\n",
    "not text": "\0",
    "empty list": edited("[orders]", "[]"),
    "alias": edited("[orders]", "[*x]"),
}


@pytest.mark.case(25)
@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_broken_file_leaves_the_old_rules_in_force_and_is_named(tmp_path: Path, text: str) -> None:
    async def test(made: PolicyHolder, directory: Path) -> None:
        old = made.engine.digest
        (directory / "a.yaml").write_text(text)
        for _ in range(3):
            assert await made.refresh() is None
            assert made.problems
            assert all(problem.startswith(f"{directory}/a.yaml") for problem in made.problems)
            assert made.engine.digest == old
            assert await is_live(made, "orders")
        (directory / "a.yaml").write_text(NOT_ORDERS)
        candidate = await made.refresh()
        assert candidate is not None
        assert made.problems == ()
        made.adopt(candidate)
        assert await is_live(made, "invoices")

    with_holder(tmp_path, test)


@pytest.mark.case(25)
def test_broken_file_beside_good_ones_leaves_all_the_old_rules_in_force(tmp_path: Path) -> None:
    async def test(made: PolicyHolder, directory: Path) -> None:
        (directory / "a.yaml").write_text(NOT_ORDERS)
        (directory / "b.yaml").write_text("denies: [")
        assert await made.refresh() is None
        assert len(made.problems) == 1
        assert await is_live(made, "orders")

    with_holder(tmp_path, test)


@pytest.mark.case(25)
def test_repaired_file_with_the_old_content_clears_the_problem(tmp_path: Path) -> None:
    async def test(made: PolicyHolder, directory: Path) -> None:
        (directory / "a.yaml").write_text("grants: [")
        assert await made.refresh() is None
        assert made.problems
        (directory / "a.yaml").write_text(GOOD)
        assert await made.refresh() is None
        assert made.problems == ()

    with_holder(tmp_path, test)


@pytest.mark.case(25)
def test_directory_that_is_emptied_or_removed_leaves_the_old_rules_in_force(tmp_path: Path) -> None:
    async def test(made: PolicyHolder, directory: Path) -> None:
        (directory / "a.yaml").unlink()
        assert await made.refresh() is None
        assert made.problems == (
            f"{directory}: holds no *.yaml file; without grants nobody may do anything, so write at least `grants: []`",
        )
        assert await is_live(made, "orders")
        await asyncio.to_thread(shutil.rmtree, directory)
        assert await made.refresh() is None
        assert await is_live(made, "orders")
        await asyncio.to_thread(directory.mkdir)
        (directory / "a.yaml").write_text(NOT_ORDERS)
        candidate = await made.refresh()
        assert candidate is not None
        made.adopt(candidate)
        assert await is_live(made, "invoices")

    with_holder(tmp_path, test)


@pytest.mark.case(25)
def test_removed_directory_is_named(tmp_path: Path) -> None:
    async def test(made: PolicyHolder, directory: Path) -> None:
        shutil.rmtree(directory)
        for _ in range(3):
            assert await made.refresh() is None
            assert made.problems == (f"{directory}: cannot be read: No such file or directory",)
            assert await is_live(made, "orders")

    with_holder(tmp_path, test)


@pytest.mark.case(25)
def test_rules_that_are_too_large_for_the_engine_leave_the_old_in_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(made: PolicyHolder, directory: Path) -> None:
        monkeypatch.setattr(wasm, "MEMORY_BYTES", 2 * 1024 * 1024)
        rules = "".join(f"- {{id: d{n}, workloads: ['spiffe://example.org/{'x' * 500}{n}']}}\n" for n in range(5_000))
        (directory / "b.yaml").write_text("denies:\n" + rules)
        assert await made.refresh() is None
        (problem,) = made.problems
        assert problem.startswith(f"{directory}: the rules are too large for the policy engine (")
        assert await is_live(made, "orders")

    with_holder(tmp_path, test)


def test_networks_and_warnings_are_those_of_the_live_rules(tmp_path: Path) -> None:
    async def test(made: PolicyHolder, directory: Path) -> None:
        (directory / "a.yaml").write_text(edited("[orders]", "[odrers]"))
        (directory / "n.yaml").write_text(NETWORKS.replace("office", "lab"))
        candidate = await made.refresh()
        assert candidate is not None
        assert (made.networks_of("192.0.2.1"), made.warnings) == (("office",), ())
        made.adopt(candidate)
        assert made.networks_of("192.0.2.1") == ("lab",)
        assert made.warnings == (f"{directory}/a.yaml:4: there is no key 'odrers' in the configuration",)

    with_holder(tmp_path, test, GOOD + NETWORKS)


@pytest.mark.case(26)
def test_each_decision_under_a_swap_is_of_exactly_one_digest(tmp_path: Path) -> None:
    decisions: list[Decision] = []

    async def worker(made: PolicyHolder, number: int, stop: asyncio.Event) -> None:
        count = 0
        while not stop.is_set():
            count += 1
            asked = request(key=("orders", "invoices")[(count + number) % 2], reason=f"{number}/{count // 4}")
            decisions.append(await made.engine.decide(asked))
            await asyncio.sleep(0)

    async def test(made: PolicyHolder, directory: Path) -> None:
        grants_of = {made.engine.digest: ("payments",)}
        stop = asyncio.Event()
        workers = [asyncio.ensure_future(worker(made, number, stop)) for number in range(100)]
        for swap in range(1, 9):
            text = GOOD.replace("id: payments", f"id: swap-{swap}").replace("orders", ("orders", "invoices")[swap % 2])
            (directory / "a.yaml").write_text(text)
            candidate = await made.refresh()
            assert candidate is not None
            made.adopt(candidate)
            grants_of[candidate.digest] = (f"swap-{swap}",)
            await asyncio.sleep(0.02)
        stop.set()
        await asyncio.gather(*workers)
        assert len(grants_of) == 9
        assert {each.policy for each in decisions} == set(grants_of)
        allowed = [each for each in decisions if each.verdict is Verdict.ALLOW]
        denied = [each for each in decisions if each.verdict is Verdict.DENY]
        assert len(allowed) + len(denied) == len(decisions)
        assert all(each.grants == grants_of[each.policy] for each in allowed)
        assert all(each.reasons == ("no-grant",) for each in denied)
        assert {each.policy for each in denied} == set(grants_of)

    with_holder(tmp_path, test)


def test_first_rules_that_cannot_be_used_are_refused(tmp_path: Path, compiled: Compile) -> None:
    async def load(module: Path | None) -> PolicyHolder:
        return await PolicyHolder.load(tmp_path, module, KEYS)

    own = tmp_path / "own.wasm"
    with pytest.raises(ConfigError, match=r"holds no \*\.yaml file"):
        asyncio.run(load(None))
    (tmp_path / "a.yaml").write_text(GOOD)
    with pytest.raises(ConfigError, match=r"own\.wasm: cannot be read: No such file"):
        asyncio.run(load(own))
    own.write_text("package keybroker")
    with pytest.raises(ConfigError, match=r"own\.wasm: not a WebAssembly module"):
        asyncio.run(load(own))
    own.write_bytes(compiled("package keybroker\n\ndecision := data.keybroker_rules\n"))
    made = asyncio.run(load(own))
    assert asyncio.run(made.engine.decide(request())).reasons == ("policy-error",)
    assert made.engine.digest != asyncio.run(load(None)).engine.digest
