"""The authority's process: everything it is made of, put together in one place, served until SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import sys
from collections.abc import AsyncIterator

import msgspec
import uvloop

import keybroker
from keybroker.authority import policy_start
from keybroker.authority.acts import Acts
from keybroker.authority.approvals import ApprovalJudge
from keybroker.authority.breakers import Breakers
from keybroker.authority.checkpoints import Checkpoints, log_key, require_signed
from keybroker.authority.clock_watch import ClockWatch
from keybroker.authority.denials import Denials
from keybroker.authority.desk import Desk
from keybroker.authority.freezes import Freezes
from keybroker.authority.generation import Generation
from keybroker.authority.glass import Glass
from keybroker.authority.hours import zones_digest
from keybroker.authority.journal import Entry, Journal
from keybroker.authority.keyring import Keyring
from keybroker.authority.log_reads import LogReads
from keybroker.authority.metrics import AuthorityMetrics
from keybroker.authority.notices import NoticeDesk
from keybroker.authority.operation_desk import OperationDesk
from keybroker.authority.others import Others
from keybroker.authority.policy import loading
from keybroker.authority.policy.holder import BUILT_IN, LivePolicy
from keybroker.authority.policy_changes import PolicyChanges
from keybroker.authority.quorum import Quorum
from keybroker.authority.reads import Reads
from keybroker.authority.responders import Responders
from keybroker.authority.scrub import Scrub
from keybroker.authority.security_events import SecurityEvents
from keybroker.authority.selfcheck import SelfCheck
from keybroker.authority.service import KeyUseService
from keybroker.authority.shadow import Shadow
from keybroker.authority.store.faults import StoreBrokenError
from keybroker.authority.store.reader import Reader
from keybroker.authority.store.sqlite import SqliteStore
from keybroker.authority.timekeeper import Timekeeper
from keybroker.authority.tokens import TokenPool
from keybroker.authority.watch import Watch
from keybroker.clock import Clock, SystemClock
from keybroker.config import AuthorityConfig, Config, TelemetryConfig
from keybroker.errors import AuditUnavailableError, ConfigError, StoreError, WireError
from keybroker.identity.bundle import TrustBundles
from keybroker.identity.deny_list import DenyList
from keybroker.identity.x509_svid import SvidValidator
from keybroker.model.call import MAX_CALL_BYTES, Answer, Call, HealthReply
from keybroker.model.notice import MAX_NOTICE_CALL_BYTES, NoticeAnswer, NoticeCall
from keybroker.model.record import Draft, RecordKind
from keybroker.process import EXIT_CONFIG, EXIT_STORE, collect_seldom, harden, uid_of
from keybroker.sandbox import Sandbox, around, own_temporary, python_paths
from keybroker.telemetry import configure, logger
from keybroker.tracing import Tracer, export_port
from keybroker.wire import Listener

DRAIN_SECONDS = 10.0

_log = logger()


def run(config: Config) -> int:
    """Serve until SIGTERM; the exit status."""
    harden()
    configure("authority", config.telemetry)
    try:
        if config.authority is None:
            raise ConfigError("the section `authority` is missing")
        _log.info("walled in", landlock_abi=sandbox(config.authority, config.telemetry).enter())
        uvloop.run(_serve(config.authority, config.telemetry))
    except (StoreBrokenError, AuditUnavailableError) as err:  # disk full, for one: starting again makes sense, and helps in the end
        sys.stderr.write(f"authority: {err}\n")
        sys.stderr.flush()
        os._exit(EXIT_STORE)  # an orderly end would close the database, which syncs again
    except (ConfigError, StoreError, WireError) as err:
        sys.stderr.write(f"authority: {err}\n")
        return EXIT_CONFIG
    return 0


def sandbox(config: AuthorityConfig, telemetry: TelemetryConfig) -> Sandbox:
    """What this room may touch: its state, its sockets, and what it was told to trust. No PIN, no network but where it was told to ask."""
    rules = loading.touches(config)
    shadow = (config.shadow.grants, *around(config.shadow.module)) if config.shadow else ()
    log = config.checkpoints
    anchor = (log.anchor.parent,) if log and log.anchor else ()
    reads = (
        *python_paths(),
        *around(*config.bundles.values(), config.deny_list, BUILT_IN, log.key if log else None),
        *rules.reads,
        *shadow,
    )
    sockets = (config.socket.parent, *((config.notices.socket.parent,) if config.notices else ()))
    connects = (*export_port(telemetry), *rules.ports)
    return Sandbox(reads=reads, writes=(config.state, *anchor, *sockets, *own_temporary()), connects=connects)


async def _serve(config: AuthorityConfig, telemetry: TelemetryConfig) -> None:  # noqa: PLR0915  the one place where parts meet
    stop = _stop_signal()
    clock = SystemClock()
    generation = Generation()
    bundles = TrustBundles.load(config.bundles)
    deny_list = DenyList.load(config.deny_list) if config.deny_list else None
    store = SqliteStore.open(config.state)
    rules = await policy_start.start(config, store, clock)
    policy = rules.live
    pins = store.pins()
    log = log_key(config.checkpoints.key, config.log) if config.checkpoints else None
    last_checkpoint = require_signed(config.checkpoints, log, store) if config.checkpoints and log else b""
    timekeeper = Timekeeper(clock, store.clock(), store.tail().time_us, config.max_clock_gap_s)
    freezes = Freezes(store.freezes())
    glass = Glass(store.glass(), timekeeper)
    metrics = AuthorityMetrics(sorted(config.keys))
    journal = Journal(store, config.log, generation, timekeeper, _end_at_once, metrics.observed)
    security = SecurityEvents(journal, metrics)
    denials = Denials(journal, metrics)
    shadow = Shadow(config.shadow, config.policy.module, journal, security, metrics)
    tracer = Tracer("authority", telemetry)
    keyring = Keyring(config, pins, journal, clock)
    checkpoints = None
    if config.checkpoints and log:
        checkpoints = Checkpoints(config=config.checkpoints, key=log, journal=journal, reader=Reader(config.state), last=last_checkpoint)
    signs_log = (config.checkpoints.token, checkpoints.judge) if config.checkpoints and checkpoints else None
    tokens = TokenPool.of(config.tokens, keyring.to_open(), keyring.judge, security.note, signs_log)
    validator = SvidValidator(bundles, deny_list, clock, config.allow_nonconforming_svids)
    selfcheck = SelfCheck()
    idempotency = Reader(config.state)
    quorum, operations = _operations(policy, freezes, validator, keyring, journal, denials, idempotency, generation, security, timekeeper)
    service = KeyUseService(
        validator=validator,
        rules=shadow.over(policy),
        keyring=keyring,
        freezes=freezes,
        glass=glass,
        tokens=tokens,
        selfcheck=selfcheck,
        journal=journal,
        denials=denials,
        reader=idempotency,
        timekeeper=timekeeper,
        generation=generation,
        security=security,
        metrics=metrics,
        tracer=tracer,
        quorum=quorum,
    )
    reads = Reads(
        rules=shadow.over(policy),
        keyring=keyring,
        journal=journal,
        denials=denials,
        reader=Reader(config.state, catalog=True),
        timekeeper=timekeeper,
        metrics=metrics,
    )
    acts = Acts(policy, denials, freezes, timekeeper)
    others = Others(quorum, journal, generation)
    responders = Responders(
        acts=acts,
        others=others,
        freezes=freezes,
        keyring=keyring,
        tokens=frozenset(config.tokens),
        journal=journal,
        generation=generation,
        metrics=metrics,
        clock=clock,
    )
    changes = _policy_changes(rules, store.policy_changes(), acts, others, journal, generation, security, clock)
    breakers = Breakers(
        acts=acts,
        glass=glass,
        people=policy,
        journal=journal,
        generation=generation,
        security=security,
        metrics=metrics,
        timekeeper=timekeeper,
        max_s=config.break_glass_max_s,
    )
    scrub = Scrub(Reader(config.state), security, config.scrub_hours * 3_600)
    log_reads = LogReads(reads, checkpoints, Reader(config.state))
    desk = Desk(
        validator=validator,
        networks=policy,
        service=service,
        reads=reads,
        operations=operations,
        responders=responders,
        changes=changes,
        breakers=breakers,
        log=log_reads,
        security=security,
        metrics=metrics,
        health=lambda: _health(journal, tokens, keyring, timekeeper, policy, checkpoints, scrub),
        metrics_text=lambda: metrics.text(
            tokens.sessions(), journal.size, quorum.waiting(), is_writable=journal.is_writable, is_clock_trusted=not timekeeper.distrusted
        ),
    )
    clock_watch = ClockWatch(timekeeper, journal, security, generation, config.state)
    watch = Watch(policy=policy, bundles=bundles, deny_list=deny_list, generation=generation, journal=journal, security=security)

    closed = await journal.close_open_uses()
    await rules.record(journal)
    await journal.write(Entry(_start(config, policy.engine.digest)))
    _log.info("started", records=journal.size, closed_unknown=closed, policy=policy.engine.digest)
    tokens.start()
    background = [asyncio.ensure_future(each.run()) for each in (security, denials, watch, clock_watch, reads, shadow, scrub)]
    if checkpoints:
        background.append(asyncio.ensure_future(checkpoints.run(tokens)))
    listener = Listener[Call, Answer](config.socket, uid_of(config.frontend_user), Call, MAX_CALL_BYTES, desk.on_call, desk.on_end)
    collect_seldom()
    async with listener.serving(), _telling(config, tokens, clock):
        await stop.wait()
    await desk.drain(DRAIN_SECONDS)
    for task in background:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*background)
    for counted in (security, denials):
        with contextlib.suppress(AuditUnavailableError):
            await counted.flush()
    await shadow.stop()
    await policy.close()
    await tokens.stop()
    if checkpoints:
        checkpoints.close()
    log_reads.close()
    scrub.close()
    selfcheck.close()
    reads.close()
    idempotency.close()
    journal.close()
    await asyncio.to_thread(tracer.stop)


@contextlib.asynccontextmanager
async def _telling(config: AuthorityConfig, tokens: TokenPool, clock: Clock) -> AsyncIterator[None]:
    """Listen for the courier, if there is to be one."""
    if config.notices is None:
        yield
        return
    desk = NoticeDesk(config.notices.token, tokens, Reader(config.state), clock)
    place, uid = config.notices.socket, uid_of(config.notices.courier_user)
    listener = Listener[NoticeCall, NoticeAnswer](place, uid, NoticeCall, MAX_NOTICE_CALL_BYTES, desk.on_call, desk.on_end)
    try:
        async with listener.serving():
            yield
    finally:
        desk.close()


def _operations(
    policy: LivePolicy,
    freezes: Freezes,
    validator: SvidValidator,
    keyring: Keyring,
    journal: Journal,
    denials: Denials,
    reader: Reader,
    generation: Generation,
    security: SecurityEvents,
    timekeeper: Timekeeper,
) -> tuple[Quorum, OperationDesk]:
    """What makes operations of uses, and what shows them and takes approvals."""
    judge = ApprovalJudge(validator, policy, freezes.stops)
    quorum = Quorum(judge=judge, people=policy, journal=journal, reader=reader, security=security, timekeeper=timekeeper)
    desk = OperationDesk(
        rules=policy,
        people=policy,
        chains=validator,
        judge=judge,
        quorum=quorum,
        keyring=keyring,
        journal=journal,
        denials=denials,
        generation=generation,
        timekeeper=timekeeper,
    )
    return quorum, desk


def _policy_changes(
    rules: policy_start.PolicyStart,
    made: frozenset[str],
    acts: Acts,
    others: Others,
    journal: Journal,
    generation: Generation,
    security: SecurityEvents,
    clock: Clock,
) -> PolicyChanges | None:
    """Whoever takes proposals, where the rules are in the store."""
    if rules.stored is None or rules.version is None:
        return None
    return PolicyChanges(
        acts=acts,
        others=others,
        policy=rules.stored,
        live=rules.version,
        made=made,
        journal=journal,
        generation=generation,
        security=security,
        clock=clock,
    )


def _stop_signal() -> asyncio.Event:
    """Set when this room is to end."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def _start(config: AuthorityConfig, policy: str) -> Draft:
    """What this broker is made of, so that an auditor can tell which code and which rules made the records that follow."""
    return Draft(
        kind=RecordKind.START,
        body={
            "build": keybroker.__version__,
            "config": hashlib.sha256(msgspec.json.encode(config, enc_hook=str, order="sorted")).hexdigest(),
            "policy": policy,
            "tzdata": zones_digest(),
        },
    )


def _health(
    journal: Journal,
    tokens: TokenPool,
    keyring: Keyring,
    timekeeper: Timekeeper,
    policy: LivePolicy,
    checkpoints: Checkpoints | None,
    scrub: Scrub,
) -> HealthReply:
    sessions = tokens.sessions()
    parts = {f"token {token}": f"{serving} of {configured} sessions in service" for token, (serving, configured) in sessions.items()}
    for token, trouble in tokens.troubles().items():
        parts[f"token {token}"] += f"; {trouble}"
    parts |= {f"key {ref}": f"refused: {rule}" for ref, rule in keyring.refusals().items()}
    parts["record"] = journal.halted or scrub.trouble or ("writable" if journal.is_writable else "cannot be written")
    if checkpoints:
        parts["log"] = checkpoints.trouble or f"signed up to {checkpoints.size} of {journal.size}"
    parts["clock"] = f"distrusted: {timekeeper.distrusted.partition(' ')[2]}" if timekeeper.distrusted else "trusted"
    parts["policy"] = f"cannot decide: {policy.outage}" if policy.outage else "decides"
    is_ready = journal.is_writable and not journal.halted and any(serving for serving, _ in sessions.values()) and not policy.outage
    return HealthReply(is_ready, parts)


def _end_at_once(err: StoreBrokenError) -> None:
    """After a failed sync, nothing this process knows of the store can be trusted: end without another write to it."""
    _log.critical("the store is broken; ending at once", reason=str(err))
    os._exit(EXIT_STORE)
