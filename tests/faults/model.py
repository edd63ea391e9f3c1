"""What must hold between what clients saw and what is on record, whatever died meanwhile. Pure: a history and a log in, faults out.

A use is safe when whoever holds a signature finds its intent and its outcome on record, and when nobody was told no, or told
nothing, and yet used a key twice.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from keybroker.audit.chain import ChainChecker
from keybroker.audit.leaf import decode
from keybroker.client.verify import is_good
from tests.faults.history import LOST, UNSENT, Attempt, Question

AMBIGUOUS = frozenset({"overloaded", "in-progress"})
"""Refusals after which there may be a use all the same: the frontend says them when it has lost the authority on the way."""
_BENIGN = frozenset({LOST, UNSENT, 200, 404, 409, 422, 503, 504})
_ORDINARY_DENIALS = frozenset({"not-found", "denied"})

Record = dict[str, Any]


class Log:
    """A finished log, by what its records are about."""

    def __init__(self, leaves: Sequence[bytes]) -> None:
        self.records = [decode(leaf) for leaf in leaves]
        self.intents: dict[str, list[Record]] = {}
        self.outcomes: dict[str, Record] = {}
        for record in self.records:
            if record["kind"] == "intent":
                self.intents.setdefault(record["tbs"]["value"], []).append(record)
            elif record["kind"] == "outcome":
                self.outcomes[record["use"]] = record

    def of(self, question: Question) -> list[Record]:
        """Every intent to answer this question, oldest first."""
        return self.intents.get(digest_of(question), [])

    def ending(self, intent: Record) -> str:
        """How a use ended."""
        return str(self.outcomes.get(intent["use"], {}).get("outcome", "open"))


def digest_of(question: Question) -> str:
    """What the record calls the message."""
    return hashlib.new(question.algorithm.hash_name, question.message).hexdigest()


def violations(history: Sequence[Attempt], leaves: Sequence[bytes], publics: Mapping[str, bytes]) -> list[str]:
    """Everything that does not hold; empty is good.

    Args:
        history: every attempt of every client.
        leaves: the whole log after the last of them, and after everything that died is back.
        publics: the public key of each key, DER SubjectPublicKeyInfo.
    """
    log = Log(leaves)
    groups: dict[str, list[Attempt]] = {}
    for number, attempt in enumerate(history):
        groups.setdefault(attempt.question.idempotency_key or f"/{number}", []).append(attempt)
    return [
        *_chains(leaves),
        *_asked_for(history, log),
        *itertools.chain.from_iterable(_answered(attempt, log, publics) for attempt in history),
        *itertools.chain.from_iterable(_used_once(attempts, log) for attempts in groups.values()),
        *_in_order(groups.values(), log),
        *_denied(history, log),
    ]


def _chains(leaves: Sequence[bytes]) -> Iterator[str]:
    checker = ChainChecker()
    yield from (f"record {fault.index}: {fault.rule}" for leaf in leaves for fault in checker.take(leaf))
    yield from (f"use {use} has no outcome" for use in checker.open_uses)


def _asked_for(history: Iterable[Attempt], log: Log) -> Iterator[str]:
    asked = {digest_of(attempt.question) for attempt in history if attempt.status != UNSENT}
    yield from (f"nobody asked for intent {intents[0]['index']}" for digest, intents in log.intents.items() if digest not in asked)


def _answered(attempt: Attempt, log: Log, publics: Mapping[str, bytes]) -> Iterator[str]:
    """Each signature that anybody holds is good and on record, where the answer says."""
    if attempt.status not in _BENIGN:
        yield f"an answer with status {attempt.status} {attempt.code}"
    if attempt.signed is None:
        return
    question, signed = attempt.question, attempt.signed
    content = question.message if question.algorithm.signs_message else bytes.fromhex(digest_of(question))
    if not is_good(publics[question.key], question.algorithm, content, signed.signature):
        yield f"use {signed.use}: a signature that does not verify"
    places = [log.records[index] if 0 <= index < len(log.records) else {} for index in (signed.records.intent, signed.records.outcome)]
    if [place.get("kind") for place in places] != ["intent", "outcome"] or {place["use"] for place in places} != {signed.use}:
        yield f"use {signed.use}: not on record where the answer says"
        return
    intent, outcome = places
    if intent["tbs"]["value"] != digest_of(question) or intent["trail"]["id"] != question.workload or intent["key"]["name"] != question.key:
        yield f"use {signed.use}: its intent is for something else"
    if outcome["outcome"] != "signed" or outcome["signature_sha256"] != hashlib.sha256(signed.signature).hexdigest():
        yield f"use {signed.use}: its outcome is {outcome['outcome']}, or of another signature"


def _used_once(attempts: Sequence[Attempt], log: Log) -> Iterator[str]:
    """The attempts under one idempotency key, or one attempt without: at most one use that signed, and one answer."""
    name = attempts[0].question.idempotency_key or attempts[0].question.message.decode()
    questions = {digest_of(attempt.question): attempt.question for attempt in attempts}
    used = [question for question in questions.values() if log.of(question)]
    if len(used) > 1:
        yield f"{name}: one idempotency key, two questions, and both were worked on"
    intents = log.of(used[0]) if used else []
    endings = [log.ending(intent) for intent in intents]
    if "signed" in endings[:-1] or len(intents) > sum(attempt.status != UNSENT for attempt in attempts):
        yield f"{name}: used more than once ({', '.join(endings)})"
    if [intent["retry_of"] for intent in intents] != ["", *(intent["use"] for intent in intents[:-1])][: len(intents)]:
        yield f"{name}: an intent does not name the one that it makes again"
    if len({(a.signed.use, a.signed.signature, a.signed.records.intent, a.signed.records.outcome) for a in attempts if a.signed}) > 1:
        yield f"{name}: different answers under one idempotency key"
    answered = [attempt for attempt in attempts if attempt.signed]
    for attempt in attempts:
        is_other = any(attempt.sent > each.ended and attempt.question != each.question for each in answered)
        if is_other and attempt.status > 0 and attempt.status < 500 and attempt.code not in {"idempotency-mismatch", "in-progress"}:
            yield f"{name}: another question under the same idempotency key got {attempt.status}"
        if len(attempts) == 1 and attempt.status > 200 and attempt.code not in AMBIGUOUS and "signed" in endings:
            yield f"{name}: refused with {attempt.code}, and yet signed"
        if len(attempts) == 1 and 400 <= attempt.status < 500 and attempt.code not in AMBIGUOUS and intents:
            yield f"{name}: refused with {attempt.code}, and yet intended"


def _in_order(groups: Iterable[Sequence[Attempt]], log: Log) -> Iterator[str]:
    """What was answered before something else was asked stands before it on record."""
    moments: list[tuple[float, int, int, str]] = []  # when; 0 for an end, which comes first among equals; an index; a name
    for attempts in groups:
        for question in {attempt.question: None for attempt in attempts}:
            mine = [attempt for attempt in attempts if attempt.question == question]
            moments += [(attempt.ended, 0, attempt.signed.records.outcome, "") for attempt in mine if attempt.signed]
            moments += [(min(each.sent for each in mine), 1, intent["index"], intent["use"]) for intent in log.of(question)[:1]]
    last = -1
    for _, is_start, index, use in sorted(moments):
        if not is_start:
            last = max(last, index)
        elif index < last:
            yield f"use {use}: record {index} stands before {last}, which was answered before it was asked"


def _denied(history: Iterable[Attempt], log: Log) -> Iterator[str]:
    """Whoever was told that nothing is granted finds that on record; a record may count several that came together."""
    asked = Counter(attempt.question.workload for attempt in history if attempt.status != UNSENT)
    told = Counter(attempt.question.workload for attempt in history if attempt.code in _ORDINARY_DENIALS)
    kept: Counter[str] = Counter()
    for record in log.records:
        if record["kind"] == "denial" and record["body"].get("code") in _ORDINARY_DENIALS:
            kept[record["trail"]["id"]] += int(record["body"].get("count", 1))
    for workload in kept.keys() | told.keys():
        if not told[workload] <= kept[workload] <= asked[workload]:
            yield f"{workload}: {told[workload]} denials told, {kept[workload]} on record, {asked[workload]} asked"
