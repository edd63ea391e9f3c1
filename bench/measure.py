"""Measures everything in short rounds, one thing after another, so that a noisy host disturbs all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bench import generator, served
from bench.bare import Bare, Job
from bench.generator import Order
from bench.scenarios import ALONE, MANY, MESSAGE, ONE, SCENARIOS, Scenario
from bench.served import Served

_ANSWER_BODY = (
    b'{"signature":"' + b"A" * 96 + b'","key":"orders","version":1,"algorithm":"ES256","use":"01ARZ3NDEKTSV4RRFFQ69G5FAV",'
    b'"records":{"log":"example.org/broker-1","intent":123456,"outcome":123457}}'
)
_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\ncontent-type: application/json\r\n\r\n%b" % (len(_ANSWER_BODY), _ANSWER_BODY)


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One scenario in one round. Times are microseconds.

    Attributes:
        rate: signatures per second.
        p50: of one request, which for a batch is all its signatures.
        p99: as p50.
        mean: as p50.
        generator: CPU time of the load generator for one signature.
        cpu: CPU time for one signature, by room.
        stages: elapsed time of one use, by stage, as the rooms themselves measure it.
    """

    rate: float
    p50: float
    p99: float
    mean: float
    generator: float = 0.0
    cpu: dict[str, float] = {}
    stages: dict[str, float] = {}


class Round(msgspec.Struct, frozen=True):
    """Everything once. Keys are algorithms for `bare`, names of scenarios elsewhere; `trivial` is the generator on its own."""

    bare: dict[str, Sample]
    alone: dict[str, Sample]
    broker: dict[str, Sample]
    trivial: dict[str, Sample]


@dataclass(frozen=True, slots=True)
class Pace:
    """How long everything takes. Seconds."""

    rounds: int = 3
    seconds: float = 3.0
    warm_up: float = 0.5


QUICK = Pace(rounds=1, seconds=0.4, warm_up=0.1)


class Bench:
    """Everything that is measured, running.

    Args:
        world: directory of the development world.
        say: told what is measured next.
    """

    def __init__(self, world: Path, bare: Bare, alone: Served, broker: Served, pace: Pace, say: Callable[[str], None]) -> None:
        self._world = world
        self._bare = bare
        self._alone = alone
        self._broker = broker
        self._pace = pace
        self._say = say

    @classmethod
    @contextmanager
    def running(cls, directory: Path, pace: Pace, say: Callable[[str], None]) -> Iterator[Bench]:
        """A fresh world in a directory that does not exist yet, served while the block runs.

        Raises:
            GeneratorError: something does not get ready.
        """
        say("building the load generator")
        generator.build()
        say("making and serving a world")
        config = served.make_world(directory)
        with ExitStack() as stack:
            bare = stack.enter_context(Bare(config))  # first, because a login may disturb another one
            broker = stack.enter_context(served.broker(config))
            alone = stack.enter_context(served.frontend_alone(config))
            yield cls(directory, bare, alone, broker, pace, say)

    def rounds(self) -> Iterator[Round]:
        """Measure all rounds."""
        for number in range(1, self._pace.rounds + 1):
            result = Round({}, {}, {}, {})
            for scenario in SCENARIOS:
                self._measure(scenario, number, result)
            yield result

    def _measure(self, scenario: Scenario, number: int, result: Round) -> None:
        """One scenario on the broker, next to what it is compared to."""
        name = scenario.name
        if scenario.algorithm not in result.bare:
            self._tell(number, f"bare PKCS#11: {scenario.algorithm}")
            result.bare[scenario.algorithm] = self._of_bare(scenario)
        if scenario in {ONE, MANY}:
            self._tell(number, f"load generator: {name}")
            result.trivial[name] = self._of_generator(scenario)
        if scenario in ALONE:
            self._tell(number, f"frontend alone: {name}")
            result.alone[name] = self._of_served(self._alone, scenario, number)
        self._tell(number, f"broker: {name}")
        result.broker[name] = self._of_served(self._broker, scenario, number)

    def _tell(self, number: int, what: str) -> None:
        self._say(f"round {number} of {self._pace.rounds}, {what}")

    def _of_bare(self, scenario: Scenario) -> Sample:
        done = self._bare.sign(Job(scenario.key, scenario.algorithm, MESSAGE, self._pace.seconds))
        latencies = done.latencies
        return Sample(
            rate=1e6 / done.us,
            p50=latencies.quantile_us(0.5),
            p99=latencies.quantile_us(0.99),
            mean=done.us,
            cpu={"bare": done.cpu / done.signatures * 1e6},
        )

    def _of_generator(self, scenario: Scenario) -> Sample:
        order = self._order(scenario, served.free_address(), 1)
        broker = self._world / "svids" / "broker.pem"
        with generator.responder(msgspec.structs.replace(order, svid=broker, answer=_ANSWER)):
            return _sample(generator.run(order, _nothing, _nothing), scenario, {}, {})

    def _of_served(self, served_: Served, scenario: Scenario, number: int) -> Sample:
        stages, used = [served_.stages()], [served_.cpu()]

        def start() -> None:
            used[0] = served_.cpu()

        def end() -> None:
            used.append(served_.cpu())

        load = generator.run(self._order(scenario, served_.address, number), start, end)
        stages.append(served_.stages())
        cpu = {room: seconds - used[0][room] for room, seconds in used[1].items()}
        return _sample(load, scenario, cpu, _between(*stages))

    def _order(self, scenario: Scenario, address: str, number: int) -> Order:
        return Order(
            address=address,
            svid=self._world / "svids" / "payments-api.pem",
            bundle=self._world / "bundle.pem",
            requests=scenario.requests(number),
            connections=scenario.connections,
            signatures=scenario.batch,
            warm_up=self._pace.warm_up,
            seconds=self._pace.seconds,
        )


def _sample(load: generator.Load, scenario: Scenario, cpu: dict[str, float], stages: dict[str, float]) -> Sample:
    signatures = load.answers * scenario.batch
    return Sample(
        rate=signatures / load.seconds,
        p50=load.latencies.quantile_us(0.5),
        p99=load.latencies.quantile_us(0.99),
        mean=load.mean_us,
        generator=load.cpu_us / scenario.batch,
        cpu={room: seconds / signatures * 1e6 for room, seconds in cpu.items()},
        stages=stages,
    )


def _between(before: dict[str, tuple[float, float]], after: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Microseconds per use of each stage that was passed in between."""
    found: dict[str, float] = {}
    for stage, (total, count) in after.items():
        total_before, count_before = before.get(stage, (0.0, 0.0))
        if count > count_before:
            found[stage] = (total - total_before) / (count - count_before) * 1e6
    return found


def _nothing() -> None:
    pass
