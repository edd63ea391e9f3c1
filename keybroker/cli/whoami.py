"""`keybroker whoami`: what the broker sees of us."""

from __future__ import annotations

from keybroker.cli import output
from keybroker.cli.connection import BrokerId, BundleFile, Json, SvidFile, Url, connect


def whoami(as_json: Json = False, url: Url = "", svid: SvidFile = "", bundle: BundleFile = "", broker_id: BrokerId = "") -> None:
    """Show what the broker sees of us.

    Examples:

        keybroker whoami --url https://127.0.0.1:8443 --svid svids/payments-api.pem --bundle bundle.pem
    """
    with connect(url, svid, bundle, broker_id) as broker:
        seen = broker.whoami()
    if as_json:
        output.json_object(seen)
        return
    output.facts(
        [
            ("SPIFFE ID", seen.spiffe_id),
            ("trust domain", seen.trust_domain),
            ("SVID valid until", seen.not_after),
            ("SVID SHA-256", seen.svid_sha256),
            ("address", seen.address),
            ("networks", ", ".join(seen.networks)),
            ("roles", ", ".join(seen.roles)),
        ]
    )
