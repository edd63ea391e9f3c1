"""What `keybroker dev init` makes: one throw-away world with a token, a CA, identities, keys, grants and a configuration.

Everything is checked before the first byte is written, and a world that cannot be finished is removed again.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from keybroker.cli import world_text
from keybroker.cli.arguments import UsageError
from keybroker.cli.development_ca import DevelopmentCa
from keybroker.errors import KeyBrokerError
from keybroker.hsm.softhsm import LOG_LABEL, make_token
from keybroker.model.identity import SpiffeId, SpiffeIdError
from keybroker.model.key import KEY_NAME, Algorithm

TRUST_DOMAIN = "example.org"
_BROKER = "broker"
_IDENTITIES = {
    "payments-api": "payments/api",
    "ci-release": "ci/release",
    "alice": "human/alice",
    "bob": "human/bob",
    "carol": "human/carol",
    "auditor": "human/auditor",
    "admin": "human/admin",
    _BROKER: "keybroker",
}
_KEYS = {"orders": Algorithm.ES256, "release": Algorithm.ES256, "invoices": Algorithm.PS256, "sessions": Algorithm.ED25519}
_OWNERS = {"orders": "payments", "release": "releases", "invoices": "payments", "sessions": "payments"}
_WORKERS = 2
_UNREADABLE = frozenset("#=")
_NAME_CHARACTERS = 64  # RFC 5280 appendix A.1: ub-common-name
_FIRST_PORT, _PORTS = 20_000, 10_000  # below the range from which Linux takes the ports of outgoing connections


class WorldError(KeyBrokerError):
    """This world cannot be made. The text says what to change."""


class PlanError(UsageError):
    """This identity or this key cannot be in it. The text says what to write instead."""


@dataclass(frozen=True, slots=True)
class WorldPlan:
    """Who and what will be in it, checked.

    Attributes:
        identities: file name (without `.pem`) to SPIFFE ID.
        keys: key name to the algorithm that it is for.
    """

    identities: dict[str, SpiffeId]
    keys: dict[str, Algorithm]

    @classmethod
    def make(cls, workloads: Sequence[str], keys: Sequence[str]) -> WorldPlan:
        """The standard world, and more.

        Args:
            workloads: SPIFFE IDs of the trust domain.
            keys: `NAME:ALG`.

        Raises:
            PlanError: one of them cannot be used, or its name is taken.
        """
        identities = {name: SpiffeId.parse(f"spiffe://{TRUST_DOMAIN}/{path}") for name, path in _IDENTITIES.items()}
        for text in workloads:
            name, identity = _workload(text)
            if name in identities:
                raise PlanError(f"--workload {text}: svids/{name}.pem is taken by {identities[name]}; give it another last segment")
            identities[name] = identity
        chosen = dict(_KEYS)
        for text in keys:
            name, algorithm = _key(text)
            if name in chosen or name == LOG_LABEL:
                raise PlanError(f"--key {text}: there is a key {name} already; give it another name")
            chosen[name] = algorithm
        return cls(identities, chosen)


@dataclass(frozen=True, slots=True)
class World:
    """Where the finished world is.

    Attributes:
        directory: absolute.
        url: of the service.
    """

    directory: Path
    url: str


def make(directory: Path, plan: WorldPlan) -> World:
    """Make a world in a directory that is empty or does not exist.

    Raises:
        WorldError: the directory has something in it.
        TokenError: the token could not be made; nothing is left behind.
    """
    directory = directory.absolute()
    if not _UNREADABLE.isdisjoint(real := str(directory.resolve())) or not real.isprintable():
        raise WorldError(
            f"{directory}: SoftHSM's configuration cannot hold a path with `#`, `=` or characters that do not show; choose another"
        )
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise WorldError(f"{directory} is not an empty directory; name a new one, or remove it first")
    missing = [each for each in (directory, *directory.parents) if not each.exists()]
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _fill(directory, plan)
    except BaseException:
        for child in directory.iterdir() if directory.is_dir() else ():
            shutil.rmtree(child) if child.is_dir() else child.unlink()
        for made in missing:
            with contextlib.suppress(OSError):  # it was not made, or somebody else uses it by now
                made.rmdir()
        raise


def _fill(directory: Path, plan: WorldPlan) -> World:
    for name in ("svids", "grants", "state", "run", "anchor"):
        (directory / name).mkdir(mode=0o700)
    now = datetime.datetime.now(datetime.UTC)
    ca = DevelopmentCa.make(TRUST_DOMAIN, now)
    _write(directory / "ca-key.pem", ca.key_pem, is_private=True)
    _write(directory / "ca.pem", ca.certificate_pem)
    _write(directory / "bundle.pem", ca.certificate_pem)
    for name, identity in plan.identities.items():
        _write(directory / "svids" / f"{name}.pem", ca.svid(identity, name, now, is_on_loopback=name == _BROKER), is_private=True)
    _write(directory / "grants" / "development.yaml", world_text.grants(TRUST_DOMAIN))
    _write(directory / "grants" / "release.yaml", world_text.release_grant(TRUST_DOMAIN))
    _write(directory / "denied.yaml", world_text.deny_list(TRUST_DOMAIN))
    token = make_token(directory, plan.keys, log=world_text.log_origin(TRUST_DOMAIN))
    service, operations = _free_ports(2)
    text = world_text.configuration(TRUST_DOMAIN, token.uri, (service, operations), _WORKERS, _OWNERS, list(plan.keys))
    _write(directory / "keybroker.yaml", text)
    return World(directory, f"https://127.0.0.1:{service}")


def _workload(text: str) -> tuple[str, SpiffeId]:
    try:
        identity = SpiffeId.parse(text)
    except SpiffeIdError as err:
        raise PlanError(f"--workload: not a SPIFFE ID ({err.rule}); for example spiffe://{TRUST_DOMAIN}/my/service") from err
    if identity.trust_domain != TRUST_DOMAIN or not identity.path:
        raise PlanError(f"--workload {text}: must be spiffe://{TRUST_DOMAIN}/ and a path")
    if len(identity.path[-1]) > _NAME_CHARACTERS:
        raise PlanError(f"--workload {text}: names a file by its last segment, which is to have {_NAME_CHARACTERS} characters at most")
    return identity.path[-1], identity


def _key(text: str) -> tuple[str, Algorithm]:
    name, _, algorithm = text.rpartition(":")
    if not KEY_NAME.fullmatch(name):
        raise PlanError(f"--key {text}: must be NAME:ALGORITHM, and a name is lower-case letters, digits, `.`, `_` and `-`")
    try:
        return name, Algorithm(algorithm)
    except ValueError as err:
        raise PlanError(f"--key {text}: the algorithm must be one of {', '.join(each.value for each in Algorithm)}") from err


def _free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 on which nobody listens now."""
    ports: list[int] = []
    while len(ports) < count:
        port = _FIRST_PORT + secrets.randbelow(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return ports


def _write(path: Path, data: bytes | str, *, is_private: bool = False) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if is_private else 0o644)
    with open(descriptor, "wb") as file:  # noqa: PTH123  a descriptor, so that the mode is right from the first moment
        file.write(data.encode() if isinstance(data, str) else data)
