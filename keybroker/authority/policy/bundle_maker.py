"""Makes a signed policy bundle of a directory of grant files: the same bytes for the same files, key and revision where the key is RSA."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from keybroker.audit.leaf import canonical
from keybroker.authority.policy import loader
from keybroker.authority.policy.bundle import DATA, GRANTS, MANIFEST, MAX_REVISION, MEMBER, MODULE, REGO, ROOTS, SIGNATURES
from keybroker.authority.policy.compiler import compile_rules
from keybroker.authority.policy.engine import OPA
from keybroker.authority.policy.grants import Rules
from keybroker.authority.policy.signatures import PrivateKey, sign
from keybroker.authority.policy.wasm import WasmModule
from keybroker.errors import ConfigError

POLICIES = Path(__file__).parents[2] / "policies"


@dataclass(frozen=True, slots=True)
class OwnPolicy:
    """Rego other than the built-in one, in both of its forms."""

    rego: Path
    module: Path


def make(
    directory: Path, revision: int, key: PrivateKey, scope: str, own: OwnPolicy | None, known_keys: frozenset[str]
) -> tuple[bytes, Rules]:
    """A bundle, and the rules in it.

    Args:
        directory: of grant files.
        revision: higher than that of the bundle before.
        scope: what the bundle is for; empty for nothing in particular.
        own: None for the built-in policy.
        known_keys: the configured keys, for warnings.

    Raises:
        ConfigError: something cannot be used.
    """
    if not 0 <= revision <= MAX_REVISION:
        raise ConfigError(f"a revision is a whole number between 0 and {MAX_REVISION}")
    texts = {path: _read(path) for path in _grant_files(directory)}
    rules = loader.load_texts(texts, known_keys)
    members = {f"{GRANTS}{path.name}": text for path, text in texts.items()}
    for name in members:
        if not MEMBER.fullmatch(name) or name.endswith("/data.yaml"):
            raise ConfigError(f"{directory}: {name.removeprefix(GRANTS)!r} cannot be the name of a grant file in a bundle; rename it")
    members[REGO] = _read(own.rego if own else POLICIES / "keybroker.rego")
    if own:
        members[MODULE] = _read(own.module)
        WasmModule(members[MODULE], str(own.module))  # refused where a broker would refuse it
    members[DATA], _ = compile_rules(rules, hashlib.sha256(members[REGO]).hexdigest(), OPA)
    members[MANIFEST] = canonical({"revision": str(revision), "rego_version": 1, "roots": ROOTS})
    return pack(members | {SIGNATURES: sign(members, key, scope)}), rules


def pack(members: Mapping[str, bytes]) -> bytes:
    """A gzipped tar of files, in order of their names, that says nothing of who made it or when."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in sorted(members.items()):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o644
            tar.addfile(member, io.BytesIO(data))
    return gzip.compress(archive.getvalue(), mtime=0)


def _grant_files(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if path.suffix == ".yaml" and not path.name.startswith("."))
    except OSError as err:
        raise ConfigError(f"{directory}: cannot be read: {err.strerror}") from err


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise ConfigError(f"{path}: cannot be read: {err.strerror}") from err
