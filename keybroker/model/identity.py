"""Who is asking: SPIFFE IDs and what an accepted X.509-SVID says. SPIFFE-ID sections 2.1 to 2.4."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_SPIFFE_ID_BYTES = 2048  # SPIFFE-ID section 2.3
MAX_TRUST_DOMAIN_BYTES = 255  # SPIFFE-ID section 2.3, from RFC 3986 host

_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]{1,255}")
_SEGMENT = re.compile(r"[a-zA-Z0-9._-]+")
_SCHEME = "spiffe://"


class SpiffeIdError(ValueError):
    """The text is not a SPIFFE ID. `rule` is a stable name for what it broke; the text itself is not repeated."""

    def __init__(self, rule: str) -> None:
        super().__init__(rule)
        self.rule = rule


@dataclass(frozen=True, slots=True)
class SpiffeId:
    """A SPIFFE ID that has been parsed: `spiffe://trust-domain/path`. Its text is canonical, so equal text is equal identity.

    Attributes:
        text: the whole URI.
        trust_domain: its authority part.
        path: its segments; empty for the ID of a trust domain itself.
    """

    text: str
    trust_domain: str
    path: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> SpiffeId:
        """Parse strictly: no normalisation, because two spellings of one identity are two ways past a rule.

        Raises:
            SpiffeIdError: names the rule that the text breaks.
        """
        if len(text) > MAX_SPIFFE_ID_BYTES:
            raise SpiffeIdError("id-too-long")
        if not text.isascii():
            raise SpiffeIdError("id-not-ascii")
        if not text.startswith(_SCHEME):
            raise SpiffeIdError("id-scheme")
        trust_domain, slash, rest = text[len(_SCHEME) :].partition("/")
        parse_trust_domain(trust_domain)
        if not slash:
            return cls(text, trust_domain, ())
        path = tuple(rest.split("/"))
        for segment in path:
            if not segment:
                raise SpiffeIdError("id-empty-segment")
            if segment in {".", ".."}:
                raise SpiffeIdError("id-relative-segment")
            if not _SEGMENT.fullmatch(segment):
                raise SpiffeIdError("id-path-characters")
        return cls(text, trust_domain, path)

    def __str__(self) -> str:
        return self.text


def parse_trust_domain(text: str) -> str:
    """The text itself, if it is a trust domain name (SPIFFE-ID section 2.1).

    Raises:
        SpiffeIdError: it is not.
    """
    if not text:
        raise SpiffeIdError("trust-domain-empty")
    if not _TRUST_DOMAIN.fullmatch(text):
        raise SpiffeIdError("trust-domain-characters")
    return text


@dataclass(frozen=True, slots=True)
class Svid:
    """What the authority keeps of an X.509-SVID that it has validated.

    Attributes:
        id: the one SPIFFE ID.
        sha256: of the DER leaf, lower-case hex.
        serial: of the leaf, lower-case hex.
        not_before: seconds since the epoch; the latest of the chain.
        not_after: seconds since the epoch; the earliest of the chain.
    """

    id: SpiffeId
    sha256: str
    serial: str
    not_before: int
    not_after: int


@dataclass(frozen=True, slots=True)
class Caller:
    """A validated SVID, and where the connection came from."""

    svid: Svid
    address: str

    @property
    def id(self) -> SpiffeId:
        """The caller's SPIFFE ID."""
        return self.svid.id
