"""Named networks: strict ranges, and which of them an address is in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.policies import deny, edited, load, refusal

RANGE = "not an address range such as 192.0.2.0/24, with no bits behind the prefix"
NOT_MAPPED = "write it as an IPv4 range: addresses are compared in that form"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (edited("[sign]", "[sign]\n    networks: [lab]"), "a.yaml:6: no network is named 'lab'; define it under `networks`"),
        (deny("networks: [lab]"), "a.yaml:2: no network is named 'lab'; define it under `networks`"),
        ("networks:\n  office: []\n", "a.yaml:2: networks.office: must be a list of at least one address range"),
        ("networks:\n  office:\n", "a.yaml:2: networks.office: must be a list of at least one address range"),
        ("networks:\n  office: 192.0.2.0/24\n", "a.yaml:2: networks.office: must be a list of at least one address range"),
        ("networks:\n  Office: [192.0.2.0/24]\n", "a.yaml:2: networks.Office: a network name is [a-z0-9][a-z0-9._-]{0,63}"),
        ("networks:\n  a: ['::ffff:192.0.2.0/120']\n", f"a.yaml:2: networks.a[0]: {NOT_MAPPED}"),
        ("networks:\n  a:\n  - '::ffff:0:0/96'\n", f"a.yaml:3: networks.a[0]: {NOT_MAPPED}"),
    ],
)
def test_network_that_cannot_be_used_is_refused_with_file_and_line(tmp_path: Path, text: str, error: str) -> None:
    assert error in refusal(tmp_path, a=text)


@pytest.mark.parametrize(
    "text",
    ["192.0.2.1/24", "2001:db8::1/32", "192.0.2.0/33", "2001:db8::/129", "192.0.2.0/255.255.255.0", "192.0.2.0/0.0.0.255", "192.0.2",
     "office", "", " 192.0.2.0/24", "192.0.2.0/24 ", "192.0.2.0/24\n", "192.0.2.0/-1", "192.0.2.0/+24", "192.0.2.0/", "fe80::%eth0/64",
     "::1%lo", "192.000.002.000/24", "0300.0.2.0", "192.0.2.0/\u0662\u0664", "*", "0.0.0.0/0.0.0.0", "1", 1, 3221225984, True, None,
     ["192.0.2.0/24"]],
)  # fmt: skip
def test_address_range_that_is_malformed_is_refused(tmp_path: Path, text: Any) -> None:
    lines = refusal(tmp_path, a=yaml.safe_dump({"networks": {"office": ["192.0.2.0/24", text]}}, allow_unicode=True))
    assert [line.partition(": ")[2] for line in lines] == [f"networks.office[1]: {RANGE}"]


def test_network_that_is_defined_twice_is_refused_over_files(tmp_path: Path) -> None:
    lines = refusal(tmp_path, a="networks: {office: [192.0.2.0/24]}\n", b="networks:\n  office: [192.0.2.0/24]\n")
    assert lines == ["b.yaml:2: networks.office: 'office' is defined twice"]


def test_network_may_be_defined_in_a_file_that_is_read_later(tmp_path: Path) -> None:
    used = edited("[sign]", "[sign]\n    networks: [office]")
    assert load(tmp_path, a=used, b="networks: {office: [192.0.2.0/24]}\n").grants[0].networks == ("office",)


RANGES = """\
networks:
  office: ["192.0.2.0/24", "2001:db8:1::/48"]
  build: [192.0.2.128/25, 198.51.100.7]
  link: ["fe80::/10"]
  all-six: ["::/0"]
  anywhere: ["0.0.0.0/0", "::/0"]
"""


@pytest.mark.parametrize(
    ("address", "names"),
    [
        ("192.0.2.1", "anywhere office"),
        ("192.0.2.128", "anywhere build office"),
        ("198.51.100.7", "anywhere build"),
        ("198.51.100.8", "anywhere"),
        ("::ffff:192.0.2.200", "anywhere build office"),
        ("::ffff:c000:2c8", "anywhere build office"),
        ("0:0:0:0:0:ffff:192.0.2.1", "anywhere office"),
        ("::ffff:192.0.2.1%eth0", "anywhere office"),
        ("::192.0.2.1", "all-six anywhere"),
        ("2001:db8:1::9", "all-six anywhere office"),
        ("2001:db8:2::9", "all-six anywhere"),
        ("2001:DB8:1:0::9", "all-six anywhere office"),
        ("fe80::1%eth0", "all-six anywhere link"),
        ("fe80::1", "all-six anywhere link"),
    ],
)
def test_address_is_in_the_networks_whose_ranges_hold_it(tmp_path: Path, address: str, names: str) -> None:
    assert load(tmp_path, a=RANGES).networks_of(address) == tuple(names.split())


@pytest.mark.parametrize(
    "garbage",
    ["", "localhost", "192.0.2.1:443", "192.0.2.1/24", "192.0.2", "192.0.2.256", "192.0.02.1", " 192.0.2.1", "192.0.2.1\n",
     "192.0.2.1%eth0", "[::1]", "::1%", "1.2.3.4.5", "3221225985", "\u0661\u0669\u0662.0.2.1", "\ud800", "\0", "::ffff:192.0.2.1.1",
     "unix:", "x" * 100_000],
)  # fmt: skip
def test_address_that_is_none_is_in_no_network(tmp_path: Path, garbage: str) -> None:
    assert load(tmp_path, a=RANGES).networks_of(garbage) == ()
