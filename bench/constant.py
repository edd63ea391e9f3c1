"""An authority that decides nothing: `python -m bench.constant SOCKET` answers each ask to sign with the same bytes, at once.

So the frontend before it shows what the way to a signature costs where the signature costs nothing.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import uvloop

from keybroker.model.call import (
    MAX_CALL_BYTES,
    Answer,
    AnyReply,
    BatchReply,
    Call,
    Health,
    HealthReply,
    Metrics,
    MetricsReply,
    SignBatch,
    Signed,
)
from keybroker.wire import Channel, Listener

SIGNED = Signed(
    signature=bytes(range(71)),
    key="orders",
    version=1,
    algorithm="ES256",
    use="01ARZ3NDEKTSV4RRFFQ69G5FAV",
    log="example.org/broker-1",
    intent=123_456,
    outcome=123_457,
)
_METRICS = b"# HELP keybroker_constant_up An authority that decides nothing\n# TYPE keybroker_constant_up gauge\nkeybroker_constant_up 1\n"


def _reply(call: Call) -> AnyReply:
    match call.ask:
        case Health():
            return HealthReply(ready=True, parts={})
        case Metrics():
            return MetricsReply(_METRICS)
        case SignBatch(items=items):
            return BatchReply((SIGNED,) * len(items))
        case _:
            return SIGNED


async def _serve(path: Path) -> None:
    def on_call(channel: Channel[Call, Answer], call: Call) -> None:
        channel.send(Answer(call.id, _reply(call)))

    listener = Listener[Call, Answer](path, os.getuid(), Call, MAX_CALL_BYTES, on_call, lambda _channel, _why: None)
    async with listener.serving():
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve(Path(sys.argv[1])))
