"""The way to the authority: one question, one answer, within a time and within a number of questions under way."""

from __future__ import annotations

from typing import TypeVar

from keybroker.errors import OverloadedError, RoomUnavailableError
from keybroker.frontend.exchange import Exchange
from keybroker.frontend.problems import ProblemError
from keybroker.model.call import (
    Answer,
    AnyAsk,
    Call,
    HandshakesFailed,
    Health,
    HealthReply,
    Metrics,
    MetricsReply,
    Noted,
    Problem,
    Reply,
)
from keybroker.telemetry import logger
from keybroker.wire import Link

MAX_IN_FLIGHT = 1_024
ASK_SECONDS = 12.0  # longer than the authority itself makes anyone wait, so that its own answer arrives
BATCH_SECONDS = 30.0
_OPERATIONS_SECONDS = 2.0

R = TypeVar("R", bound=Reply)

_log = logger()


class AuthorityLink:
    """Asks the authority on behalf of a caller.

    Args:
        link: started and stopped by its owner.
        max_in_flight: questions without an answer; beyond that, callers are turned away at once.
    """

    def __init__(self, link: Link[Call, Answer], max_in_flight: int = MAX_IN_FLIGHT) -> None:
        self._link = link
        self._max_in_flight = max_in_flight

    @property
    def is_up(self) -> bool:
        """Whether the authority is connected."""
        return self._link.is_up

    async def ask(self, exchange: Exchange, ask: AnyAsk, expected: type[R], seconds: float = ASK_SECONDS) -> R:
        """The authority's answer, of the one type that answers this ask.

        Raises:
            ProblemError: the authority refused.
            OverloadedError: too many are waiting, the authority is away, or it did not answer in time.
        """
        if self._link.in_flight >= self._max_in_flight:
            raise OverloadedError("Too many requests are under way.", retry_after=1)

        def build(number: int) -> Call:
            client = exchange.client
            return Call(number, ask, client.chain, client.address, exchange.span.traceparent, exchange.request_id)

        try:
            answer = await self._link.ask(build, seconds)
        except RoomUnavailableError as err:
            raise OverloadedError("The broker is restarting.", retry_after=1) from err
        except TimeoutError as err:
            _log.error("no answer from the authority", request_id=exchange.request_id)
            raise OverloadedError("The broker did not answer in time.", retry_after=1) from err
        return _expected(answer.reply, expected)

    async def health(self) -> HealthReply:
        """Whether the broker can sign; asked on behalf of nobody.

        Raises:
            RoomUnavailableError, TimeoutError: the authority does not say.
        """
        answer = await self._link.ask(lambda number: Call(number, Health()), _OPERATIONS_SECONDS)
        return _expected(answer.reply, HealthReply)

    async def metrics_text(self) -> bytes:
        """The authority's metrics; asked on behalf of nobody.

        Raises:
            RoomUnavailableError, TimeoutError: the authority does not say.
        """
        answer = await self._link.ask(lambda number: Call(number, Metrics()), _OPERATIONS_SECONDS)
        return _expected(answer.reply, MetricsReply).text

    async def handshakes_failed(self, counts: tuple[tuple[str, str, int], ...]) -> None:
        """Tell the authority of handshakes that failed; on behalf of nobody.

        Raises:
            RoomUnavailableError, TimeoutError: it does not hear.
        """
        answer = await self._link.ask(lambda number: Call(number, HandshakesFailed(counts)), _OPERATIONS_SECONDS)
        _expected(answer.reply, Noted)


def _expected(reply: Reply, expected: type[R]) -> R:
    if isinstance(reply, expected):
        return reply
    if isinstance(reply, Problem):
        raise ProblemError(reply)
    # Only a bug in one of our rooms comes here: an answer to another question must never be taken for this one's.
    _log.error("the authority answered another question", got=type(reply).__name__, expected=expected.__name__)
    raise OverloadedError("The request could not be finished.", retry_after=1)
