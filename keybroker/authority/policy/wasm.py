"""A thin host for policies that OPA compiled to WebAssembly (OPA's WebAssembly ABI, version 1.2 and later), on wasmtime.

The guest gets no host functions: what it imports traps, and a policy that needs one is refused when it is loaded.
Fuel bounds its work, an epoch deadline its time, a limit its memory. After any trap the instance is thrown away.
"""

from __future__ import annotations

import functools
import hashlib
import threading
import time

import msgspec
import wasmtime

from keybroker.errors import ConfigError

FUEL = 50_000_000  # traps after about 11 ms
MEMORY_BYTES = 512 * 1024 * 1024
MAX_ANSWER_BYTES = 256 * 1024
TICK_SECONDS = 0.05
DEADLINE_TICKS = 3
_TABLE_ELEMENTS = 100_000
_LOAD_FUEL = 200_000_000_000  # parsing the rules takes work in proportion to them, once
_LOAD_TICKS = 1_200
_FIRST_PAGES = 16
_PAGE_BYTES = 65_536
_FIRST_READ_BYTES = 2_048  # most answers are short
_ADDRESS = 0xFFFF_FFFF  # addresses are unsigned, and WebAssembly's integers are not
_ENTRYPOINT = "keybroker/decision"


class WasmTrapError(Exception):
    """The policy ran out of fuel, time or memory, or broke a rule of WebAssembly. There is no answer. Says which it was."""


class WasmAbortError(WasmTrapError):
    """The policy itself gave up: its rules contradict each other, or it wanted something of its host."""


class WasmModule:
    """One compiled policy. Compiling takes a moment; instances of it are made quickly.

    Attributes:
        sha256: of the file, lower-case hex.

    Raises:
        ConfigError: not a policy that OPA compiled, or one that calls its host.
    """

    def __init__(self, data: bytes, source: str) -> None:
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.engine = _engine()
        try:
            self.module = wasmtime.Module(self.engine, data)
        except wasmtime.WasmtimeError as err:
            msg = f"{source}: not a WebAssembly module; build it with `scripts/policy build`"
            raise ConfigError(msg) from err
        self._check(source)

    def _check(self, source: str) -> None:
        """Refuse a policy that needs anything from its host."""
        try:
            instance = WasmInstance(self, b"{}")
        except (WasmTrapError, KeyError, TypeError, ValueError, wasmtime.WasmtimeError) as err:
            msg = f"{source}: not a policy that OPA compiled; build it with `opa build -t wasm -e {_ENTRYPOINT}`"
            raise ConfigError(msg) from err
        if instance.abi < (1, 2):
            msg = f"{source}: compiled for an older ABI {instance.abi}; build it with a current OPA"
            raise ConfigError(msg)
        if instance.builtins:
            names = ", ".join(sorted(instance.builtins))
            msg = f"{source}: the policy calls {names}, which a decision must not depend on; write it without"
            raise ConfigError(msg)
        if _ENTRYPOINT not in instance.entrypoints:
            msg = f"{source}: has no entry point {_ENTRYPOINT}; build it with `opa build -t wasm -e {_ENTRYPOINT}`"
            raise ConfigError(msg)


class WasmInstance:
    """A policy with its rules loaded, ready to decide. For one thread.

    Args:
        data: the document under `data`, JSON.

    Raises:
        WasmTrapError: the rules do not fit.
    """

    def __init__(self, module: WasmModule, data: bytes) -> None:
        self._store = wasmtime.Store(module.engine)
        self._store.set_limits(memory_size=MEMORY_BYTES, memories=1, instances=1, tables=1, table_elements=_TABLE_ELEMENTS)
        self._arm(_LOAD_FUEL, _LOAD_TICKS)
        pages = [each.type.limits.min for each in module.module.imports if isinstance(each.type, wasmtime.MemoryType)]
        linker = wasmtime.Linker(module.engine)
        try:
            limits = wasmtime.Limits(max(_FIRST_PAGES, *pages), None)
            self._memory = wasmtime.Memory(self._store, wasmtime.MemoryType(limits))
            linker.define(self._store, "env", "memory", self._memory)
            linker.define_unknown_imports_as_traps(module.module)
            instance = linker.instantiate(self._store, module.module)
        except (wasmtime.WasmtimeError, wasmtime.Trap) as err:
            msg = "the policy cannot be instantiated"
            raise WasmTrapError(msg) from err
        self._exports = instance.exports(self._store)
        self._eval = self._function("opa_eval")
        self.abi = (self._global("opa_wasm_abi_version"), self._global("opa_wasm_abi_minor_version"))
        self.builtins: dict[str, int] = self._json_of(self._call(self._function("builtins")))
        self.entrypoints: dict[str, int] = self._json_of(self._call(self._function("entrypoints")))
        self._entrypoint = self.entrypoints.get(_ENTRYPOINT, 0)
        address = self._call(self._function("opa_malloc"), len(data))
        self._write(address, data)
        self._data = self._call(self._function("opa_json_parse"), address, len(data))
        if self._data == 0:
            msg = "the rules cannot be parsed by the policy"
            raise WasmTrapError(msg)
        self._heap = self._call(self._function("opa_heap_ptr_get"))

    def evaluate(self, request: bytes) -> bytes:
        """The answer of one decision: OPA's result set, JSON.

        Args:
            request: the document under `input`, JSON.

        Raises:
            WasmTrapError: no answer; the instance must not be used again. WasmAbortError, if that is the policy's own doing.
        """
        self._arm(FUEL, DEADLINE_TICKS)
        self._write(self._heap, request)
        end = self._heap + len(request)
        return self._text_at(self._call(self._eval, 0, self._entrypoint, self._data, self._heap, len(request), end, 0))

    def _arm(self, fuel: int, ticks: int) -> None:
        self._store.set_fuel(fuel)
        self._store.set_epoch_deadline(ticks)

    def _function(self, name: str) -> wasmtime.Func:
        function = self._exports[name]
        if not isinstance(function, wasmtime.Func):
            raise KeyError(name)
        return function

    def _global(self, name: str) -> int:
        value = self._exports[name]
        if not isinstance(value, wasmtime.Global):
            raise KeyError(name)
        return int(value.value(self._store))

    def _call(self, function: wasmtime.Func, *arguments: int) -> int:
        try:
            return int(function(self._store, *arguments))
        except (wasmtime.WasmtimeError, wasmtime.Trap) as err:
            code = err.trap_code if isinstance(err, wasmtime.Trap) else None
            if code is not None:
                raise WasmTrapError(code.name.lower().replace("_", " ")) from err
            if self._memory.data_len(self._store) > MEMORY_BYTES // 2:  # OPA's allocator gives up where it cannot grow
                msg = "out of memory"
                raise WasmTrapError(msg) from err
            msg = "the policy gave up"
            raise WasmAbortError(msg) from err

    def _write(self, address: int, data: bytes) -> None:
        start = address & _ADDRESS
        missing = start + len(data) - self._memory.data_len(self._store)
        try:
            if missing > 0:
                self._memory.grow(self._store, missing // _PAGE_BYTES + 1)
            self._memory.write(self._store, data, start)
        except (wasmtime.WasmtimeError, IndexError) as err:
            msg = "out of memory"
            raise WasmTrapError(msg) from err

    def _text_at(self, address: int) -> bytes:
        """The text that ends with a NUL at an address. Read in growing pieces, because most answers are short."""
        start = address & _ADDRESS
        size = _FIRST_READ_BYTES
        while True:
            piece = self._memory.read(self._store, start, start + size)
            end = piece.find(b"\0")
            if end >= 0:
                return bytes(piece[:end])
            if size > MAX_ANSWER_BYTES or len(piece) < size:
                msg = "the answer is too large"
                raise WasmTrapError(msg)
            size = min(size * 8, MAX_ANSWER_BYTES + 1)

    def _json_of(self, value: int) -> dict[str, int]:
        return msgspec.json.decode(self._text_at(self._call(self._function("opa_json_dump"), value)), type=dict[str, int])


@functools.cache
def _engine() -> wasmtime.Engine:
    """One engine for the process, and the thread that lets time pass for it."""
    config = wasmtime.Config()
    config.consume_fuel = True
    config.epoch_interruption = True
    engine = wasmtime.Engine(config)
    threading.Thread(target=_tick, args=(engine,), name="policy-deadline", daemon=True).start()
    return engine


def _tick(engine: wasmtime.Engine) -> None:
    while True:
        time.sleep(TICK_SECONDS)
        engine.increment_epoch()
