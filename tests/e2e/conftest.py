"""One served world for all tests that do not break it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.worlds import World, served, until


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with served(tmp_path_factory.mktemp("shared") / "world", "--key", "p384:ES384", "--key", "p521:ES512") as world:
        (world.directory / "grants" / "more.yaml").write_text(
            "grants:\n"
            "  - id: more-curves\n"
            '    workloads: ["spiffe://example.org/payments/*"]\n'
            "    keys: [p384, p521]\n"
            "    operations: [sign]\n"
            "    algorithms: [ES384, ES512]\n"
            "  - id: digests\n"
            '    workloads: ["spiffe://example.org/payments/api"]\n'
            "    keys: [orders, invoices]\n"
            "    operations: [sign-digest]\n"
            "    algorithms: [ES256, RS256, PS256, PS384, RS512]\n"
            "  - id: every-rsa\n"
            '    workloads: ["spiffe://example.org/payments/api"]\n'
            "    keys: [invoices]\n"
            "    operations: [sign]\n"
            "    algorithms: [RS256, RS384, RS512, PS384, PS512]\n"
        )
        until(lambda: any(b'"change":"policy"' in leaf for leaf in world.leaves()))
        yield world
