"""The courier's process: asks the authority what is new, and carries it to every hook until it is taken or has failed too often."""

from __future__ import annotations

import asyncio
import base64
import random
import signal
import ssl
import sys
from pathlib import Path
from urllib.parse import urlsplit

from keybroker.clock import Clock, SystemClock
from keybroker.config import Config, CourierConfig, HookConfig
from keybroker.courier.delivery import UndeliveredError, context_for, deliver
from keybroker.courier.outbox import Notice, Outbox
from keybroker.errors import ConfigError, RoomUnavailableError, StoreError
from keybroker.model.notice import (
    MAX_NOTICE_ANSWER_BYTES,
    AnyNoticeReply,
    ComposeNotice,
    News,
    NewsAfter,
    NoNotice,
    NoticeAnswer,
    NoticeCall,
    SignedNotice,
)
from keybroker.process import EXIT_CONFIG, harden, uid_of
from keybroker.sandbox import Sandbox, around, own_temporary, python_paths
from keybroker.telemetry import configure, logger
from keybroker.wire import Link

KEY_FILE = "notice-key.pem"
_ASK_S = 10.0
_PAUSE_S = 1.0
_HTTPS, _DNS = 443, 53

_log = logger()


def run(config: Config) -> int:
    """Deliver until SIGTERM; the exit status."""
    harden()
    configure("courier", config.telemetry)
    try:
        if config.courier is None:
            raise ConfigError("the section `courier` is missing")
        contexts = {name: context_for(hook.ca) for name, hook in config.courier.hooks.items()}
        outbox = Outbox(config.courier.state)
        _log.info("walled in", landlock_abi=sandbox(config.courier).enter())
        asyncio.run(_serve(config.courier, contexts, outbox))
    except (ConfigError, StoreError) as err:
        sys.stderr.write(f"courier: {err}\n")
        return EXIT_CONFIG
    return 0


def sandbox(config: CourierConfig) -> Sandbox:
    """What this room may touch: its state, the authority's socket, and the ports of its hooks."""
    ports = {urlsplit(hook.url).port or _HTTPS for hook in config.hooks.values()}
    resolver = tuple(Path(each) for each in ("/etc/resolv.conf", "/etc/hosts", "/etc/host.conf", "/etc/gai.conf", "/run/systemd/resolve"))
    trusted = around(*(hook.ca for hook in config.hooks.values()))
    reads = (*python_paths(), *resolver, *trusted, config.authority.parent)
    return Sandbox(reads=reads, writes=(config.state, *own_temporary()), connects=tuple(sorted({*ports, _DNS})))


async def _serve(config: CourierConfig, contexts: dict[str, ssl.SSLContext], outbox: Outbox) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    link = Link[NoticeCall, NoticeAnswer](config.authority, uid_of(config.authority_user), NoticeAnswer, MAX_NOTICE_ANSWER_BYTES)
    link.start()
    courier = Courier(config, contexts, outbox, link, SystemClock())
    work = [asyncio.ensure_future(courier.collect()), *(asyncio.ensure_future(courier.carry(name)) for name in config.hooks)]
    stopping = asyncio.ensure_future(stop.wait())
    done, _ = await asyncio.wait([*work, stopping], return_when=asyncio.FIRST_COMPLETED)
    for task in (*work, stopping):
        task.cancel()
    await asyncio.gather(*work, return_exceptions=True)
    await link.stop()
    outbox.close()
    for task in done - {stopping}:
        task.result()  # a fault of ours: say it, and end


class Courier:
    """Collects what is new, and carries it.

    Args:
        config: of this room.
        contexts: TLS, by hook.
        outbox: what is still to be delivered.
        link: to the authority; started and stopped by its owner.
        clock: for pauses between attempts.
    """

    def __init__(
        self,
        config: CourierConfig,
        contexts: dict[str, ssl.SSLContext],
        outbox: Outbox,
        link: Link[NoticeCall, NoticeAnswer],
        clock: Clock,
    ) -> None:
        self._config = config
        self._contexts = contexts
        self._outbox = outbox
        self._link = link
        self._clock = clock
        self._spki = b""

    async def collect(self) -> None:
        """Ask for news, again and again. The first time, only where the log ends: what was before is no news."""
        while True:
            position = self._outbox.position
            reply = await self._ask(NewsAfter(position))
            if isinstance(reply, News) and reply.position != position:
                lost = self._outbox.take(reply.records, tuple(self._config.hooks), reply.position, self._clock.now_us())
                if lost:
                    _log.error("outbox is full: the oldest notices were dropped", count=lost)
            await asyncio.sleep(_PAUSE_S)

    async def carry(self, name: str) -> None:
        """Deliver what is due at one hook, one after the other, so that a receiver that hangs holds nobody else up."""
        hook = self._config.hooks[name]
        while True:
            notice = self._outbox.due(name, self._clock.now_us())
            if notice is None:
                await asyncio.sleep(_PAUSE_S)
                continue
            signed = await self._ask(ComposeNotice(notice.record, hook.url))
            if isinstance(signed, SignedNotice):
                await self._attempt(notice, hook, signed)
            elif isinstance(signed, NoNotice) and signed.is_final:
                self._outbox.delivered(notice)
            else:
                await asyncio.sleep(_PAUSE_S)

    async def _attempt(self, notice: Notice, hook: HookConfig, signed: SignedNotice) -> None:
        self._publish(signed.spki)
        try:
            await deliver(hook.url, signed.fields, signed.content, self._contexts[notice.hook], hook.deadline_ms / 1000)
        except UndeliveredError as err:
            is_dead = self._outbox.failed(notice, str(err), self._clock.now_us(), random.random())  # noqa: S311  only spreads retries
            tell = _log.error if is_dead else _log.warning
            tell("notice not delivered", hook=notice.hook, record=notice.record, why=str(err), is_dead=is_dead)
        else:
            self._outbox.delivered(notice)
            _log.info("notice delivered", hook=notice.hook, record=notice.record)

    async def _ask(self, ask: NewsAfter | ComposeNotice) -> AnyNoticeReply:
        try:
            return (await self._link.ask(lambda number: NoticeCall(number, ask), _ASK_S)).reply
        except (RoomUnavailableError, TimeoutError):
            return NoNotice("the authority does not answer", is_final=False)

    def _publish(self, spki: bytes) -> None:
        """Keep the public key where an operator finds it for the receivers."""
        if spki != self._spki:
            lines = base64.encodebytes(spki).decode().replace("\n", "")
            body = "\n".join(lines[start : start + 64] for start in range(0, len(lines), 64))
            (self._config.state / KEY_FILE).write_text(f"-----BEGIN PUBLIC KEY-----\n{body}\n-----END PUBLIC KEY-----\n")
            self._spki = spki
