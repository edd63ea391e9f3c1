"""The configuration file: strict, with file, line and cure in each error."""

from __future__ import annotations

from pathlib import Path

import pytest

from keybroker import config as configuration
from keybroker.errors import ConfigError

GOOD = """\
frontend:
  listen: 127.0.0.1:8443
  svid: svids/broker.pem
  bundles: {example.org: bundle.pem}
  authority: run/authority.sock
authority:
  socket: run/authority.sock
  state: state
  log: example.org/broker-1
  bundles: {example.org: bundle.pem}
  grants: grants
  tokens:
    dev: {sockets: [run/hsm-0.sock]}
  keys:
    orders: {token: dev, versions: [{version: 1, object: orders, id: "0a"}]}
hsm:
  tokens:
    dev:
      uri: "pkcs11:token=dev?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:pin"
      sockets: [run/hsm-0.sock]
"""


def load(tmp_path: Path, text: str) -> configuration.Config:
    (tmp_path / "keybroker.yaml").write_text(text)
    return configuration.load(tmp_path / "keybroker.yaml")


def test_good_file_is_loaded_with_absolute_paths(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)
    assert config.frontend is not None
    assert config.authority is not None
    assert config.hsm is not None
    assert config.frontend.svid == tmp_path / "svids/broker.pem"
    assert config.authority.tokens["dev"].sockets == config.hsm.tokens["dev"].sockets == (tmp_path / "run/hsm-0.sock",)


def test_one_section_is_enough_for_a_host_with_one_room(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD[GOOD.index("hsm:") :])
    assert config.frontend is None
    assert config.authority is None


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("listen: 127.0.0.1:8443", "listen: localhost:8443", "keybroker.yaml:2: frontend.listen: 'localhost:8443' is not ADDRESS:PORT"),
        ("listen: 127.0.0.1:8443", "listen: 127.0.0.1:99999", "a port is between 1 and 65535"),
        ("  svid: svids/broker.pem\n", "", "keybroker.yaml:1: frontend: object missing required field `svid`"),
        ("  state: state", "  state: state\n  stat: x", "authority: object contains unknown field `stat`"),
        ("state: state", "state: 7", "keybroker.yaml:8: authority.state: expected text, got int"),
        ("log: example.org/broker-1", 'log: "a b"', "keybroker.yaml:9: authority.log: a name such as example.org/broker-1"),
        ("bundles: {example.org: bundle.pem}\n  grants", "bundles: {}\n  grants", "authority.bundles: name at least one trust domain"),
        ("dev: {sockets: [run/hsm-0.sock]}", "dev: {sockets: []}", "authority.tokens.dev.sockets: at least one socket"),
        ("dev: {sockets: [run/hsm-0.sock]}", "Dev: {sockets: [x]}", "authority.tokens.Dev: lower-case letters"),
        ("orders: {token: dev", "orders: {token: other", "keybroker.yaml:15: authority.keys.orders.token: no such token"),
        ("orders: {token: dev", "Orders: {token: dev", "a key name is"),
        ("version: 1, object", "version: 0, object", "numbered from 1, rising"),
        ('object: orders, id: "0a"', "", "give `object` (CKA_LABEL), `id` (CKA_ID, hex) or both"),
        ('id: "0a"', 'id: "0"', "keys.orders.versions.0.id: must be hex"),
        ("      sockets: [run/hsm-0.sock]\n", "      sockets: [run/hsm-0.sock]\n      deadline_ms: 1\n", "between 10 and 9000"),
        ("  grants: grants\n", "  grants: grants\n  max_clock_gap_s: 0\n", "authority.max_clock_gap_s: between 1 and 31622400"),
        ("frontend:", "frontent:", "the file: object contains unknown field `frontent`"),
        ("  grants: grants\n", "", "keybroker.yaml:6: authority.grants: give `grants` or `policy.bundle`, one of the two"),
        (
            "  grants: grants\n",
            "  grants: grants\n  policy: {bundle: {path: b, keys: [k]}}\n",
            "give `grants` or `policy.bundle`, one of the two",
        ),
        (
            "  grants: grants\n",
            "  policy: {bundle: {path: b, url: 'http://x', keys: [k]}}\n",
            "authority.policy.bundle: give `path` or `url`",
        ),
        ("  grants: grants\n", "  policy: {bundle: {keys: [k]}}\n", "authority.policy.bundle: give `path` or `url`, one of the two"),
        (
            "  grants: grants\n",
            "  policy: {bundle: {path: b, keys: []}}\n",
            "policy.bundle.keys: at least one; a bundle that nobody signed",
        ),
        ("  grants: grants\n", "  policy: {bundle: {path: b}}\n", "authority.policy.bundle: object missing required field `keys`"),
        ("  grants: grants\n", "  policy: {bundle: {url: 'http://x', keys: [k], poll_ms: 100}}\n", "poll_ms: between 200 and 3600000"),
        (
            "  grants: grants\n",
            "  policy: {module: m, bundle: {path: b, keys: [k]}}\n",
            "policy.module: a compiled policy comes in the bundle",
        ),
        ("  grants: grants\n", "  grants: grants\n  policy: {engine: opa, opa: {url: x}}\n", "policy.engine: `opa` needs signed bundles"),
        ("  grants: grants\n", "  policy: {engine: opa, bundle: {path: b, keys: [k]}}\n", "policy.opa: goes with `engine: opa`"),
        ("  grants: grants\n", "  grants: grants\n  policy: {opa: {url: x}}\n", "policy.opa: goes with `engine: opa`, which needs it"),
        (
            "  grants: grants\n",
            "  grants: grants\n  policy: my.wasm\n",
            "keybroker.yaml:12: authority.policy: is a section; a compiled policy",
        ),
        ("  grants: grants\n", "  grants: grants\n  policy: {engine: both}\n", "authority.policy.engine: invalid enum value"),
        (
            "  grants: grants\n",
            "  policy: {engine: opa, opa: {url: x, deadline_ms: 9}, bundle: {path: b, keys: [k]}}\n",
            "policy.opa.deadline_ms: between 10 and 5000",
        ),
    ],
)
def test_fault_is_refused_with_its_place_and_cure(tmp_path: Path, old: str, new: str, error: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, GOOD.replace(old, new))
    assert error in str(caught.value)


@pytest.mark.parametrize(("text", "pair"), [("127.0.0.1:80", ("127.0.0.1", 80)), ("[::1]:8443", ("::1", 8443))])
def test_host_and_port_are_split(text: str, pair: tuple[str, int]) -> None:
    assert configuration.host_and_port(text) == pair


@pytest.mark.parametrize("text", ["", "80", ":80", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x", "example.org:80", "127.0.0.1:0"])
def test_what_is_no_address_and_port_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        configuration.host_and_port(text)
