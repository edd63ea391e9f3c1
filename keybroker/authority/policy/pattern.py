"""Patterns of SPIFFE IDs in rules: `*` is one path segment, `**` (last only) is one or more, and `**` alone is anybody."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from keybroker.model.identity import MAX_SPIFFE_ID_BYTES, SpiffeIdError, parse_trust_domain

ANYBODY = "**"

_SCHEME = "spiffe://"
_SEGMENT = re.compile(r"[a-zA-Z0-9._-]+")
_FORM = "a pattern is spiffe://trust.domain/path with `*` for one segment and `**` at the end for one or more, or `**` alone"

Shelf = Literal["exact", "prefix", "domain", "anybody"]


class PatternError(ValueError):
    """The text is not a pattern; says what one looks like."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern taken apart.

    Attributes:
        text: as it was written.
        trust_domain: spelled out; empty for anybody.
        path: its segments, without the `**` at the end.
        is_open: ends with `**`, so that one or more segments follow.
    """

    text: str
    trust_domain: str
    path: tuple[str, ...]
    is_open: bool

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Parse strictly.

        Raises:
            PatternError: it is none.
        """
        if text == ANYBODY:
            return cls(text, "", (), is_open=True)
        if not text.startswith(_SCHEME) or len(text) > MAX_SPIFFE_ID_BYTES:
            raise PatternError(_FORM)
        trust_domain, _, rest = text.removeprefix(_SCHEME).partition("/")
        try:
            parse_trust_domain(trust_domain)
        except SpiffeIdError as err:
            msg = "the trust domain is written out, in lower case: a wildcard would trust domains that do not exist yet"
            raise PatternError(msg) from err
        path = tuple(rest.split("/"))
        is_open = path[-1] == "**"
        if is_open:
            path = path[:-1]
        if not all(segment == "*" or (_SEGMENT.fullmatch(segment) and segment not in {".", ".."}) for segment in path):
            raise PatternError(_FORM)
        return cls(text, trust_domain, path, is_open)

    def fits(self, spiffe_id: str) -> bool:
        """Whether the pattern fits a SPIFFE ID."""
        if self.is_anybody:
            return True
        trust_domain, _, rest = spiffe_id.removeprefix(_SCHEME).partition("/")
        segments = rest.split("/")
        is_long_enough = len(segments) > len(self.path) if self.is_open else len(segments) == len(self.path)
        alike = all(mine in {"*", other} for mine, other in zip(self.path, segments, strict=False))
        return trust_domain == self.trust_domain and is_long_enough and alike

    @property
    def is_anybody(self) -> bool:
        """True for `**` alone."""
        return not self.trust_domain

    @property
    def place(self) -> tuple[Shelf, str]:
        """Where the rules of this pattern are looked up: by identity, by first segment, by trust domain, or always."""
        if self.is_anybody:
            return "anybody", ""
        if not self.is_open and "*" not in self.path:
            return "exact", self.text
        if self.path and self.path[0] != "*":
            return "prefix", f"{self.trust_domain}/{self.path[0]}"
        return "domain", self.trust_domain
