"""Where the broker is and who we are: from flags, then the environment, then `~/.config/keybroker/client.yaml`.

The environment is passed in, so that there is one place where it is read (the command line).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from keybroker.client.errors import SettingsError
from keybroker.model.identity import SpiffeId, SpiffeIdError
from keybroker.yaml_document import YamlDocument

_VARIABLES = {"url": "KEYBROKER_URL", "svid": "KEYBROKER_SVID", "bundle": "KEYBROKER_BUNDLE", "broker_id": "KEYBROKER_ID"}
_EXAMPLES = {"url": "https://127.0.0.1:8443", "svid": "my-svid.pem", "bundle": "bundle.pem"}


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """Everything that a client needs to know.

    Attributes:
        url: `https://HOST:PORT` of the broker.
        svid: PEM file with our own chain and key.
        bundle: file with the CA certificates of our trust domain.
        broker_id: the SPIFFE ID that the broker must prove; None for `spiffe://<our trust domain>/keybroker`.
    """

    url: str
    svid: Path
    bundle: Path
    broker_id: SpiffeId | None


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`client.yaml`. Relative paths are relative to the file."""

    url: str = ""
    svid: Path | None = None
    bundle: Path | None = None
    broker_id: str = ""


def load(flags: Mapping[str, str], environment: Mapping[str, str]) -> ClientSettings:
    """Put the settings together; for each, the first place that has it wins.

    Args:
        flags: `url`, `svid`, `bundle` and `broker_id`, as given on the command line; empty where they were not.
        environment: of the process.

    Raises:
        SettingsError: one is missing or malformed; says where it can be given.
        ConfigError: `client.yaml` cannot be used; names file and line.
    """
    chosen = {name: flags.get(name) or environment.get(variable, "") for name, variable in _VARIABLES.items()}
    if not all(chosen.values()):
        stored = _from_file(_path(environment))
        chosen = {name: value or stored[name] for name, value in chosen.items()}
    for name, example in _EXAMPLES.items():
        if not chosen[name]:
            raise SettingsError(f"no {name}: give --{name} or set {_VARIABLES[name]}, for example to {example}")
    return ClientSettings(
        chosen["url"], Path(chosen["svid"]).expanduser(), Path(chosen["bundle"]).expanduser(), _broker_id(chosen["broker_id"])
    )


def _path(environment: Mapping[str, str]) -> Path | None:
    """Where `client.yaml` is; nowhere for a user without a home."""
    home = environment.get("HOME", "")
    return Path(home) / ".config" / "keybroker" / "client.yaml" if home else None


def _from_file(path: Path | None) -> dict[str, str]:
    if path is None or not path.exists():
        return dict.fromkeys(_VARIABLES, "")

    def resolve(type_: type, value: Any) -> Any:
        if type_ is Path and isinstance(value, str):
            return path.parent / Path(value).expanduser()
        raise ValueError(f"expected a path, got {type(value).__name__}")

    document = YamlDocument.load(path)
    file = document.convert(_File, dec_hook=resolve) if document.value is not None else _File()
    return {"url": file.url, "svid": str(file.svid or ""), "bundle": str(file.bundle or ""), "broker_id": file.broker_id}


def _broker_id(text: str) -> SpiffeId | None:
    if not text:
        return None
    try:
        return SpiffeId.parse(text)
    except SpiffeIdError as err:
        raise SettingsError(f"the broker ID in --broker-id or KEYBROKER_ID is not a SPIFFE ID ({err.rule})") from err
