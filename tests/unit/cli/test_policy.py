"""What `keybroker policy` refuses before it asks anything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from keybroker.cli import app
from keybroker.cli.arguments import UsageError
from keybroker.errors import ConfigError
from tests.policies import GOOD


@pytest.fixture(autouse=True)
def logging_again() -> Iterator[None]:
    """The program keeps the log quiet; other tests read it."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def grants(tmp_path: Path) -> Path:
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "a.yaml").write_text(GOOD)
    return tmp_path / "g"


def refused(*words: object, kind: type[Exception] = UsageError) -> str:
    with pytest.raises(kind) as caught:
        app(["policy", *map(str, words)], standalone_mode=False)
    return str(caught.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "say who asks, with --workload"),
        (("--workload", "x"), "workload: 'x' is not a SPIFFE ID"),
        (("--record", 1), "say where the record is"),
        (("--record", 1, "--input", "-"), "in one way"),
        (("--input", "GRANTS", "--key", "orders"), "in one way"),
        (("--input", "GRANTS"), "the input is not JSON"),
        (("--input", "/nowhere"), "No such file"),
    ],
)
def test_simulate_without_one_whole_request_is_wrong_usage(grants: Path, words: tuple[object, ...], says: str) -> None:
    given = [grants / "a.yaml" if word == "GRANTS" else word for word in words]
    assert says in refused("simulate", grants, *given)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "say where the record is"),
        (("--state", ".", "--export", "x"), "from one place"),
        (("--state", ".", "--since", "soon"), "is not a time"),
    ],
)
def test_replay_without_one_record_to_read_is_wrong_usage(grants: Path, words: tuple[object, ...], says: str) -> None:
    assert says in refused("replay", grants, *words)


def test_file_that_cannot_be_read_is_named(grants: Path, tmp_path: Path) -> None:
    assert "gone: cannot be read" in refused("replay", grants, "--export", tmp_path / "gone", kind=ConfigError)
    assert "gone: cannot be read" in refused("test", grants, "--tests", tmp_path / "gone", kind=ConfigError)
    assert "gone: cannot be read" in refused("diff", grants, tmp_path / "gone", kind=ConfigError)
