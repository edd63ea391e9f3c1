"""Three rooms, three users: what each can reach, what it must not, and that the PIN is in one of them only."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import ROOMS, SYSTEMD, Host, made_host, settle
from tests.worlds import arguments, descendants

_CONNECT = "import socket; socket.socket(socket.AF_UNIX).connect({!r})"


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with made_host() as host:
        host.start()
        yield host


def test_workload_signs_through_rooms_of_three_users(host: Host) -> None:
    assert host.signs()
    owners = {room: Path(f"/proc/{process.pid}/mem").stat().st_uid for room, process in host.rooms.items()}
    assert owners == dict.fromkeys(ROOMS, 0)  # not dumpable: not even the room's own user may look inside
    for room, process in host.rooms.items():
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert f"\nUid:\t{host.ids[room]}\t" in status
        assert "\nNoNewPrivs:\t1\n" in status
        assert "Max core file size        0                    0 " in Path(f"/proc/{process.pid}/limits").read_text()


@pytest.mark.parametrize(
    ("room", "thing", "is_allowed"),
    [
        ("hsm", "etc/keybroker/pins/pin", True),
        ("authority", "etc/keybroker/pins/pin", False),
        ("frontend", "etc/keybroker/pins/pin", False),
        ("authority", "var/lib/keybroker/state/keybroker.db", True),
        ("frontend", "var/lib/keybroker/state/keybroker.db", False),
        ("hsm", "var/lib/keybroker/state/keybroker.db", False),
        ("frontend", "etc/keybroker/tls/svid.pem", True),
        ("authority", "etc/keybroker/tls/svid.pem", False),
        ("hsm", "etc/keybroker/tls/svid.pem", False),
        ("authority", "etc/keybroker/grants/development.yaml", True),
        ("frontend", "etc/keybroker/grants/development.yaml", False),
        ("hsm", "etc/keybroker/grants/development.yaml", False),
        ("frontend", "var/lib/softhsm/softhsm2.conf", True),  # not secret; the tokens are
    ],
)
def test_file_is_open_only_to_its_room(host: Host, room: str, thing: str, is_allowed: bool) -> None:
    assert (host.root / thing).exists()
    assert host.can(room, f"open({str(host.root / thing)!r}, 'rb').read(1)") is is_allowed


@pytest.mark.parametrize("room", ["frontend", "authority"])
def test_token_files_are_closed_to_the_other_rooms(host: Host, room: str) -> None:
    objects = sorted((host.root / "var/lib/softhsm/tokens").rglob("*.object"))
    assert objects
    for path in objects:
        assert not host.can(room, f"open({str(path)!r}, 'rb')")
        assert host.can("hsm", f"open({str(path)!r}, 'rb')")


@pytest.mark.parametrize(
    ("room", "socket", "is_allowed"),
    [
        ("frontend", "authority/authority.sock", True),
        ("frontend", "hsm/1.sock", False),
        ("authority", "hsm/1.sock", True),
        ("hsm", "authority/authority.sock", False),
    ],
)
def test_socket_is_open_only_to_the_room_on_its_left(host: Host, room: str, socket: str, is_allowed: bool) -> None:
    assert host.can(room, _CONNECT.format(str(host.root / "run/keybroker" / socket))) is is_allowed


def test_room_hears_only_the_user_it_expects(host: Host) -> None:
    """Root may open any socket, and is still not the frontend: SO_PEERCRED."""
    code = _CONNECT.replace("connect", "connect_ex") + "\n"
    code = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({str(host.root / 'run/keybroker/authority/authority.sock')!r})\n"
    code += "s.settimeout(10); raise SystemExit(0 if s.recv(1) == b'' else 1)"
    assert subprocess.run(["python3", "-c", code], check=False, timeout=30).returncode == 0
    settle()
    assert "the peer runs as user 0" in host.log("authority").read_text()


@pytest.mark.parametrize(
    ("room", "code"),
    [
        ("frontend", "open({pin!r})"),
        ("frontend", "open({database!r})"),
        ("frontend", "import os; os.execv('/bin/true', ['true'])"),
        ("frontend", "import socket; socket.create_connection(('127.0.0.1', 9))"),
        ("authority", "open({pin!r})"),
        ("authority", "import os; os.execv('/bin/true', ['true'])"),
        ("authority", "import socket; socket.create_connection(('127.0.0.1', 9))"),
        ("authority", "import socket; socket.create_server(('127.0.0.1', 0))"),
    ],
)
def test_walls_hold_where_file_modes_would_not(host: Host, room: str, code: str) -> None:
    """Inside a room's own walls, and as root, whom no file mode stops."""
    places = {"pin": str(host.root / "etc/keybroker/pins/pin"), "database": str(host.root / "var/lib/keybroker/state/keybroker.db")}
    enter = f"import sys; from pathlib import Path; from keybroker import config; from keybroker.{room}.room import sandbox\n"
    enter += "from keybroker.process import harden; harden()\nloaded = config.load(Path(sys.argv[1]))\n"
    enter += f"assert sandbox(loaded.{room}, loaded.telemetry).enter()\n"
    command = host.as_user(room, "-c", enter + code.format(**places), str(host.config_file(room)))
    command = [word.replace('setpriv --reuid="$id" --regid="$id" --clear-groups ', "") for word in command]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert "PermissionError" in done.stderr, done.stderr or "it was allowed"


def test_pin_is_nowhere_outside_the_hsm_room(host: Host, tmp_path: Path) -> None:
    pin_file = host.root / "etc/keybroker/pins/pin"
    pin = pin_file.read_bytes().strip()
    assert host.signs()
    workers = descendants(host.rooms["hsm"].pid)
    assert workers
    for room in ("frontend", "authority"):
        assert copies(host.rooms[room].pid, pin, tmp_path) == 0
    for pid in (*(process.pid for process in host.rooms.values()), *workers):
        assert pin.decode() not in " ".join(arguments(pid))
        assert pin not in Path(f"/proc/{pid}/environ").read_bytes()
    for room in ROOMS:
        assert pin not in host.log(room).read_bytes()


def test_memory_scan_finds_a_pin_that_is_there(host: Host, tmp_path: Path) -> None:
    pin_file = host.root / "etc/keybroker/pins/pin"
    command = ["python3", "-c", f"pin = open({str(pin_file)!r}).read(); print(flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert copies(holder.pid, pin_file.read_bytes().strip(), tmp_path) > 0
        holder.kill()


def copies(pid: int, secret: bytes, tmp_path: Path) -> int:
    """How often a secret is in the memory of a process, as gcore sees it."""
    core = tmp_path / "core"
    done = subprocess.run(["gcore", "-o", str(core), str(pid)], capture_output=True, text=True, check=False, timeout=100)
    dumped = tmp_path / f"core.{pid}"
    assert dumped.exists(), done.stdout + done.stderr
    count = 0
    rest = b""
    with dumped.open("rb") as file:
        while piece := file.read(1 << 24):
            window = rest + piece
            count += window.count(secret) + window.count(secret.decode().encode("utf-16-le"))
            rest = window[-2 * len(secret) :]
    dumped.unlink()
    return count


# The units


def allowed_calls(unit: Path) -> set[str]:
    """The system calls that a unit's filter lets pass, sets expanded as this host's systemd knows them."""
    allowed: set[str] = set()
    for line in unit.read_text().splitlines():
        if line.startswith("SystemCallFilter="):
            words = line.partition("=")[2]
            named = {call for word in words.removeprefix("~").split() for call in expanded(word)}
            allowed = allowed - named if words.startswith("~") else allowed | named
    return allowed


def expanded(name: str) -> set[str]:
    if not name.startswith("@"):
        return {name}
    shown = subprocess.run(["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True, timeout=30).stdout
    members = [line.strip() for line in shown.splitlines()[1:] if line.strip() and not line.strip().startswith("#")]
    return {call for member in members for call in expanded(member)}


def test_units_let_pass_every_system_call_that_their_room_makes(tmp_path: Path) -> None:
    with made_host() as host:
        traces = {room: tmp_path / f"{room}.trace" for room in ROOMS}
        host.start("strace", "-f", "-qq", "-e", "signal=none", "-o", f"{tmp_path}/{{room}}.trace")
        with host.client("auditor") as broker:
            broker.records()
        assert host.signs()
        for process in host.rooms.values():
            for pid in descendants(process.pid):  # strace passes no signal on
                if "--config" in arguments(pid) and "keybroker" in arguments(pid):
                    os.kill(pid, 15)
            process.wait(30)
        for room, trace in traces.items():
            text = trace.read_text(errors="replace")
            text = text[text.rindex("/bin/python3") if room != "hsm" else text.index("/program/python/bin/python3") :]
            made = set(re.findall(r"^\d+ +(?:<\.\.\. )?([a-z0-9_]+)", text, re.MULTILINE)) - {"exit_group"}
            assert "futex" in made or "read" in made
            assert made - allowed_calls(SYSTEMD / f"keybroker-{room}.service") == set()


@pytest.mark.parametrize(("room", "exposure"), [("frontend", 15), ("authority", 10), ("hsm", 10), ("courier", 15), ("opa", 20)])
def test_unit_is_well_formed_and_closed(room: str, exposure: int, tmp_path: Path) -> None:
    unit = tmp_path / f"keybroker-{room}.service"
    text = (SYSTEMD / unit.name).read_text()
    unit.write_text(re.sub(r"/opt/keybroker/bin/\w+", "/bin/true", text))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False, timeout=30)
    assert unit.name not in done.stderr + done.stdout, done.stderr
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={exposure}", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stdout
