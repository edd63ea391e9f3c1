"""Rules that come in signed bundles: only a good and newer one takes the place of the old, and there is always one."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from keybroker.authority.policy import bundle_holder, bundle_source
from keybroker.authority.policy.bundle_holder import KEPT, BundleHolder
from keybroker.authority.policy.bundle_maker import OwnPolicy
from keybroker.config import OpaConfig, PolicyConfig
from keybroker.errors import ConfigError
from keybroker.model.decision import Decision, Verdict
from tests.impostor import http
from tests.opa import Publisher, write_keys
from tests.policies import GOOD, KEYS, REGO, Compile, edited, request

OTHER = edited("[orders]", "[invoices]")
NETWORKS = "networks: {office: [192.0.2.0/24]}\n"

Test = Callable[[BundleHolder, Publisher], Awaitable[None]]


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path / "p")


async def load(publisher: Publisher, *, by_url: bool = False) -> BundleHolder:
    return await BundleHolder.load(PolicyConfig(bundle=publisher.config(by_url=by_url)), publisher.state, KEYS)


def with_holder(publisher: Publisher, test: Test, text: str = GOOD, *, by_url: bool = False) -> None:
    """A holder with one bundle, revision 1."""

    async def run() -> None:
        publisher.publish(text)
        made = await load(publisher, by_url=by_url)
        try:
            await test(made, publisher)
        finally:
            await made.close()

    with publisher.serving():
        asyncio.run(run())


def refused_at_start(publisher: Publisher) -> str:
    with pytest.raises(ConfigError) as caught:
        asyncio.run(load(publisher))
    return str(caught.value)


async def ask(made: BundleHolder, key: str = "orders") -> Decision:
    return await made.engine.decide(request(key=key))


async def is_live(made: BundleHolder, key: str) -> bool:
    """Whether the live rules are those that grant this key, and not the other."""
    other = "invoices" if key == "orders" else "orders"
    return ((await ask(made, key)).verdict, (await ask(made, other)).verdict) == (Verdict.ALLOW, Verdict.DENY)


async def take_up(made: BundleHolder) -> None:
    for _ in range(300):
        candidate = await made.refresh()
        if candidate is not None:
            made.adopt(candidate)
            return
        await asyncio.sleep(0.02)
    pytest.fail(f"nothing was taken up: {made.problems}")


@pytest.mark.parametrize("by_url", [False, True])
def test_newer_bundle_becomes_a_candidate_and_decides_once_it_is_adopted(publisher: Publisher, by_url: bool) -> None:
    async def test(made: BundleHolder, publisher: Publisher) -> None:
        old = made.engine.digest
        assert await is_live(made, "orders")
        assert (made.revision, made.problems, made.networks_of("192.0.2.1")) == (1, (), ("office",))
        publisher.publish(OTHER)
        await take_up(made)
        assert made.engine.digest != old
        assert await is_live(made, "invoices")
        assert (made.revision, made.problems, made.networks_of("192.0.2.1")) == (2, (), ())
        assert await made.refresh() is None
        assert (publisher.state / KEPT).read_bytes() == publisher.published.read_bytes()

    with_holder(publisher, test, GOOD + NETWORKS, by_url=by_url)


def test_candidate_that_was_not_adopted_is_found_again(publisher: Publisher) -> None:
    async def test(made: BundleHolder, publisher: Publisher) -> None:
        publisher.publish(OTHER)
        found = [await made.refresh() for _ in range(3)]
        assert None not in found
        assert {each.digest for each in found if each} != {made.engine.digest}
        assert await is_live(made, "orders")

    with_holder(publisher, test)


def test_server_is_asked_with_the_etag_it_gave(publisher: Publisher) -> None:
    async def test(made: BundleHolder, publisher: Publisher) -> None:
        for _ in range(30):
            assert await made.refresh() is None
            await asyncio.sleep(0.02)
        assert publisher.asked[0] == ""
        assert 1 <= len(set(publisher.asked[1:])) == len({each for each in publisher.asked[1:] if each})
        assert len(publisher.asked) <= 10  # every 200 ms

    with_holder(publisher, test, by_url=True)


@pytest.mark.case(25)
def test_bundle_of_another_key_leaves_the_old_in_force_until_a_good_one_comes(publisher: Publisher) -> None:
    async def test(made: BundleHolder, publisher: Publisher) -> None:
        mallory = Publisher(publisher.directory / "mallory")
        publisher.put(mallory.make(OTHER, 9))
        for _ in range(3):
            assert await made.refresh() is None
            assert made.problems == (f"{publisher.published}: is not signed by a key that this broker trusts",)
            assert await is_live(made, "orders")
        publisher.publish(OTHER)
        await take_up(made)
        assert await is_live(made, "invoices")
        assert made.problems == ()

    with_holder(publisher, test)


@pytest.mark.case(25)
def test_older_revision_and_the_same_with_other_content_leave_the_old_in_force(publisher: Publisher) -> None:
    async def test(made: BundleHolder, publisher: Publisher) -> None:
        publisher.publish(OTHER, 8)
        await take_up(made)
        for revision, why in ((7, "is older than 8"), (0, "is older than 8"), (8, "is another bundle of revision 8")):
            publisher.publish(GOOD, revision)
            assert await made.refresh() is None
            assert why in made.problems[0]
            assert await is_live(made, "invoices")
        publisher.publish(GOOD, 9)
        await take_up(made)
        assert await is_live(made, "orders")

    with_holder(publisher, test)


BROKEN: dict[str, Callable[[Publisher], bytes]] = {
    "empty": lambda _: b"",
    "garbage": lambda _: b"garbage" * 1_000,
    "cut off": lambda publisher: publisher.make(OTHER)[:-100],
}


@pytest.mark.case(25)
@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("by_url", [False, True])
def test_broken_bundle_leaves_the_old_in_force(publisher: Publisher, name: str, by_url: bool) -> None:
    async def test(made: BundleHolder, publisher: Publisher) -> None:
        publisher.put(BROKEN[name](publisher))
        for _ in range(60):
            assert await made.refresh() is None
            if made.problems:
                break
            await asyncio.sleep(0.02)
        assert made.problems
        assert await is_live(made, "orders")
        publisher.publish(OTHER)
        await take_up(made)
        assert await is_live(made, "invoices")

    with_holder(publisher, test, by_url=by_url)


@pytest.mark.case(25)
def test_signed_bundle_whose_grants_are_broken_leaves_the_old_in_force(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(made: BundleHolder, publisher: Publisher) -> None:
        with monkeypatch.context() as patched:
            patched.setattr("keybroker.authority.policy.loader.load_texts", lambda *_: made._live.rules)
            packed = publisher.make("grants: [{id: X}]")
        publisher.put(packed)
        assert await made.refresh() is None
        assert made.problems
        assert all(each.startswith(f"{publisher.published}/a.yaml:1: ") for each in made.problems)
        assert await is_live(made, "orders")

    with_holder(publisher, test)


ANSWERS = {
    "not found": http(b"gone", "404 Not Found"),
    "broken": http(b"", "500 Internal Server Error"),
    "redirect": http(b"", "302 Found", "Location: https://mallory.example/bundle.tar.gz"),
    "unchanged, though nothing was asked": http(b"", "304 Not Modified"),
    "no HTTP": b"220 ready\r\n",
    "nothing": b"",
    "cut off": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nabc",
}


@pytest.mark.case(25)
@pytest.mark.parametrize("name", ANSWERS)
def test_server_that_has_no_bundle_leaves_the_old_in_force(publisher: Publisher, name: str) -> None:
    async def test(made: BundleHolder, publisher: Publisher) -> None:
        made._source._etag = ""  # type: ignore[attr-defined]  # so that a 304 answers no question
        publisher.answers = ANSWERS[name]
        for _ in range(100):
            assert await made.refresh() is None
            if made.problems:
                break
            await asyncio.sleep(0.02)
        (problem,) = made.problems
        assert problem.startswith(f"{publisher.bundle_url}: ")
        assert await made.refresh() is None
        assert made.problems == (problem,)  # it does not flicker between two looks
        assert await is_live(made, "orders")
        publisher.answers = None
        publisher.publish(OTHER)
        await take_up(made)
        assert not made.problems

    with_holder(publisher, test, by_url=True)


def test_answer_that_is_too_large_or_too_slow_is_given_up(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(made: BundleHolder, publisher: Publisher) -> None:
        monkeypatch.setattr(bundle_source, "MAX_BUNDLE_BYTES", 1_000)
        publisher.publish(OTHER)
        for _ in range(100):
            assert await made.refresh() is None
            if made.problems:
                break
            await asyncio.sleep(0.02)
        assert made.problems == (f"{publisher.bundle_url}: larger than 1000 bytes",)
        monkeypatch.setattr(bundle_source, "FETCH_SECONDS", 0.0)
        await asyncio.sleep(0.25)
        assert await made.refresh() is None
        assert made.problems == (f"{publisher.bundle_url}: gave no policy bundle within 0 seconds",)
        assert await is_live(made, "orders")

    with_holder(publisher, test, by_url=True)


@pytest.mark.case(25)
def test_file_that_is_away_leaves_the_old_in_force_and_is_named(publisher: Publisher) -> None:
    async def test(made: BundleHolder, publisher: Publisher) -> None:
        publisher.published.unlink()
        for _ in range(4):
            assert await made.refresh() is None
            assert made.problems == (f"{publisher.published}: cannot be read: No such file or directory",)
            assert await is_live(made, "orders")
        publisher.publish(OTHER)
        await take_up(made)
        assert made.problems == ()

    with_holder(publisher, test)


@pytest.mark.case(25)
def test_start_without_its_source_takes_the_bundle_that_was_kept(publisher: Publisher) -> None:
    with_holder(publisher, lambda made, _: is_live(made, "orders"))  # type: ignore[arg-type,return-value]  # what it says is not needed
    publisher.published.unlink()

    async def run() -> None:
        made = await load(publisher)
        assert await is_live(made, "orders")
        assert made.problems == (f"{publisher.published}: cannot be read: No such file or directory",)
        await made.close()

    asyncio.run(run())


@pytest.mark.case(25)
def test_start_with_an_older_bundle_than_the_one_that_was_kept_stays_with_that(publisher: Publisher) -> None:
    old = publisher.make(OTHER)
    with_holder(publisher, lambda made, _: is_live(made, "orders"))  # type: ignore[arg-type,return-value]  # as above
    for packed in (old, publisher.make(OTHER, 2), b"garbage"):
        publisher.put(packed)

        async def run() -> None:
            made = await load(publisher)
            assert (await is_live(made, "orders"), len(made.problems), made.revision) == (True, 1, 2)
            await made.close()

        asyncio.run(run())
    publisher.publish(OTHER, 3)

    async def newer() -> None:
        made = await load(publisher)
        assert (await is_live(made, "invoices"), made.problems, made.revision) == (True, (), 3)
        await made.close()

    asyncio.run(newer())


@pytest.mark.case(25)
def test_start_without_any_good_bundle_is_refused(publisher: Publisher) -> None:
    assert "cannot be read: No such file" in refused_at_start(publisher)
    publisher.put(b"garbage")
    assert "is not a gzip file" in refused_at_start(publisher)
    publisher.publish(GOOD)
    (publisher.state / KEPT).write_bytes(b"garbage")
    assert "is the bundle that was in force" in refused_at_start(publisher)
    (publisher.state / KEPT).unlink()
    asyncio.run(load(publisher))
    write_keys(publisher.directory)  # the old key is no longer trusted, and so neither is what it signed
    publisher.publish(GOOD)
    assert "if keys or scope were changed on purpose, remove it" in refused_at_start(publisher)


def test_kept_bundle_whose_rules_no_longer_load_still_tells_what_is_older(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    with_holder(publisher, lambda made, _: is_live(made, "orders"))  # type: ignore[arg-type,return-value]  # as above
    newer = publisher.make(OTHER, 5)
    publisher.published.unlink()

    def refuse(_self: object, _bundle: object, source: str) -> None:
        raise ConfigError(f"{source}: of another version")

    with monkeypatch.context() as patched:
        patched.setattr(bundle_holder._Maker, "candidate", refuse)
        assert "of another version" in refused_at_start(publisher)
    publisher.put(newer)

    async def run() -> None:
        made = await load(publisher)
        assert made.revision == 5
        await made.close()

    asyncio.run(run())


def test_only_looking_keeps_nothing(publisher: Publisher) -> None:
    publisher.publish(GOOD)

    async def run() -> None:
        made = await BundleHolder.load(PolicyConfig(bundle=publisher.config()), publisher.state, KEYS, is_kept=False)
        await made.close()

    asyncio.run(run())
    assert list(publisher.state.iterdir()) == []


def test_bundle_that_cannot_be_kept_is_not_taken_up(publisher: Publisher) -> None:
    async def test(made: BundleHolder, publisher: Publisher) -> None:
        (publisher.state / KEPT).unlink()
        (publisher.state / KEPT).mkdir()
        publisher.publish(OTHER)
        assert await made.refresh() is None
        assert made.problems == (f"{publisher.state / KEPT}: cannot be written: Is a directory",)
        assert await is_live(made, "orders")
        (publisher.state / KEPT).rmdir()
        await take_up(made)
        assert await is_live(made, "invoices")

    with_holder(publisher, test)


def test_own_policy_of_a_bundle_decides(publisher: Publisher, compiled: Compile, tmp_path: Path) -> None:
    rego = REGO.read_text().replace("count(denied_by) == 0\n", 'count(denied_by) == 0\n\tinput.reason != ""\n', 1)
    (tmp_path / "my.rego").write_text(rego)
    (tmp_path / "my.wasm").write_bytes(compiled(rego))

    async def test(made: BundleHolder, publisher: Publisher) -> None:
        assert (await ask(made)).verdict is Verdict.ALLOW
        publisher.own = OwnPolicy(tmp_path / "my.rego", tmp_path / "my.wasm")
        publisher.publish(GOOD)
        await take_up(made)
        assert (await ask(made)).verdict is Verdict.DENY
        assert (await made.engine.decide(request(reason="because"))).verdict is Verdict.ALLOW

    with_holder(publisher, test)


@pytest.mark.case(24)
def test_own_policy_that_asks_the_world_is_neither_packed_nor_taken(publisher: Publisher, compiled: Compile, tmp_path: Path) -> None:
    rego = 'package keybroker\n\ndecision := http.send({"method": "GET", "url": "http://127.0.0.1"})\n'
    (tmp_path / "my.rego").write_text(rego)
    (tmp_path / "my.wasm").write_bytes(compiled(rego))
    publisher.own = OwnPolicy(tmp_path / "my.rego", tmp_path / "my.wasm")
    with pytest.raises(ConfigError, match=r"the policy calls http\.send"):
        publisher.make(GOOD)


@pytest.mark.case(26)
def test_each_decision_under_a_swap_of_bundles_is_of_exactly_one_digest(publisher: Publisher) -> None:
    decisions: list[Decision] = []

    async def worker(made: BundleHolder, number: int, stop: asyncio.Event) -> None:
        while not stop.is_set():
            decisions.append(await made.engine.decide(request(reason=f"{number}")))
            await asyncio.sleep(0)

    async def test(made: BundleHolder, publisher: Publisher) -> None:
        grants_of = {made.engine.digest: ("payments",)}
        stop = asyncio.Event()
        workers = [asyncio.ensure_future(worker(made, number, stop)) for number in range(100)]
        for swap in range(1, 6):
            publisher.publish(GOOD.replace("id: payments", f"id: swap-{swap}"))
            await take_up(made)
            grants_of[made.engine.digest] = (f"swap-{swap}",)
            await asyncio.sleep(0.02)
        stop.set()
        await asyncio.gather(*workers)
        assert len(grants_of) == 6
        assert {each.policy for each in decisions} == set(grants_of)
        assert all(each.grants == grants_of[each.policy] for each in decisions)

    with_holder(publisher, test)


def test_missing_packages_of_the_opa_engine_are_named_with_their_cure(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher.publish(GOOD)
    monkeypatch.delitem(sys.modules, "keybroker.authority.policy.opa_server", raising=False)
    monkeypatch.setitem(sys.modules, "opa_client", None)
    config = PolicyConfig(engine="opa", bundle=publisher.config(), opa=OpaConfig(url="http://127.0.0.1:8181"))
    with pytest.raises(ConfigError, match=r"^opa_client is not installed: pip install 'keybroker\[opa\]'$"):
        asyncio.run(BundleHolder.load(config, publisher.state, KEYS))
