"""`keybroker check`, the tokens' part: log in once to each token, look at each configured key, and say what would be refused.

Every token is looked at in a child process, as a worker would: the module is foreign code, and it is configured by its environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

from keybroker import config as configuration
from keybroker.config import Config, HsmConfig, KeyConfig, LogKeyConfig, NoticeKeyConfig, TokenConfig
from keybroker.errors import KeyBrokerError, TokenError
from keybroker.hsm.log_signer import log_verifier_key
from keybroker.hsm.pkcs11_token import CallError, Pkcs11Token, ckr_name
from keybroker.model.task import KeyRefused, OpenKey

_SECONDS = 60
_LOG_KEY = "--log-key"
_FAILED = 10


def problems(path: Path, config: Config) -> list[str]:
    """What is wrong with the tokens and keys of a configuration, each with its cure; empty if nothing is.

    Args:
        path: of the configuration file.
        config: the same file, loaded. A file without an authority section names no keys; then only logging in is tried.
    """
    if config.hsm is None:
        return []
    found: list[str] = []
    for name, token in config.hsm.tokens.items():
        try:
            found.extend(_in_child(path, name, token))
        except TokenError as err:
            found.append(f"token {name}: {err}")
    return found


def log_keys(path: Path, config: Config) -> list[str]:
    """The verifier keys of the logs whose keys are in the tokens of a configuration.

    Args:
        path: of the configuration file.
        config: the same file, loaded.

    Raises:
        TokenError: a token cannot be looked into, or its log's key must not be used.
    """
    found: list[str] = []
    for name, token in config.hsm.tokens.items() if config.hsm else ():
        if token.log:
            found += _in_child(path, name, token, _LOG_KEY)
    return found


def _in_child(path: Path, name: str, token: TokenConfig, *words: str) -> list[str]:
    """What the child process says of a token.

    Raises:
        TokenError: nothing, or that something is wrong.
    """
    environment = {**os.environ, **{variable: str(value) for variable, value in token.module_environment.items()}}
    command = [sys.executable, "-m", "keybroker.hsm.inspect", str(path), name, *words]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=_SECONDS, check=False)  # noqa: S603  ours
    except subprocess.TimeoutExpired as err:
        raise TokenError(f"the PKCS#11 module did not answer within {_SECONDS} s") from err
    if done.returncode == _FAILED:
        raise TokenError(done.stderr.decode(errors="replace").strip())
    if done.returncode != 0:
        raise TokenError(f"the PKCS#11 module brought its process down (status {done.returncode}); check `module-path`")
    said: list[str] = json.loads(done.stdout)
    return said


def _log_key_of(log: LogKeyConfig, token: TokenConfig) -> str:
    session = Pkcs11Token.log_in(token.uri)
    try:
        opened = session.open_log_key(log.object, bytes.fromhex(log.id))
    except CallError as err:
        raise TokenError(f"the token could not look for the log's key: {ckr_name(err)}") from err
    finally:
        with contextlib.suppress(CallError):
            session.close()
    if isinstance(opened, KeyRefused):
        raise TokenError(f"the log's key: {opened.rule}: {opened.cure}")
    return str(log_verifier_key(log.origin, opened))


def _of_token(name: str, token: TokenConfig, keys: dict[str, KeyConfig]) -> list[str]:
    try:
        session = Pkcs11Token.log_in(token.uri)
    except KeyBrokerError as err:
        return [f"token {name}: {err}"]
    found = []
    for key_name, key in keys.items():
        for version in key.versions if key.token == name else ():
            wanted = OpenKey(f"{key_name}/{version.version}", version.object, bytes.fromhex(version.id))
            try:
                product = session.open_key(wanted)
            except CallError as err:
                found.append(f"key {wanted.ref}: the token could not look for it: {ckr_name(err)}")
                continue
            if isinstance(product, KeyRefused):
                found.append(f"key {product.ref}: {product.rule}: {product.cure}")
    if token.log:
        try:
            log_key = session.open_log_key(token.log.object, bytes.fromhex(token.log.id))
        except CallError as err:
            found.append(f"the log's key: the token could not look for it: {ckr_name(err)}")
        else:
            found += [f"the log's key: {log_key.rule}: {log_key.cure}"] if isinstance(log_key, KeyRefused) else []
    if token.notices:
        found += _of_notices(session, token.notices)
    with contextlib.suppress(CallError):
        session.close()
    return found


def _of_notices(session: Pkcs11Token, notices: NoticeKeyConfig) -> list[str]:
    try:
        product = session.open_notice_key(notices.object, bytes.fromhex(notices.id))
    except CallError as err:
        return [f"the key of notices: the token could not look for it: {ckr_name(err)}"]
    return [f"the key of notices: {product.rule}: {product.cure}"] if isinstance(product, KeyRefused) else []


def _main() -> int:
    path, name, *words = Path(sys.argv[1]), *sys.argv[2:]
    config = configuration.load(path)
    section: HsmConfig | None = config.hsm
    if section is None:
        return 1
    token = section.tokens[name]
    if words == [_LOG_KEY] and token.log:
        try:
            sys.stdout.write(json.dumps([_log_key_of(token.log, token)]))
        except KeyBrokerError as err:
            sys.stderr.write(f"{err}\n")
            return _FAILED
        return 0
    keys = dict(config.authority.keys) if config.authority else {}
    sys.stdout.write(json.dumps(_of_token(name, token, keys)))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
