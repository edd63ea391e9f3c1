"""A host as deploy/systemd makes it, under a directory of its own: three users, their directories, three rooms, each as its user."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from keybroker.client import Client
from tests.worlds import World, clean_environment, make_world, until

REPOSITORY = Path(__file__).parents[1]
SYSTEMD = REPOSITORY / "deploy" / "systemd"
ROOMS = ("hsm", "authority", "frontend")


@dataclass(slots=True)
class Host:
    """Attributes:
    root: stands for `/` of the host; every user may pass through it.
    ids: user id (and group id) of each room.
    """

    root: Path
    world: World
    ids: dict[str, int]
    rooms: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"https://{self.world.config['frontend']['listen']}"

    def log(self, room: str) -> Path:
        return self.root / f"{room}.log"

    def config_file(self, room: str) -> Path:
        return self.root / "etc/keybroker" / f"{room}.yaml"

    def client(self, name: str = "payments-api") -> Client:
        return Client(self.url, svid=self.world.svid(name), bundle=self.world.directory / "bundle.pem")

    def start(self, *wrapper: str) -> None:
        """All rooms, and wait until a workload can sign. `wrapper` goes before each room's command."""
        for room in ROOMS:
            with self.log(room).open("ab") as log:
                command = [word.replace("{room}", room) for word in wrapper]
                command += self.as_user(room, "-m", "keybroker", room, "--config", str(self.config_file(room)))
                self.rooms[room] = subprocess.Popen(command, stdout=log, stderr=log, env=clean_environment())
        try:
            until(self.signs, 60)
        except AssertionError:
            raise AssertionError("".join(self.log(room).read_text() for room in ROOMS)) from None

    def signs(self) -> bool:
        try:
            with self.client() as broker:
                broker.sign("orders", "ES256", message=b"x")
        except Exception:  # noqa: BLE001  not yet, whatever it is
            return False
        return True

    def stop(self) -> dict[str, int]:
        """SIGTERM, left to right; the exit statuses."""
        statuses = {}
        for room, process in reversed(self.rooms.items()):
            process.terminate()
            statuses[room] = process.wait(20)
        self.rooms.clear()
        return statuses

    def kill(self) -> None:
        for process in self.rooms.values():
            process.kill()
            process.wait(10)

    def as_user(self, room: str, *arguments: str) -> list[str]:
        """A command that runs Python as the user of a room, with this project's packages, wherever they are.

        They may lie where that user cannot go (a home directory, say), so they are mounted in a namespace of the process's own.
        """
        script = (
            'mount --bind "$1" "$3/python" && mount --bind "$2" "$3/source" && mount --bind "$4" "$3/packages" || exit;'
            ' id=$5 place=$3; shift 5; cd /; exec setpriv --reuid="$id" --regid="$id" --clear-groups'
            ' env LD_LIBRARY_PATH="$place/python/lib" PYTHONPATH="$place/source:$place/packages" PYTHONDONTWRITEBYTECODE=1'
            ' "$place/python/bin/python3" "$@"'
        )
        place = self.root / "program"
        packages = next(path for path in site.getsitepackages() if Path(path).is_relative_to(sys.prefix))
        places = [sys.base_prefix, str(REPOSITORY), str(place), packages, str(self.ids[room])]
        return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *places, *arguments]

    def can(self, room: str, code: str) -> bool:
        """Whether a room's user can do something; False where the kernel says that it is not permitted."""
        done = subprocess.run(
            self.as_user(room, "-c", code), capture_output=True, text=True, check=False, timeout=30, env=clean_environment()
        )
        assert done.returncode == 0 or "PermissionError" in done.stderr, done.stderr
        return done.returncode == 0


@contextlib.contextmanager
def made_host() -> Iterator[Host]:
    """A host with a development world's keys and identities on it; its rooms are not started."""
    assert os.getuid() == 0, "three users take root: run the tests as root, in a container if you like"
    root = Path(tempfile.mkdtemp(prefix="keybroker-host-"))
    root.chmod(0o755)
    try:
        host = Host(root, make_world(root / "world"), _make_users(root))
        for name in ("python", "source", "packages"):
            (root / "program" / name).mkdir(parents=True)
        _lay_out(host)
        try:
            yield host
        finally:
            host.kill()
    finally:
        shutil.rmtree(root)


def _make_users(root: Path) -> dict[str, int]:
    """What `systemd-sysusers` and `systemd-tmpfiles` make of deploy/systemd, under another root. Ids that this host has not given away."""
    (root / "etc").mkdir()
    lines, ids = [], {}
    for number, room in enumerate(ROOMS):
        ids[room] = _free_id(64_000 + 10 * number)
        lines.append(f"keybroker-{room}:x:{ids[room]}:{ids[room]}::/:/usr/sbin/nologin\n")
    (root / "etc/passwd").write_text("".join(lines))
    (root / "etc/group").write_text("".join(f"keybroker-{room}:x:{number}:\n" for room, number in ids.items()))
    for program, file in (("systemd-sysusers", "keybroker.sysusers.conf"), ("systemd-tmpfiles", "keybroker.tmpfiles.conf")):
        create = ["--create"] if program == "systemd-tmpfiles" else []
        subprocess.run([program, *create, f"--root={root}", str(SYSTEMD / file)], check=True, capture_output=True)
    return ids


def _free_id(first: int) -> int:
    taken = {entry.pw_uid for entry in pwd.getpwall()}
    return next(number for number in range(first, first + 1_000) if number not in taken)


def _lay_out(host: Host) -> None:
    """The world's files where the units expect them, each with the one owner who needs it."""
    world, etc, run = host.world.directory, host.root / "etc/keybroker", host.root / "run/keybroker"
    shutil.copy(world / "bundle.pem", etc / "bundles/bundle.pem")
    shutil.copy(world / "grants/development.yaml", etc / "grants/development.yaml")
    (etc / "grants/development.yaml").chmod(0o644)
    _give(shutil.copy(host.world.svid("broker"), etc / "tls/svid.pem"), host.ids["frontend"])
    _give(shutil.copy(world / "pin", etc / "pins/pin"), host.ids["hsm"])
    token = host.root / "var/lib/softhsm"
    shutil.copytree(world / "token", token / "tokens")
    (token / "softhsm2.conf").write_text(f"directories.tokendir = {token}/tokens\nobjectstore.backend = file\nlog.level = ERROR\n")
    for path in (token, *token.rglob("*")):
        os.chown(path, host.ids["hsm"], host.ids["hsm"])
    sections = host.world.config
    sockets = [str(run / f"hsm/{number}.sock") for number in (1, 2)]
    module = sections["hsm"]["tokens"]["development"]["uri"].partition("module-path=")[2].partition("&")[0]
    bundles = {"example.org": str(etc / "bundles/bundle.pem")}
    frontend = sections["frontend"] | {"svid": str(etc / "tls/svid.pem"), "bundles": bundles}
    frontend |= {"authority": str(run / "authority/authority.sock"), "authority_user": str(host.ids["authority"])}
    authority = sections["authority"] | {"socket": str(run / "authority/authority.sock"), "frontend_user": str(host.ids["frontend"])}
    authority |= {"state": str(host.root / "var/lib/keybroker/state"), "bundles": bundles, "grants": str(etc / "grants")}
    (etc / "denied").mkdir(exist_ok=True)
    shutil.copy(world / "denied.yaml", etc / "denied/denied.yaml")
    authority |= {"deny_list": str(etc / "denied/denied.yaml")}
    (etc / "log").mkdir()
    shutil.copy(world / "log.vkey", etc / "log/log.vkey")
    authority |= {"checkpoints": {"token": "development", "key": str(etc / "log/log.vkey")}}
    authority |= {"tokens": {"development": {"sockets": sockets, "hsm_user": str(host.ids["hsm"])}}}
    uri = f"pkcs11:token=keybroker-dev?module-path={module}&pin-source=file:{etc}/pins/pin"
    development: dict[str, object] = {"uri": uri, "sockets": sockets}
    development["module_environment"] = {"SOFTHSM2_CONF": str(token / "softhsm2.conf")}
    development["log"] = sections["hsm"]["tokens"]["development"]["log"]
    hsm = {"authority_user": str(host.ids["authority"]), "tokens": {"development": development}}
    for room, section in (("frontend", frontend), ("authority", authority), ("hsm", hsm)):
        host.config_file(room).write_text(yaml.safe_dump({room: section}))
        host.config_file(room).chmod(0o644)


def _give(path: Path | str, owner: int) -> None:
    os.chown(path, owner, owner)
    Path(path).chmod(0o600)


def settle(seconds: float = 0.5) -> None:
    """A moment for what comes after an answer (logs, timers)."""
    time.sleep(seconds)
