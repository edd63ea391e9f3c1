"""Which pool is used, and which may be closed. Pools are names here, credentials a list of contexts."""

from __future__ import annotations

import ssl
from typing import cast

import pytest

from keybroker.client.pools import Pools
from keybroker.client.tls import Credentials


class FakeCredentials:
    def __init__(self) -> None:
        self.now = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    def context(self) -> ssl.SSLContext:
        return self.now

    def renew(self) -> None:
        self.now = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class Made:
    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context


@pytest.fixture
def credentials() -> FakeCredentials:
    return FakeCredentials()


@pytest.fixture
def pools(credentials: FakeCredentials) -> Pools[Made]:
    return Pools(cast("Credentials", credentials), Made)


def test_one_pool_serves_all_calls_while_nothing_changes(pools: Pools[Made]) -> None:
    first, second = pools.take(), pools.take()
    assert first is second
    assert pools.give_back(first) == []
    assert pools.give_back(second) == []
    assert pools.take() is first


def test_outdated_pool_is_closed_after_its_last_call(pools: Pools[Made], credentials: FakeCredentials) -> None:
    old, again = pools.take(), pools.take()
    credentials.renew()
    new = pools.take()
    assert new is not old
    assert new.context is credentials.now
    assert pools.give_back(new) == []
    assert pools.give_back(old) == []
    assert pools.give_back(again) == [old]


def test_outdated_pool_that_nobody_uses_is_closed_with_the_next_call(pools: Pools[Made], credentials: FakeCredentials) -> None:
    old = pools.take()
    assert pools.give_back(old) == []
    credentials.renew()
    new = pools.take()
    assert pools.give_back(new) == [old]


def test_end_closes_what_is_idle_and_the_rest_after_its_last_call(pools: Pools[Made], credentials: FakeCredentials) -> None:
    old = pools.take()
    credentials.renew()
    new = pools.take()
    pools.give_back(new)
    assert pools.end() == [new]
    assert pools.give_back(old) == [old]
    assert pools.end() == []
    with pytest.raises(RuntimeError, match="closed"):
        pools.take()
