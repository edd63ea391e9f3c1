"""Which token, through which module, with which PIN file: a PKCS#11 URI (RFC 7512), as far as a broker needs it.

`pkcs11:token=orders;serial=0a1b?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/run/pins/orders`
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote

MAX_URI_CHARACTERS = 4096

_TOKEN_ATTRIBUTES = ("token", "serial", "manufacturer", "model")
_PATH_CHARACTERS = re.compile(r"(?:[A-Za-z0-9\-._~:\[\]@!$'()*+,=&]|%[0-9A-Fa-f]{2})*")  # RFC 7512 section 2.3, pk11-pchar
_QUERY_CHARACTERS = re.compile(r"(?:[A-Za-z0-9\-._~:\[\]@!$'()*+,=/?|]|%[0-9A-Fa-f]{2})*")  # pk11-qchar
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")


class Pkcs11UriError(ValueError):
    """Not a PKCS#11 URI that a broker can use. The text names the attribute and the cure, never a PIN."""


class Pkcs11Uri:
    """A parsed URI; `str` gives it back, with absolute paths.

    Attributes:
        token, serial, manufacturer, model: what the token must say of itself; empty to ignore.
        module_path: the PKCS#11 module, absolute.
        pin_file: the file that holds the PIN, absolute. A secret is a path, never a value.
    """

    __slots__ = ("manufacturer", "model", "module_path", "pin_file", "serial", "token")

    def __init__(self, token: str, serial: str, manufacturer: str, model: str, module_path: Path, pin_file: Path) -> None:
        self.token = token
        self.serial = serial
        self.manufacturer = manufacturer
        self.model = model
        self.module_path = module_path
        self.pin_file = pin_file

    def __str__(self) -> str:
        wanted = ((name, getattr(self, name)) for name in _TOKEN_ATTRIBUTES)
        path = ";".join(f"{name}={quote(value, safe='')}" for name, value in wanted if value)
        return f"pkcs11:{path}?module-path={quote(str(self.module_path))}&pin-source=file:{quote(str(self.pin_file))}"

    @classmethod
    def parse(cls, text: str, base: Path) -> Pkcs11Uri:
        """Parse strictly.

        Args:
            base: the directory that relative paths start from.

        Raises:
            Pkcs11UriError: names the attribute and the cure.
        """
        if len(text) > MAX_URI_CHARACTERS or not text.startswith("pkcs11:"):
            raise Pkcs11UriError("a PKCS#11 URI starts with `pkcs11:` (RFC 7512)")
        path, _, query = text.removeprefix("pkcs11:").partition("?")
        wanted = _attributes(path, ";", _PATH_CHARACTERS)
        options = _attributes(query, "&", _QUERY_CHARACTERS)
        _require_known(wanted, _TOKEN_ATTRIBUTES)
        if "pin-value" in options:
            raise Pkcs11UriError("`pin-value` puts the PIN into the configuration; write it to a file and give `pin-source=file:PATH`")
        _require_known(options, ("module-path", "pin-source"))
        if not any(wanted.values()):
            raise Pkcs11UriError("name the token, for example `token=LABEL` or `serial=NUMBER`")
        module = options.get("module-path", "")
        if not module:
            raise Pkcs11UriError("`module-path` is missing: the PKCS#11 module, a shared library")
        source = options.get("pin-source", "")
        if not source.startswith("file:") or not source.removeprefix("file:"):
            raise Pkcs11UriError("`pin-source=file:PATH` is missing: the file that holds the PIN")
        pin = source.removeprefix("file:")
        token, serial, manufacturer, model = (wanted.get(name, "") for name in _TOKEN_ATTRIBUTES)
        return cls(token, serial, manufacturer, model, base / module, base / _local(pin))


def _local(path: str) -> str:
    """`file:///run/pin` and `file:/run/pin` are the same file (RFC 8089)."""
    if path.startswith("//"):
        host, slash, rest = path.removeprefix("//").partition("/")
        if host not in {"", "localhost"} or not slash:
            raise Pkcs11UriError("`pin-source` must be a file of this host")
        return f"/{rest.lstrip('/')}"
    return path


def _attributes(text: str, separator: str, characters: re.Pattern[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in text.split(separator) if text else ():
        name, equals, value = part.partition("=")
        if not equals or not characters.fullmatch(value):
            raise Pkcs11UriError(f"`{name[:32] if name.isprintable() else '?'}` must be NAME=VALUE, other characters percent-encoded")
        if name in found:
            raise Pkcs11UriError(f"`{name[:32]}` is given twice")
        found[name] = _decoded(name, value)
    return found


def _decoded(name: str, value: str) -> str:
    raw = _ESCAPE.sub(lambda match: bytes([int(match[1], 16)]), value.encode())
    try:
        text = raw.decode()
    except UnicodeDecodeError as err:
        raise Pkcs11UriError(f"`{name[:32]}` is not UTF-8") from err
    if "\0" in text:
        raise Pkcs11UriError(f"`{name[:32]}` holds a NUL")
    return text


def _require_known(found: dict[str, str], known: tuple[str, ...]) -> None:
    for name in found:
        if name not in known:
            shown = name[:32] if name.isprintable() else "?"
            raise Pkcs11UriError(f"`{shown}` is not an attribute that this broker knows; there are: {', '.join(known)}")
