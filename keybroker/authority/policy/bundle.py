"""A policy bundle: grants, Rego and the data that both engines walk, in one signed file that a broker and an OPA server both take.

The format is OPA's (https://www.openpolicyagent.org/docs/management-bundles): a gzipped tar with `.manifest` and `.signatures.json`.
OPA takes any file in it; here a bundle holds what `MEMBER` names and nothing else, so that no second rule hides in it. OPA reads the
`data.json`, a broker the grant files, and `data.json` must be what these compile to: so both walk the same rules.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import zlib
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec

from keybroker.authority.policy.signatures import BundleKeys, verify
from keybroker.errors import ConfigError

MANIFEST, SIGNATURES, DATA, REGO, MODULE = ".manifest", ".signatures.json", "data.json", "policy.rego", "policy.wasm"
GRANTS = "grants/"
MEMBER = re.compile(r"\.manifest|\.signatures\.json|data\.json|policy\.rego|policy\.wasm|grants/[A-Za-z0-9_][A-Za-z0-9._-]{0,199}\.yaml")
ROOTS = ("keybroker", "keybroker_rules")  # what of OPA's documents the bundle owns: nobody else can write there

MAX_BUNDLE_BYTES = 16 * 1024 * 1024
MAX_UNPACKED_BYTES = 128 * 1024 * 1024
MAX_FILES = 2_000
MAX_REVISION = 10**15 - 1

_REVISION = re.compile(r"0|[1-9][0-9]{0,14}")
_BLOCK = 512
_PIECE = 1024 * 1024


class _Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    revision: str
    roots: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    rego_version: int = 1
    metadata: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class PolicyBundle:
    """A bundle whose signature, hashes and members have been checked; whether its rules make sense has not.

    Attributes:
        revision: rises with every bundle of a policy.
        sha256: of the whole file, lower-case hex.
        grants: grant files by name.
        data: what OPA will take for its data, JSON.
        rego: the policy's source.
        module: the same, compiled to WebAssembly; None where the built-in one is meant.
        packed: the file itself.
    """

    revision: int
    sha256: str
    grants: dict[str, bytes] = field(repr=False)
    data: bytes = field(repr=False)
    rego: bytes = field(repr=False)
    module: bytes | None = field(repr=False)
    packed: bytes = field(repr=False)

    @classmethod
    def read(cls, packed: bytes, keys: BundleKeys, source: str) -> PolicyBundle:
        """Check a bundle as far as it can be checked without its rules.

        Args:
            packed: the whole file.
            keys: whose signature counts.
            source: where it came from, for errors.

        Raises:
            ConfigError: it is not signed by one of the keys for this scope, or not a bundle of ours.
        """
        members = _unpack(packed, source)
        signatures = members.pop(SIGNATURES, None)
        if signatures is None:
            raise ConfigError(f"{source}: is not signed; sign it, for example with `keybroker policy bundle`")
        verify(members, signatures, keys, source)
        for name in (MANIFEST, DATA, REGO):
            if name not in members:
                raise ConfigError(f"{source}: holds no {name}; make it with `keybroker policy bundle`")
        grants = {name.removeprefix(GRANTS): data for name, data in members.items() if name.startswith(GRANTS)}
        return cls(
            _revision(members[MANIFEST], source),
            hashlib.sha256(packed).hexdigest(),
            grants,
            members[DATA],
            members[REGO],
            members.get(MODULE),
            packed,
        )


def _revision(manifest: bytes, source: str) -> int:
    try:
        found = msgspec.json.decode(manifest, type=_Manifest)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as err:
        raise ConfigError(f"{source}: its .manifest is not one of ours: {err}") from err
    if sorted(found.roots) != sorted(ROOTS) or found.rego_version != 1:
        raise ConfigError(f"{source}: its .manifest must have the roots {', '.join(ROOTS)} and rego_version 1, and no others")
    if not _REVISION.fullmatch(found.revision):
        raise ConfigError(f"{source}: its revision is not a whole number of at most 15 digits, so that nobody can tell which is newer")
    return int(found.revision)


def _unpack(packed: bytes, source: str) -> dict[str, bytes]:
    """The members by name. A file that two programs could read in two ways is refused.

    Raises:
        ConfigError: not a tar of plain files with names of ours, each once; or too large.
    """
    raw = _inflate(packed, source)
    members: dict[str, bytes] = {}
    end = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as archive:
            for member in archive:
                name = member.name.removeprefix("./").removeprefix("/")  # `opa build` puts a / in front
                if not member.isreg() or member.issparse() or member.pax_headers or archive.pax_headers:
                    raise ConfigError(f"{source}: holds something that is not a plain file")
                if not MEMBER.fullmatch(name):
                    raise ConfigError(f"{source}: holds a file that does not belong into a bundle: {name[:200]!a}")
                if name in members:
                    raise ConfigError(f"{source}: holds {name} twice")
                if len(members) >= MAX_FILES:
                    raise ConfigError(f"{source}: holds more than {MAX_FILES} files")
                members[name] = raw[member.offset_data : member.offset_data + member.size]
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                if member.size < 0 or end > len(raw):
                    raise ConfigError(f"{source}: is cut off")
    except (tarfile.TarError, ValueError, OverflowError, OSError, EOFError, IndexError) as err:
        raise ConfigError(f"{source}: is not a tar archive") from err
    if len(raw) - end < 2 * _BLOCK or raw.count(0, end) != len(raw) - end:
        raise ConfigError(f"{source}: has something behind its last file, or is cut off there")
    return members


def _inflate(packed: bytes, source: str) -> bytes:
    if len(packed) > MAX_BUNDLE_BYTES:
        raise ConfigError(f"{source}: larger than {MAX_BUNDLE_BYTES} bytes")
    stream = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    pieces: list[bytes] = []
    size, rest = 0, packed
    try:
        while not stream.eof:
            piece = stream.decompress(rest, _PIECE)
            rest = stream.unconsumed_tail
            size += len(piece)
            if size > MAX_UNPACKED_BYTES:
                raise ConfigError(f"{source}: unpacks to more than {MAX_UNPACKED_BYTES} bytes")
            pieces.append(piece)
            if not piece and not rest and not stream.eof:
                raise ConfigError(f"{source}: is cut off")
    except zlib.error as err:
        raise ConfigError(f"{source}: is not a gzip file") from err
    if stream.unused_data:
        raise ConfigError(f"{source}: has something behind its end")
    return b"".join(pieces)
