"""How soon a changed grant decides."""

from __future__ import annotations

import time

from keybroker.errors import DeniedError
from tests.worlds import World, until

TRIES = 4


def test_changed_grant_is_live_within_a_second(world: World) -> None:
    file = world.directory / "grants" / "live.yaml"
    deny = "denies: [{id: live, workloads: ['spiffe://example.org/payments/**'], keys: [p521]}]\n"
    took = []
    with world.client() as client:

        def is_denied() -> bool:
            try:
                client.sign("p521", "ES512", message=b"message")
            except DeniedError as err:
                return err.reasons == ("denied-by:live",)
            return False

        try:
            for number in range(TRIES):
                (world.directory / "grants" / ".new").write_text(deny if number % 2 == 0 else "denies: []\n")
                (world.directory / "grants" / ".new").replace(file)
                started = time.monotonic()
                until(lambda number=number: is_denied() is (number % 2 == 0))  # type: ignore[misc]  # called at once
                took.append(time.monotonic() - started)
        finally:
            file.unlink()
    assert min(took) < 1, took  # the best of them: on a busy machine any one may have to wait
