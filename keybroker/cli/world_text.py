"""The text files of a development world: its configuration and its grants, written for people to read and edit."""

from __future__ import annotations

from collections.abc import Iterable

GRANTS = """\
# Who may use which key, for what. keybroker reloads this directory when a file in it changes (*.yaml only).
# Nothing said means no: identities that are not named here, such as ci-release, may do nothing.
grants:
  - id: payments
    workloads: ["spiffe://{domain}/payments/api"]
    keys: [orders, invoices, sessions]
    operations: [sign, read-key]
    algorithms: [ES256, PS256, Ed25519]

  - id: auditors
    workloads: ["spiffe://{domain}/human/auditor"]
    operations: [read-audit]
    trails: ["**"]
"""

RELEASE = """\
# Off, because quorums are not part of this version yet: a grant file that asks for one is refused, never half obeyed.
# Two of three people must approve before ci-release may sign.
grants:
  - id: release
    workloads: ["spiffe://{domain}/ci/release"]
    keys: [release]
    operations: [sign, sign-digest]
    algorithms: [ES256]
    quorum: {{approvals: 2, of: [release-managers], expires: 1h, cool_off: 0s}}
people:
  alice: ["spiffe://{domain}/human/alice"]
  bob: ["spiffe://{domain}/human/bob"]
  carol: ["spiffe://{domain}/human/carol"]
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
  log: {domain}/broker-1
  bundles: {{{domain}: bundle.pem}}
  grants: grants
  tokens:
    development:
      sockets: [{sockets}]
  keys:
{keys}
hsm:
  tokens:
    development:
      uri: "{uri}"
      sockets: [{sockets}]
      module_environment: {{SOFTHSM2_CONF: token/softhsm2.conf}}
"""

_KEY = """\
    {name}:  # for {algorithm}
      token: development
      versions: [{{version: 1, object: {name}}}]
      labels: {{{labels}}}
"""
