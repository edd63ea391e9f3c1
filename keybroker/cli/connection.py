"""The flags that every command that asks the broker has, and the client that they make."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from keybroker.errors import ConfigError

if TYPE_CHECKING:
    from keybroker.client import Client


class OwnFilesError(ConfigError):
    """Our SVID or our bundle cannot be used."""


_PANEL = "Connection"
Url = Annotated[
    str, typer.Option("--url", metavar="URL", help="The broker, https://HOST:PORT. Else KEYBROKER_URL.", rich_help_panel=_PANEL)
]
SvidFile = Annotated[
    str, typer.Option("--svid", metavar="FILE", help="Our chain and key, PEM in one file. Else KEYBROKER_SVID.", rich_help_panel=_PANEL)
]
BundleFile = Annotated[
    str,
    typer.Option(
        "--bundle", metavar="FILE", help="CA certificates of our trust domain, PEM. Else KEYBROKER_BUNDLE.", rich_help_panel=_PANEL
    ),
]
BrokerId = Annotated[
    str,
    typer.Option(
        "--broker-id",
        metavar="ID",
        help="SPIFFE ID that the broker must prove. Else KEYBROKER_ID, else spiffe://<our trust domain>/keybroker.",
        rich_help_panel=_PANEL,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def connect(url: str, svid: str, bundle: str, broker_id: str) -> Client:
    """A client with the settings from flags, environment and file.

    Raises:
        SettingsError: one is missing.
        ConfigError: `client.yaml` cannot be used.
        OwnFilesError: the SVID or the bundle cannot be used.
    """
    from keybroker.client import Client, settings

    chosen = settings.load({"url": url, "svid": svid, "bundle": bundle, "broker_id": broker_id}, os.environ)
    try:
        return Client(chosen.url, svid=chosen.svid, bundle=chosen.bundle, broker_id=chosen.broker_id)
    except ConfigError as err:
        raise OwnFilesError(str(err)) from err
