"""The text files of a development world: its grants and its configuration, written for people to read and edit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import yaml

from keybroker.hsm.softhsm import LOG_LABEL

_GRANTS = """\
# Who may use which key, for what. keybroker reads this directory again when a file in it (*.yaml) changes.
# Nothing said means no: identities that are not named here, such as ci-release, may do nothing.
grants:
  - id: payments
    workloads: ["spiffe://DOMAIN/payments/api"]
    keys: [orders, invoices, sessions]
    operations: [sign, read-key]
    algorithms: [ES256, PS256, Ed25519]

  - id: auditors
    workloads: ["spiffe://DOMAIN/human/auditor"]
    operations: [read-audit]
    trails: ["**"]
"""

_RELEASE = """\
# Two of three people must approve each use before ci-release may sign.
grants:
  - id: release
    workloads: ["spiffe://DOMAIN/ci/release"]
    keys: [release]
    operations: [sign, sign-digest]
    algorithms: [ES256]
    quorum: {approvals: 2, of: [release-managers], expires: 1h, cool_off: 0s}
people:
  alice: ["spiffe://DOMAIN/human/alice"]
  bob: ["spiffe://DOMAIN/human/bob"]
  carol: ["spiffe://DOMAIN/human/carol"]
groups:
  release-managers: [alice, bob, carol]
"""

_CONFIG = """\
# A development world, made by `keybroker dev init`. Paths are relative to this file. Never for production.
frontend:
  listen: 127.0.0.1:{service}
  operations: 127.0.0.1:{operations}
  svid: svids/broker.pem
  bundles: {{{domain}: bundle.pem}}
  authority: run/authority.sock

authority:
  socket: run/authority.sock
  state: state
  log: {origin}
  checkpoints: {{token: development, key: log.vkey, anchor: anchor/checkpoint}}
  bundles: {{{domain}: bundle.pem}}
  grants: grants
  deny_list: denied.yaml
  tokens:
    development: {{sockets: [{sockets}]}}
  keys:
{keys}
hsm:
  tokens:
    development:
      uri: {uri}
      sockets: [{sockets}]
      module_environment: {{SOFTHSM2_CONF: softhsm2.conf}}
      log: {{origin: {origin}, object: {log_label}}}
"""

_DENY_LIST = """\
# Who is refused whatever their SVID says; read again when it changes. An entry is an identity, or one certificate by its serial number:
#   - {spiffe_id: spiffe://DOMAIN/payments/api, reason: "laptop stolen, ticket 7"}
#   - {svid_serial: "5ef07b4e...", reason: "laptop stolen, ticket 7"}
denied: []
"""

_KEY = "    {name}: {{token: development, versions: [{{version: 1, object: {name}}}]{labels}}}\n"


def log_origin(domain: str) -> str:
    """The name of the broker's log."""
    return f"{domain}/broker-1"


def grants(domain: str) -> str:
    """The grants that are live."""
    return _GRANTS.replace("DOMAIN", domain)


def release_grant(domain: str) -> str:
    """The grant that demands a quorum."""
    return _RELEASE.replace("DOMAIN", domain)


def deny_list(domain: str) -> str:
    """The deny list, with nobody on it."""
    return _DENY_LIST.replace("DOMAIN", domain)


def configuration(domain: str, uri: str, ports: tuple[int, int], workers: int, owners: Mapping[str, str], names: Sequence[str]) -> str:
    """`keybroker.yaml`.

    Args:
        domain: the trust domain.
        uri: of the token.
        ports: of the service and of operations, on 127.0.0.1.
        workers: how many processes use the token.
        owners: the label `owner` of some keys.
        names: all keys.
    """
    return _CONFIG.format(
        domain=domain,
        origin=log_origin(domain),
        log_label=LOG_LABEL,
        uri=json.dumps(uri),
        service=ports[0],
        operations=ports[1],
        sockets=", ".join(f"run/hsm-{number}.sock" for number in range(1, workers + 1)),
        keys="".join(_KEY.format(name=_scalar(name), labels=_labels(owners.get(name, ""))) for name in names),
    )


def _scalar(name: str) -> str:
    """A name in YAML: bare where YAML takes it for text."""
    return name if isinstance(yaml.safe_load(name), str) else json.dumps(name)


def _labels(owner: str) -> str:
    return f", labels: {{owner: {owner}}}" if owner else ""
