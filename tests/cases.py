"""The numbered faults, attacks and bad inputs, and which tests show what each gets: `python -m tests.cases [--check]`.

Tests name a case with `@pytest.mark.case(N)`. docs/reference/cases.md is written from the marks.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections import defaultdict
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "reference" / "cases.md"

GROUPS: dict[str, dict[int, str]] = {
    "TLS and identity": {
        1: "No client certificate; TLS 1.2 or lower: an alert, counted on record",
        2: "SVID expired, not yet valid, or of an unknown CA: refused",
        3: "A valid ID of one trust domain, signed by the CA of another that is trusted too: refused, both named",
        4: "A leaf that is a CA, or has key usages or extended key usages that it must not or must have: refused, each by its rule",
        5: "No URI SAN or two, another scheme, root path, escapes, upper case, newline, NUL, too long: refused, shown escaped",
        6: "An expired SVID by session resumption: nothing is resumed",
        7: "The SVID expires, or the bundle loses its CA, on an open connection: refused at the next request",
        8: "An ID comes onto the deny list on an open connection: refused within a second",
        9: "A hundred intermediates, a giant RSA key, a certificate of 64 KiB: refused at once, nobody else waits",
        10: "A header that claims another identity: ignored",
        11: "Attestation that is stale, replayed, or of another key: refused",
    },
    "Parsing of requests": {
        12: "JSON that is malformed, ambiguous, too deep, in another encoding: 400",
        13: "A body over the limit, declared or chunked: 413, and memory stays bounded",
        14: "Wrong content type, unknown fields, wrong types, bad base64: 415 or 422 with a JSON pointer",
        15: "A digest of the wrong length, an algorithm that the key cannot do: 422 or 403",
        16: "Smuggling: both lengths, two lengths, bare LF, folded lines, no Host or two, HTTP/0.9, HTTP/2: one 400 and the door",
        17: "Too many headers, too long a target: 431 and 414",
        18: "An unknown key and a key of somebody else: the same answer by the same code path, in the same time",
        19: "A key name with escapes, dots, quotes, SQL, URI metacharacters: refused, nothing looked up",
        20: "The same idempotency key again: the same use; with another body: refused; at once: one use",
    },
    "Policy": {
        21: "A policy that answers undefined, null, text, a number, a contradiction: denied, alerted like an outage",
        22: "An engine that is killed, hangs, or answers garbage: 503 within the deadline",
        23: "A policy with unbounded work: stopped, others unharmed",
        24: "A policy that calls network, environment or clock: refused when it is loaded",
        25: "Rules that are broken, older, empty or wrongly signed: refused, the live ones stay",
        26: "Rules that change under a hundred requests: each record names exactly one policy",
        27: "Input that differs in form but is equal: a decision replays from its record",
    },
    "Quorum": {
        28: "Too few approvals: pending",
        29: "One approver twice, one person with two SVIDs, the requester himself: counted once, once, refused",
        30: "An approval of something else, or with a bad signature: refused",
        31: "An approval that expires before it is used: refused",
        32: "An approver who is removed after approving: not counted",
        33: "Rules that change between approval and use: judged again, the stricter wins",
        34: "One quorum spent twice at once: exactly one success",
        35: "SIGKILL after the quorum is spent, before the signature: spent, and unknown",
        36: "The record fails while a quorum is spent: nothing is half spent",
    },
    "Limits and time": {
        37: "A burst at the edge of a window, from many processes: never over the limit",
        38: "The token fails after a unit is taken: it stays taken",
        39: "A clock that jumps, DST, a leap second: no second window",
        40: "A request just before the window closes, a token that takes long: never signed after it",
        41: "Replicas whose clocks differ: the store's time decides",
        42: "An unknown time zone, other time zone data: refused, on record",
    },
    "HSM": {
        43: "Session, handle or login lost: a fresh session, at most one retry under the same intent",
        44: "Device or token gone: 503 at once, other tokens serve, back within ten seconds of its return",
        45: "PIN wrong, locked or expired: one attempt, then an operator is needed",
        46: "A signature that takes 30 s: 504 at the deadline, unknown, the late result destroyed",
        47: "A signature that never returns: the worker is killed and replaced, nobody else waits",
        48: "An error after the token signed: unknown, and spent",
        49: "A wrong signature: never released, the worker out of service",
        50: "An operation left active on a session: the session is dropped",
        51: "A fork after the module is loaded: never happens",
        52: "A key that is missing, ambiguous, extractable, of the wrong class: refused at the start, others serve",
        53: "A return code of the vendor, or none that is known: 503, on the log, never 500",
        54: "The session limit: a bounded wait, then 503",
    },
    "Storage": {
        55: "SIGKILL at each step of a use: whoever holds a signature finds it on record",
        56: "EIO and ENOSPC at every write and sync of the record's way: nothing signed without a record",
        57: "A full disk, then space: 503 meanwhile, recovers without a restart, no gaps",
        58: "A write that failed and is there, or failed and is not: no hole, no second release",
        59: "A database that fails over between intent and outcome: resolved by reading back",
        60: "A database that is away: 503, no stampede",
        61: "Settings under which a commit is not durable: refuses to start",
        62: "A database that is locked: bounded retries, then 503",
        63: "Power loss: the order of syncs, shown by a trace",
    },
    "Concurrency and life": {
        64: "Many writers of one trail: no fork",
        65: "A client that goes away after the intent: the outcome is recorded, the signature destroyed",
        66: "SIGTERM under load: drained, exit 0, no use without an outcome",
        67: "A second broker on the same state: refuses to start",
    },
    "Tampering with the record": {
        68: "An edit, a deletion, a swap, a forgery, a truncation, an old copy: found, with the first bad index",
        69: "Two checkpoints of one size: proved, and not cosigned",
        70: "A log key that is replaced, a signature that is stripped: found",
        71: "A bit that flips on the disk: found within the stated period",
    },
    "Administration": {
        72: "A single administrator who widens access: waits for a second person",
        73: "A replayed change, or one against an older base: refused",
        74: "An administrator with a second account: the same person",
        75: "Break-glass: time-boxed, loud, on record before use, reviewed",
    },
    "Overload": {
        76: "Slow clients in five phases, 2,000 of them: closed within ten seconds, honest ones unharmed",
        77: "Floods of bad handshakes and of denials: shed first, aggregated on record",
    },
    "Upgrades": {
        78: "An upgrade under traffic, killed at each step; a downgrade: nothing lost, refused",
        79: "Old and new replicas on one database: works, or the older refuses",
    },
}


class _Marks:
    """Collects the marks of a pytest run that runs nothing."""

    def __init__(self) -> None:
        self.tests: dict[int, set[str]] = defaultdict(set)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for mark in item.iter_markers("case"):
                for number in mark.args:
                    self.tests[number].add(item.nodeid.partition("[")[0])


def collect() -> dict[int, set[str]]:
    """The tests of each case, by their node ids without parameters."""
    marks = _Marks()
    with contextlib.redirect_stdout(io.StringIO()):
        status = pytest.main(
            ["--collect-only", "-q", "-p", "no:randomly", "-p", "no:cacheprovider", str(REPOSITORY / "tests")], plugins=[marks]
        )
    assert status == 0, f"the tests cannot be collected ({status})"
    return marks.tests


def page(tests: dict[int, set[str]]) -> str:
    """The reference page."""
    known = {number for cases in GROUPS.values() for number in cases}
    assert tests.keys() <= known, f"marks of cases that there are not: {sorted(tests.keys() - known)}"
    lines = [
        "# Faults, attacks and bad input",
        "",
        "What can go wrong, and what must come of it. Written by `scripts/cases` from the marks on the tests; not by hand.",
        f"{len(tests)} of {len(known)} cases have tests. The others belong to parts that are not built yet, or are not shown yet.",
    ]
    for group, cases in GROUPS.items():
        lines += ["", f"## {group}", "", "| # | Case | Shown by |", "|---|---|---|"]
        for number, text in cases.items():
            names = sorted(tests.get(number, ()))
            shown = "<br>".join(f"`{name.removeprefix('tests/')}`" for name in names) or "**not yet**"
            lines.append(f"| {number} | {text} | {shown} |")
    return "\n".join([*lines, ""])


def main() -> int:
    """The command line; the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/cases", description="Write docs/reference/cases.md from the marks on the tests.")
    parser.add_argument("--check", action="store_true", help="only say whether the page is as it should be")
    words = parser.parse_args()
    made = page(collect())
    if words.check:
        if PAGE.exists() and PAGE.read_text() == made:
            return 0
        sys.stderr.write(f"{PAGE.relative_to(REPOSITORY)} is not what the tests say; run scripts/cases\n")
        return 1
    PAGE.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
