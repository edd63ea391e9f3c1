"""A throw-away SoftHSM token for development and tests: `python -m keybroker.hsm.softhsm DIRECTORY --key NAME:ALGORITHM`.

python-pkcs11 cannot initialise a token, so `softhsm2-util` does it with a throw-away PIN, which is then changed through PKCS#11:
the real PIN is never in an argv. All calls into the module are made in a child process, so that the caller never loads it.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from keybroker.errors import ConfigError, KeyBrokerError
from keybroker.hsm.log_signer import log_verifier_key
from keybroker.model.key import Algorithm
from keybroker.model.pkcs11_uri import Pkcs11Uri
from keybroker.model.task import KeyRefused

TOKEN_LABEL = "keybroker-dev"  # noqa: S105  a label, not a secret
LOG_LABEL = "audit-log"
LOG_KEY_FILE = "log.vkey"
_MODULES = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
    "/usr/local/lib/softhsm/libsofthsm2.so",
)
_CURE = "install SoftHSM: apt-get install softhsm2"


@dataclass(frozen=True, slots=True)
class SoftHsmToken:
    """What `make_token` has made, all in one directory.

    Attributes:
        uri: the token's PKCS#11 URI; the PIN file in it is relative to the directory.
        configuration: SoftHSM's own configuration file, for the variable SOFTHSM2_CONF.
    """

    uri: str
    configuration: Path
    pin_file: Path


def make_token(directory: Path, keys: Mapping[str, Algorithm], label: str = TOKEN_LABEL, log: str = "") -> SoftHsmToken:
    """Make `directory/token`, `directory/softhsm2.conf` and `directory/pin`, and a key pair for each name.

    Args:
        directory: exists.
        keys: by name.
        label: of the token.
        log: the origin of a log; if given, the token gets a key that signs for it, and `directory/log.vkey` its public half.

    Raises:
        ConfigError: SoftHSM is not installed, or it failed.
    """
    module = module_path()
    tool = shutil.which("softhsm2-util")
    if tool is None:
        raise ConfigError(f"softhsm2-util is not on PATH; {_CURE}")
    tokens = directory / "token"
    tokens.mkdir(mode=0o700)
    configuration = directory / "softhsm2.conf"
    _write(configuration, f"directories.tokendir = {tokens.resolve()}\nobjectstore.backend = file\nlog.level = ERROR\n")
    pin_file = directory / "pin"
    _write(pin_file, secrets.token_hex(16) + "\n")
    first_pin = secrets.token_hex(8)
    environment = {**os.environ, "SOFTHSM2_CONF": str(configuration.resolve())}
    command = [tool, "--init-token", "--free", "--label", label, "--so-pin", secrets.token_hex(16), "--pin", first_pin]
    _run(command, environment, "")
    child = [sys.executable, "-m", "keybroker.hsm.softhsm", "--fill", str(directory.resolve()), "--label", label]
    child += [word for name, algorithm in keys.items() for word in ("--key", f"{name}:{algorithm.value}")]
    child += ["--log", log] if log else []
    _run(child, environment, first_pin)
    return SoftHsmToken(f"pkcs11:token={label}?module-path={module}&pin-source=file:pin", configuration, pin_file)


def module_path() -> Path:
    """Where SoftHSM's module is.

    Raises:
        ConfigError: nowhere.
    """
    for candidate in _MODULES:
        if Path(candidate).exists():
            return Path(candidate)
    raise ConfigError(f"libsofthsm2.so is in none of the usual places; {_CURE}")


def fill(directory: Path, label: str, keys: Mapping[str, Algorithm], first_pin: str, log: str = "") -> None:
    """In the child process: change the PIN, make the keys. Loads the module."""
    from keybroker.hsm.pkcs11_token import Pkcs11Token  # noqa: PLC0415  only the child loads it

    new_pin = (directory / "pin").read_text().strip()
    once = directory / "first-pin"
    _write(once, first_pin)
    try:
        token = Pkcs11Token.log_in(Pkcs11Uri(label, "", "", "", module_path(), once), can_write=True)
    finally:
        once.unlink()
    token.set_pin(first_pin, new_pin)
    for name, algorithm in keys.items():
        token.generate(algorithm, name, secrets.token_bytes(16))
    if log:
        object_id = secrets.token_bytes(16)
        token.generate(Algorithm.ED25519, LOG_LABEL, object_id)
        opened = token.open_log_key(LOG_LABEL, object_id)
        if isinstance(opened, KeyRefused):
            raise ConfigError(f"the key of the log: {opened.rule}: {opened.cure}")
        (directory / LOG_KEY_FILE).write_text(f"{log_verifier_key(log, opened)}\n")
    token.close()


def main() -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(prog="new-token", description="Make a throw-away SoftHSM token.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--label", default=TOKEN_LABEL)
    parser.add_argument("--key", action="append", default=[], metavar="NAME:ALGORITHM", help="for example orders:ES256; repeatable")
    parser.add_argument("--log", default="", metavar="ORIGIN", help="make a key that signs for this log as well")
    parser.add_argument("--fill", action="store_true", help=argparse.SUPPRESS)
    words = parser.parse_args()
    try:
        keys = {name: Algorithm(algorithm) for name, _, algorithm in (text.rpartition(":") for text in words.key)}
        if words.fill:
            fill(words.directory, words.label, keys, sys.stdin.read(), words.log)
        else:
            words.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            made = make_token(words.directory, keys, words.label, words.log)
            sys.stdout.write(f"export SOFTHSM2_CONF={made.configuration}\n{made.uri}\n")
    except (KeyBrokerError, ValueError, OSError) as err:
        sys.stderr.write(f"{err}\n")
        return 1
    return 0


def _write(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)


def _run(command: list[str], environment: Mapping[str, str], stdin: str) -> None:
    done = subprocess.run(command, env=environment, input=stdin, capture_output=True, text=True, check=False)  # noqa: S603  ours
    if done.returncode != 0:
        raise ConfigError(f"{Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()[-300:]}")


if __name__ == "__main__":
    sys.exit(main())
