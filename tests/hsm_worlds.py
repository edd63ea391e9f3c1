"""A served world with more tokens, each behind a PKCS#11 module that fails on demand, and a client that shows each answer as it came."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import socket
import ssl
import struct
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml

from keybroker.client.verify import is_good
from keybroker.hsm.softhsm import make_token
from keybroker.model.key import Algorithm
from tests.tokens import Shim, build_shim
from tests.worlds import PROGRAM, World, clean_environment, make_world, until

_PEERCRED = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a sign request got.

    Attributes:
        status: HTTP's.
        code: of the problem document; empty for a signature.
    """

    status: int
    code: str
    retry_after: int
    signature: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class TokenPlan:
    """One token behind a shim.

    Attributes:
        keys: to be made in it.
        workers: its sessions.
        deadline_ms: of a call into the module; then the worker is killed.
        authority_deadline_ms: of a request to a worker.
    """

    keys: Mapping[str, Algorithm]
    workers: int = 1
    deadline_ms: int = 5_000
    authority_deadline_ms: int = 6_000


@dataclass(slots=True)
class ShimmedWorld:
    """The world, its shims by token, and its keys' tokens."""

    world: World
    shims: dict[str, Shim]
    keys: dict[str, tuple[str, Algorithm]]
    _public: dict[str, bytes] = field(default_factory=dict)

    @property
    def room(self) -> int:
        """The hsm room's process id."""
        return self.world.rooms()["hsm"]

    def sockets(self, token: str) -> list[Path]:
        """Where the workers of a token listen."""
        return [self.world.directory / path for path in self.world.config["hsm"]["tokens"][token]["sockets"]]

    def worker(self, token: str, index: int = 0) -> int:
        """The process id of a worker that listens."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.sockets(token)[index]))
            pid, _, _ = _PEERCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
        return int(pid)

    def is_served(self, token: str, sessions: int | None = None) -> bool:
        """Whether so many sessions of a token are in service; all, by default."""
        wanted = len(self.sockets(token)) if sessions is None else sessions
        return self.part(f"token {token}").startswith(f"{wanted} of ")

    def part(self, name: str) -> str:
        """What `/readyz` says of a part."""
        return str(self.ready()[1].get("parts", {}).get(name, ""))

    def ready(self) -> tuple[int, dict[str, Any]]:
        """`/readyz`: status and body."""
        try:
            with urllib.request.urlopen(f"http://{self.world.operations}/readyz", timeout=5) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as err:
            with err:
                return err.code, json.loads(err.read())

    def spki(self, key: str) -> bytes:
        """The public key as the broker has pinned it."""
        if key not in self._public:
            with self.world.client() as broker:
                lines = broker.public_key(key).splitlines()
            self._public[key] = base64.b64decode("".join(lines[1:-1]))
        return self._public[key]

    def is_good(self, key: str, message: bytes, signature: bytes) -> bool:
        """Whether a signature verifies with the pinned public key."""
        algorithm = self.keys[key][1]
        content = message if algorithm.signs_message else hashlib.new(algorithm.hash_name, message).digest()
        return is_good(self.spki(key), algorithm, content, signature)

    def outcomes(self) -> dict[str, list[tuple[str, str]]]:
        """For each message by its SHA-256: (outcome, cause) of each use, `open` where there is none yet; in order."""
        uses: dict[str, str] = {}
        found: dict[str, dict[str, tuple[str, str]]] = {}
        for leaf in self.world.leaves():
            record = json.loads(leaf)
            use = record["use"]
            if record["kind"] == "intent":
                uses[use] = record["tbs"]["value"]
                found.setdefault(uses[use], {})[use] = ("open", "")
            elif record["kind"] == "outcome":
                found[uses[use]][use] = (record["outcome"], record["body"]["cause"])
        return {digest: list(each.values()) for digest, each in found.items()}

    def outcomes_of(self, message: bytes) -> list[tuple[str, str]]:
        """(outcome, cause) of each use of a message, which must be unique and not for Ed25519."""
        return self.outcomes().get(hashlib.sha256(message).hexdigest(), [])

    def security(self, event: str) -> list[str]:
        """The details of the security records of this event."""
        records = (json.loads(leaf) for leaf in self.world.leaves())
        return [each["body"]["detail"] for each in records if each["kind"] == "security" and each["body"]["event"] == event]


class Asker:
    """One connection of one workload. Nothing is asked twice. For one thread."""

    def __init__(self, shimmed: ShimmedWorld, name: str = "payments-api") -> None:
        self._shimmed = shimmed
        world = shimmed.world
        context = ssl.create_default_context(cafile=world.directory / "bundle.pem")
        context.load_cert_chain(world.svid(name))
        host, _, port = world.url.removeprefix("https://").partition(":")
        self._http = http.client.HTTPSConnection(host, int(port), timeout=30, context=context)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def connect(self) -> None:
        """Shake hands now, not with the first request."""
        self._http.connect()

    def sign(self, key: str, message: bytes) -> Answer:
        """One request, one answer. A signature that does not verify fails the test at once: it must never be released."""
        body = {"algorithm": self._shimmed.keys[key][1].value, "message": base64.b64encode(message).decode()}
        self._http.request("POST", f"/v1/keys/{key}/sign", json.dumps(body), {"Content-Type": "application/json"})
        response = self._http.getresponse()
        document = json.loads(response.read())
        if response.status != 200:
            assert response.headers["Content-Type"] == "application/problem+json"
            code = document["type"].removeprefix("urn:keybroker:problem:")
            return Answer(response.status, code, int(response.headers["Retry-After"] or 0), b"")
        signature = base64.b64decode(document["signature"])
        assert self._shimmed.is_good(key, message, signature), "a wrong signature was released"
        return Answer(200, "", 0, signature)

    def signs(self, key: str) -> bool:
        """Whether a request gets a good signature now."""
        return self.sign(key, b"again").status == 200


def make_shimmed_world(directory: Path, tokens: Mapping[str, TokenPlan]) -> ShimmedWorld:
    """A development world with more tokens than its own (`development`, with `orders`), which payments-api may use; not served yet."""
    world = make_world(directory)
    module = build_shim(directory.parent)
    config = world.config
    shims: dict[str, Shim] = {}
    keys: dict[str, tuple[str, Algorithm]] = {"orders": ("development", Algorithm.ES256)}
    for token, plan in tokens.items():
        home = directory / token
        home.mkdir()
        made = make_token(home, plan.keys, label=token)
        shims[token] = Shim.make(home / "shim", module)
        sockets = [f"run/{token}-{index}.sock" for index in range(plan.workers)]
        section = {
            "uri": made.uri.replace("file:pin", f"file:{made.pin_file}"),
            "sockets": sockets,
            "deadline_ms": plan.deadline_ms,
            "module_environment": {"SOFTHSM2_CONF": str(made.configuration)},
        }
        shims[token].use_in(section)
        config["hsm"]["tokens"][token] = section
        config["authority"]["tokens"][token] = {"sockets": list(sockets), "deadline_ms": plan.authority_deadline_ms}
        for key, algorithm in plan.keys.items():
            config["authority"]["keys"][key] = {"token": token, "versions": [{"version": 1, "object": key}]}
            keys[key] = (token, algorithm)
    world.config_file.write_text(yaml.safe_dump(config))
    grant = {
        "id": "shimmed",
        "workloads": ["spiffe://example.org/payments/api"],
        "keys": [key for key in keys if key != "orders"],
        "operations": ["sign", "read-key"],
        "algorithms": sorted({algorithm.value for _, algorithm in keys.values()}),
    }
    (directory / "grants" / "shimmed.yaml").write_text(yaml.safe_dump({"grants": [grant]}))
    return ShimmedWorld(world, shims, keys)


@contextlib.contextmanager
def serving(shimmed: ShimmedWorld, without: Sequence[str] = ()) -> Iterator[ShimmedWorld]:
    """The world, served while the block runs, with every session of every token in service but for those named."""
    try:
        shimmed.world.start()
        until(lambda: all(shimmed.is_served(token) for token in shimmed.shims if token not in without), 30, "a token is not served")
        yield shimmed
    finally:
        shimmed.world.kill()


@contextlib.contextmanager
def serving_apart(shimmed: ShimmedWorld) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """The world, served while the block runs by rooms that were started one by one, and an hsm room for each token: `hsm-NAME`."""
    world, config = shimmed.world, shimmed.world.config
    sections = {f"hsm-{token}": {"hsm": {"tokens": {token: section}}} for token, section in config["hsm"]["tokens"].items()}
    sections |= {room: {room: config[room]} for room in ("authority", "frontend")}
    rooms: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, section in sections.items():
            file = world.directory / f"{name}.yaml"
            file.write_text(yaml.safe_dump(section))
            command = [str(PROGRAM), name.partition("-")[0], "--config", str(file)]
            with (world.directory / f"{name}.log").open("ab") as log:
                rooms[name] = subprocess.Popen(command, stdout=log, stderr=log, env=clean_environment())
        world.url = f"https://{config['frontend']['listen']}"
        until(lambda: _is_up(shimmed) and all(map(shimmed.is_served, shimmed.shims)), 30, "a token is not served")
        yield rooms
    finally:
        for room in reversed(rooms.values()):
            room.terminate()
        for room in rooms.values():
            try:
                room.wait(15)
            except subprocess.TimeoutExpired:
                room.kill()
                room.wait(10)


def _is_up(shimmed: ShimmedWorld) -> bool:
    try:
        return shimmed.ready()[0] == 200
    except OSError:
        return False
