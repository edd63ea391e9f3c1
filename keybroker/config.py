"""One YAML file, one frozen section per room. Unknown keys are refused; nothing that decides trust has a default.

A host that runs one room needs only that room's section. Paths are relative to the file. Secrets are paths, never values.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Any, Literal

import msgspec

from keybroker.errors import ConfigError
from keybroker.model.glass import MAX_SECONDS
from keybroker.model.key import KEY_NAME
from keybroker.model.message_signature import is_target
from keybroker.model.pkcs11_uri import Pkcs11Uri
from keybroker.yaml_document import YamlDocument

_TOKEN_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_HEX = re.compile(r"(?:[0-9a-fA-F]{2})*")
_HTTP_URL = re.compile(r"https?://[A-Za-z0-9.\[\]:-]+(/[\x21-\x7e]*)?")
_LOG_ORIGIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9./_-]{0,127}")

Place = tuple[str | int, ...]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Strict and frozen, like everything in this file."""


class FrontendConfig(Section, frozen=True, kw_only=True):
    """The room that faces the network.

    Attributes:
        listen: `ADDRESS:PORT` of the service, mTLS.
        operations: `ADDRESS:PORT` of /livez, /readyz and /metrics, plain HTTP; keep it on loopback.
        svid: PEM file with the broker's own chain and key; reloaded when it changes.
        bundles: trust domain name to its bundle file, PEM or SPIFFE bundle document; reloaded when they change.
        authority: the authority's socket.
        authority_user: the user that the authority runs as; the frontend's own if absent.
        max_connections: open client connections, all together.
        max_connections_per_address: the same, from one IP address.
        max_connections_per_svid: the same, of one SVID.
    """

    listen: str
    operations: str = "127.0.0.1:9443"
    svid: Path
    bundles: dict[str, Path]
    authority: Path
    authority_user: str = ""
    max_connections: int = 4096
    max_connections_per_address: int = 512
    max_connections_per_svid: int = 512


class KeyVersionConfig(Section, frozen=True, kw_only=True):
    """Where one version of a key lives: CKA_LABEL and CKA_ID (hex) of its private key. At least one is given."""

    version: int
    object: str = ""
    id: str = ""


class KeyConfig(Section, frozen=True, kw_only=True):
    """One key. The highest version signs.

    Attributes:
        token: the name of a token in `authority.tokens`.
        versions: at least one.
        labels: free text, part of the policy input.
    """

    token: str
    versions: tuple[KeyVersionConfig, ...]
    labels: dict[str, str] = {}


class TokenLink(Section, frozen=True, kw_only=True):
    """How the authority reaches the workers of one token.

    Attributes:
        sockets: one per worker, the same list as in the hsm section.
        hsm_user: the user that the workers run as; the authority's own if absent.
        deadline_ms: after this long a request gives up on an answer.
    """

    sockets: tuple[Path, ...]
    hsm_user: str = ""
    deadline_ms: int = 6_000


class CheckpointsConfig(Section, frozen=True, kw_only=True):
    """When the log is signed, and by which key.

    Attributes:
        token: the name of the token in `authority.tokens` that holds the log's key.
        key: file with the log's verifier key, one line. No other key's checkpoints are believed.
        records: after at most so many records.
        seconds: after at most so long, where there are new records.
        anchor: file that keeps the last checkpoint outside of the state directory, so that an older copy of the state is noticed.
    """

    token: str
    key: Path
    records: int = 10_000
    seconds: int = 5
    anchor: Path | None = None


class BundleConfig(Section, frozen=True, kw_only=True):
    """Where signed policy bundles come from, and whose signature counts. One of `path` and `url` is given.

    Attributes:
        path: a bundle file, replaced by renaming; or a directory with a `bundle.tar.gz`.
        url: http or https; asked every `poll_ms` milliseconds.
        ca: PEM file of the CAs that may vouch for an https server.
        token: file with a bearer token for that server.
        poll_ms: between two looks at the URL.
        keys: PEM files of public keys; one of them must have signed.
        scope: must stand in the signature; empty for none.
    """

    path: Path | None = None
    url: str = ""
    ca: Path | None = None
    token: Path | None = None
    poll_ms: int = 5_000
    keys: tuple[Path, ...]
    scope: str = ""


class OpaConfig(Section, frozen=True, kw_only=True):
    """The OPA server that decides.

    Attributes:
        url: `unix:/PATH`, `http://127.0.0.1:PORT` or `https://HOST:PORT`.
        ca: PEM file of the CAs that may vouch for an https server.
        token: file with a bearer token for that server.
        deadline_ms: after this long a decision has failed.
    """

    url: str
    ca: Path | None = None
    token: Path | None = None
    deadline_ms: int = 500


class PolicyConfig(Section, frozen=True, kw_only=True):
    """Which engine decides, and where its rules come from, if not from `authority.grants`.

    Attributes:
        engine: `embedded` (in this process) or `opa` (a server).
        module: another compiled policy than the one that is built in; embedded engine with `authority.grants` only.
        bundle: signed bundles instead of a directory of grant files; `opa` needs them.
        opa: the server; given with `engine: opa` only.
    """

    engine: Literal["embedded", "opa"] = "embedded"
    module: Path | None = None
    bundle: BundleConfig | None = None
    opa: OpaConfig | None = None


class ShadowConfig(Section, frozen=True, kw_only=True):
    """A candidate that decides beside the live policy, and affects nothing.

    Attributes:
        grants: directory of its grant files; read again when they change.
        module: another compiled policy than the live one.
    """

    grants: Path
    module: Path | None = None


class NoticesConfig(Section, frozen=True, kw_only=True):
    """How the authority lets approvers be told.

    Attributes:
        socket: where it listens for the courier.
        courier_user: the user that the courier runs as; the authority's own if absent.
        token: the name of the token in `authority.tokens` that holds the key of notices.
    """

    socket: Path
    courier_user: str = ""
    token: str


class AuthorityConfig(Section, frozen=True, kw_only=True):
    """The room that decides and records.

    Attributes:
        socket: where it listens for the frontend.
        frontend_user: the user that the frontend runs as; the authority's own if absent.
        state: directory of the database.
        log: the origin of the record, a schema-less URL such as `example.org/broker-1`. Never changes once there are records.
        bundles: trust domain name to its bundle file; the authority validates every chain itself.
        deny_list: file of SPIFFE IDs that are refused whatever their SVID says; reloaded when it changes.
        grants: directory of grant files; reloaded when they change. Not given where `policy.bundle` is.
        policy: which engine decides by which rules.
        policy_changes: `files` while whoever can write the grant files changes the rules; `operations` where the rules are in the store,
            and changes are proposed and approved.
        break_glass_max_s: how long broken glass may waive what a grant demands, at most.
        tokens: by name.
        keys: by name.
        checkpoints: how the log is signed; without it, it is not.
        shadow: a candidate that decides beside the live policy; none if absent.
        notices: how approvers are told; without it, they have to look.
        scrub_hours: in so many hours every record is read once and compared with its hash and the tree.
        allow_nonconforming_svids: rules of X.509-SVID sections 4.3 and 4.4 that issuers break and this broker lets pass.
        max_clock_gap_s: how long the broker may have been away over a boot of the host before its clock has to be acknowledged.
    """

    socket: Path
    frontend_user: str = ""
    state: Path
    log: str
    bundles: dict[str, Path]
    deny_list: Path | None = None
    grants: Path | None = None
    policy: PolicyConfig = PolicyConfig()
    policy_changes: Literal["files", "operations"] = "files"
    break_glass_max_s: int = 3600
    tokens: dict[str, TokenLink]
    keys: dict[str, KeyConfig]
    checkpoints: CheckpointsConfig | None = None
    notices: NoticesConfig | None = None
    scrub_hours: int = 24
    allow_nonconforming_svids: tuple[str, ...] = ()
    max_clock_gap_s: int = 86_400
    shadow: ShadowConfig | None = None


class LogKeyConfig(Section, frozen=True, kw_only=True):
    """The key that signs the checkpoints of one log and does nothing else: Ed25519, in the token.

    Attributes:
        origin: of the log, as in `authority.log`. The workers sign for no other.
        object: CKA_LABEL of the private key.
        id: CKA_ID of the private key, hex. At least one of the two is given.
    """

    origin: str
    object: str = ""
    id: str = ""


class NoticeKeyConfig(Section, frozen=True, kw_only=True):
    """The key that signs notices and does nothing else: P-256. CKA_LABEL and CKA_ID (hex) of its private key; at least one is given."""

    object: str = ""
    id: str = ""


class TokenConfig(Section, frozen=True, kw_only=True):
    """One PKCS#11 token.

    Attributes:
        uri: PKCS#11 URI (RFC 7512) with `module-path` and `pin-source=file:`; must name exactly one token.
        sockets: one worker process, with one session, per socket.
        deadline_ms: a worker whose call takes longer is killed.
        module_environment: variables that the module reads its own configuration from; values are paths.
        log: the key of the transparency log, if it is in this token.
        notices: the key that signs notices, if it is in this token.
    """

    uri: Pkcs11Uri
    sockets: tuple[Path, ...]
    deadline_ms: int = 5_000
    module_environment: dict[str, Path] = {}
    log: LogKeyConfig | None = None
    notices: NoticeKeyConfig | None = None


class HsmConfig(Section, frozen=True, kw_only=True):
    """The room that holds PINs and sessions. In production one file, one user and one process tree per token.

    Attributes:
        authority_user: the user that the authority runs as; the worker's own if absent.
        tokens: by name.
    """

    authority_user: str = ""
    tokens: dict[str, TokenConfig]


class HookConfig(Section, frozen=True, kw_only=True):
    """One receiver of notices.

    Attributes:
        url: `https://HOST[:PORT]/PATH`, lower-case host.
        ca: PEM file with the only authorities to believe about it; the system's if absent.
        deadline_ms: for one attempt.
    """

    url: str
    ca: Path | None = None
    deadline_ms: int = 10_000


class CourierConfig(Section, frozen=True, kw_only=True):
    """The room that tells approvers.

    Attributes:
        authority: the authority's socket for the courier.
        authority_user: the user that the authority runs as; the courier's own if absent.
        state: directory of what is still to be delivered.
        hooks: by name.
    """

    authority: Path
    authority_user: str = ""
    state: Path
    hooks: dict[str, HookConfig]


class TelemetryConfig(Section, frozen=True, kw_only=True):
    """Logs and traces of all rooms on this host.

    Attributes:
        log_level: debug, info, warning or error.
        log_format: json or console.
        traces: where spans are sent, OTLP over HTTP, such as `http://127.0.0.1:4318/v1/traces`; nowhere if absent.
        traces_share: of the requests that come without a trace, how many begin one, from 0 to 1.
    """

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "console"] = "json"
    traces: str = ""
    traces_share: float = 1.0


class Config(Section, frozen=True, kw_only=True):
    """The whole file."""

    frontend: FrontendConfig | None = None
    authority: AuthorityConfig | None = None
    hsm: HsmConfig | None = None
    courier: CourierConfig | None = None
    telemetry: TelemetryConfig = TelemetryConfig()


def load(path: Path) -> Config:
    """Read, type and check a configuration file; every path in it becomes absolute.

    Raises:
        ConfigError: names file, line, field and cure.
    """
    document = YamlDocument.load(path)
    _refuse_old_policy(document)
    base = path.resolve().parent

    def resolve(type_: type, value: Any) -> Any:
        if type_ is Path and isinstance(value, str):
            return base / Path(value).expanduser()
        if type_ is Pkcs11Uri and isinstance(value, str):
            return Pkcs11Uri.parse(value, base)
        msg = f"expected text, got {type(value).__name__}"
        raise ValueError(msg)

    config = document.convert(Config, dec_hook=resolve)
    _check(document, config)
    return config


def _refuse_old_policy(document: YamlDocument) -> None:
    """What was a file once is a section; say how to write it."""
    authority = document.value.get("authority") if isinstance(document.value, dict) else None
    if isinstance(authority, dict) and isinstance(authority.get("policy"), str):
        _require(document, ("authority", "policy"), "is a section; a compiled policy is written `policy: {module: FILE}`", holds=False)


def host_and_port(text: str) -> tuple[str, int]:
    """Split `127.0.0.1:8443` or `[::1]:8443`.

    Raises:
        ConfigError: not an IP address and a port.
    """
    host, _, port = text.rpartition(":")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        number = int(port)
    except ValueError as err:
        msg = f"{text!r} is not ADDRESS:PORT, for example 127.0.0.1:8443 or [::1]:8443"
        raise ConfigError(msg) from err
    if not 0 < number < 65_536:
        msg = f"{text!r}: a port is between 1 and 65535"
        raise ConfigError(msg)
    return str(address), number


def _check(document: YamlDocument, config: Config) -> None:
    _check_telemetry(document, config.telemetry)
    if config.frontend:
        _check_frontend(document, config.frontend)
    if config.authority:
        _check_authority(document, config.authority)
    for name, token in config.hsm.tokens.items() if config.hsm else ():
        place = ("hsm", "tokens", name)
        _check_token(document, place, token.sockets)
        _require(document, (*place, "deadline_ms"), "between 10 and 9000", holds=10 <= token.deadline_ms <= 9_000)
        if token.log:
            _check_log_key(document, (*place, "log"), token.log)
        if token.notices:
            _check_notice_key(document, (*place, "notices"), token.notices)
    if config.courier:
        _check_courier(document, config.courier)


def _check_telemetry(document: YamlDocument, telemetry: TelemetryConfig) -> None:
    is_url = not telemetry.traces or bool(_HTTP_URL.fullmatch(telemetry.traces))
    _require(document, ("telemetry", "traces"), "a URL such as http://127.0.0.1:4318/v1/traces", holds=is_url)
    _require(document, ("telemetry", "traces_share"), "between 0 and 1", holds=0 <= telemetry.traces_share <= 1)


def _check_frontend(document: YamlDocument, frontend: FrontendConfig) -> None:
    for name in ("listen", "operations"):
        try:
            host_and_port(getattr(frontend, name))
        except ConfigError as err:
            _require(document, ("frontend", name), str(err), holds=False)
    for name in ("max_connections", "max_connections_per_address", "max_connections_per_svid"):
        _require(document, ("frontend", name), "at least 1", holds=getattr(frontend, name) >= 1)
    _require(document, ("frontend", "bundles"), "name at least one trust domain", holds=bool(frontend.bundles))


def _check_authority(document: YamlDocument, authority: AuthorityConfig) -> None:
    top: Place = ("authority",)
    _require(document, (*top, "break_glass_max_s"), f"between 1 and {MAX_SECONDS}", holds=1 <= authority.break_glass_max_s <= MAX_SECONDS)
    _require(document, (*top, "bundles"), "name at least one trust domain", holds=bool(authority.bundles))
    _require(document, (*top, "log"), "a name such as example.org/broker-1", holds=bool(_LOG_ORIGIN.fullmatch(authority.log)))
    _require(document, (*top, "scrub_hours"), "between 1 and 8760", holds=1 <= authority.scrub_hours <= 8_760)
    if authority.checkpoints:
        _check_checkpoints(document, (*top, "checkpoints"), authority, authority.checkpoints)
    _require(document, (*top, "max_clock_gap_s"), "between 1 and 31622400", holds=1 <= authority.max_clock_gap_s <= 31_622_400)
    _check_policy(document, authority)
    if authority.notices:
        is_known = authority.notices.token in authority.tokens
        _require(document, (*top, "notices", "token"), "no such token under authority.tokens", holds=is_known)
    for name, link in authority.tokens.items():
        _check_token(document, (*top, "tokens", name), link.sockets)
        _require(document, (*top, "tokens", name, "deadline_ms"), "between 10 and 10000", holds=10 <= link.deadline_ms <= 10_000)
    for name, key in authority.keys.items():
        place = (*top, "keys", name)
        _require(document, place, "a key name is [a-z0-9][a-z0-9._-]{0,63}", holds=bool(KEY_NAME.fullmatch(name)))
        _require(document, (*place, "token"), "no such token under authority.tokens", holds=key.token in authority.tokens)
        numbers = [version.version for version in key.versions]
        is_rising = bool(numbers) and numbers[0] > 0 and numbers == sorted(set(numbers))
        _require(document, (*place, "versions"), "at least one, numbered from 1, rising", holds=is_rising)
        for index, version in enumerate(key.versions):
            spot = (*place, "versions", index)
            is_named = bool(version.object or version.id)
            _require(document, spot, "give `object` (CKA_LABEL), `id` (CKA_ID, hex) or both", holds=is_named)
            _require(document, (*spot, "id"), "must be hex", holds=bool(_HEX.fullmatch(version.id)))


def _check_checkpoints(document: YamlDocument, place: Place, authority: AuthorityConfig, checkpoints: CheckpointsConfig) -> None:
    _require(document, (*place, "token"), "no such token under authority.tokens", holds=checkpoints.token in authority.tokens)
    _require(document, (*place, "records"), "between 1 and 1000000", holds=1 <= checkpoints.records <= 1_000_000)
    _require(document, (*place, "seconds"), "between 1 and 3600", holds=1 <= checkpoints.seconds <= 3_600)
    is_outside = checkpoints.anchor is None or authority.state not in checkpoints.anchor.parents
    _require(document, (*place, "anchor"), "outside of authority.state, or it is restored together with it", holds=is_outside)


def _check_log_key(document: YamlDocument, place: Place, log: LogKeyConfig) -> None:
    _require(document, (*place, "origin"), "a name such as example.org/broker-1", holds=bool(_LOG_ORIGIN.fullmatch(log.origin)))
    _require(document, place, "give `object` (CKA_LABEL), `id` (CKA_ID, hex) or both", holds=bool(log.object or log.id))
    _require(document, (*place, "id"), "must be hex", holds=bool(_HEX.fullmatch(log.id)))


def _check_policy(document: YamlDocument, authority: AuthorityConfig) -> None:
    top: Place = ("authority", "policy")
    policy = authority.policy
    is_one = (authority.grants is None) != (policy.bundle is None)
    _require(document, ("authority", "grants"), "give `grants` or `policy.bundle`, one of the two", holds=is_one)
    are_rules_ours = authority.policy_changes == "files" or policy.bundle is None
    _require(document, ("authority", "policy_changes"), "rules that come in bundles are changed where those are made", holds=are_rules_ours)
    has_server = (policy.opa is not None) == (policy.engine == "opa")
    _require(document, (*top, "opa"), "goes with `engine: opa`, which needs it", holds=has_server)
    _require(document, (*top, "engine"), "`opa` needs signed bundles: give `bundle`", holds=policy.engine != "opa" or bool(policy.bundle))
    if policy.opa:
        _require(document, (*top, "opa", "deadline_ms"), "between 10 and 5000", holds=10 <= policy.opa.deadline_ms <= 5_000)
    if policy.bundle:
        place = (*top, "bundle")
        _require(document, (*top, "module"), "a compiled policy comes in the bundle, as policy.wasm", holds=policy.module is None)
        _require(document, place, "give `path` or `url`, one of the two", holds=(policy.bundle.path is None) == bool(policy.bundle.url))
        _require(document, (*place, "keys"), "at least one; a bundle that nobody signed is not taken", holds=bool(policy.bundle.keys))
        is_bounded = 200 <= policy.bundle.poll_ms <= 3_600_000
        _require(document, (*place, "poll_ms"), "between 200 and 3600000", holds=is_bounded)


def _check_notice_key(document: YamlDocument, place: Place, key: NoticeKeyConfig) -> None:
    _require(document, place, "give `object` (CKA_LABEL), `id` (CKA_ID, hex) or both", holds=bool(key.object or key.id))
    _require(document, (*place, "id"), "must be hex", holds=bool(_HEX.fullmatch(key.id)))


def _check_courier(document: YamlDocument, courier: CourierConfig) -> None:
    _require(document, ("courier", "hooks"), "name at least one", holds=bool(courier.hooks))
    for name, hook in courier.hooks.items():
        place = ("courier", "hooks", name)
        _require(document, place, "lower-case letters, digits and -, at most 32", holds=bool(_TOKEN_NAME.fullmatch(name)))
        _require(document, (*place, "url"), "https://HOST[:PORT]/PATH, in lower case, without :443", holds=is_target(hook.url))
        _require(document, (*place, "deadline_ms"), "between 100 and 60000", holds=100 <= hook.deadline_ms <= 60_000)


def _check_token(document: YamlDocument, place: Place, sockets: tuple[Path, ...]) -> None:
    name = str(place[-1])
    _require(document, place, "lower-case letters, digits and -, at most 32", holds=bool(_TOKEN_NAME.fullmatch(name)))
    _require(document, (*place, "sockets"), "at least one socket", holds=bool(sockets))


def _require(document: YamlDocument, place: Place, text: str, *, holds: bool) -> None:
    if not holds:
        msg = f"{document.where(place)}: {'.'.join(map(str, place))}: {text}"
        raise ConfigError(msg)
