"""A YAML file as plain values, with the line of each part, so that an error can name file and line.

Strict on purpose: duplicate keys, anchors, aliases, merge keys and tags are refused; dates, times and `yes`/`no` stay text, because a
file that decides trust must not mean something other than what it looks like.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from keybroker.errors import ConfigError

MAX_FILE_BYTES = 64 * 1024 * 1024
MAX_DEPTH = 64

T = TypeVar("T")

_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_MSGSPEC_PATH = re.compile(r"(?P<what>.*?)(?: - at `(?P<path>\$.*)`)?", re.DOTALL)
_STARRED = {"while scanning an alias"}  # what libyaml is doing when it meets an unquoted pattern
_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(.+)`")
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]")

Step = str | int


@dataclass(frozen=True, slots=True)
class YamlDocument:
    """One parsed file.

    Attributes:
        path: where it came from.
        value: dicts, lists, strings, integers, booleans and None.
        lines: for each place in the value, the line (from 1) on which it starts.
    """

    path: Path
    value: Any
    lines: dict[tuple[Step, ...], int] = field(repr=False)

    @classmethod
    def load(cls, path: Path) -> YamlDocument:
        """Read and parse a file.

        Raises:
            ConfigError: unreadable, too large, not YAML, or outside the strict subset. Names file and line.
        """
        try:
            with path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except OSError as err:
            msg = f"{path}: cannot be read: {err.strerror}"
            raise ConfigError(msg) from err
        if len(data) > MAX_FILE_BYTES:
            msg = f"{path}: larger than {MAX_FILE_BYTES} bytes"
            raise ConfigError(msg)
        return cls.parse(path, data)

    @classmethod
    def parse(cls, path: Path, data: bytes) -> YamlDocument:
        """Parse bytes that were read from `path`.

        Raises:
            ConfigError: as for `load`.
        """
        reading = _Reading(path, data)
        try:
            data.decode()  # the parser would take UTF-16 too
            value = reading.document()
        except yaml.MarkedYAMLError as err:
            mark = err.problem_mark
            where = f"{path}:{mark.line + 1}" if mark else str(path)
            hint = "; text that begins with * goes in quotes" if err.context in _STARRED else ""
            msg = f"{where}: not YAML: {err.problem or err.context}{hint}"
            raise ConfigError(msg) from err
        except (yaml.YAMLError, UnicodeError) as err:
            msg = f"{path}: not YAML in UTF-8, or with control characters in it"
            raise ConfigError(msg) from err
        return cls(path, value, reading.lines)

    def where(self, place: tuple[Step, ...] = ()) -> str:
        """`file:line` of a place, or of the nearest place around it."""
        while place and place not in self.lines:
            place = place[:-1]
        return f"{self.path}:{self.lines.get(place, 1)}"

    def convert(self, type_: type[T], *, dec_hook: Any = None) -> T:
        """The value as a typed one.

        Raises:
            ConfigError: names file, line and field.
        """
        try:
            return msgspec.convert(self.value, type_, dec_hook=dec_hook)
        except msgspec.ValidationError as err:
            match = _MSGSPEC_PATH.fullmatch(str(err))
            what, path = (match["what"], match["path"] or "$") if match else (str(err), "$")
            unknown = _UNKNOWN_FIELD.fullmatch(what)  # on its own line, not on that of the object around it
            place = (*_steps(path), *((unknown[1],) if unknown else ()))
            msg = f"{self.where(place)}: {path.lstrip('$.') or 'the file'}: {what[0].lower()}{what[1:]}"
            raise ConfigError(msg) from err


def _steps(path: str) -> tuple[Step, ...]:
    """The steps of msgspec's `$.grants[0].workloads`; stops where msgspec does not say which key it was."""
    steps: list[Step] = []
    for name, index in _STEP.findall(path):
        if index == "...":
            break
        steps.append(name or int(index))
    return tuple(steps)


class _Reading:
    """One pass over the parser's events. YAML nodes and objects are never made: that is where surprises live, and most of the time goes."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._path = path
        self._events: Iterator[Any] = yaml.parse(data, Loader=yaml.CSafeLoader)
        self.lines: dict[tuple[Step, ...], int] = {}

    def document(self) -> Any:
        """The only document; None if there is none."""
        next(self._events)
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return None
        value = self._value(next(self._events), (), 0)
        next(self._events)
        more = next(self._events)
        if not isinstance(more, yaml.StreamEndEvent):
            raise self._fault(more, "not YAML: a file holds one document")
        return value

    def _value(self, event: Any, place: tuple[Step, ...], key_line: int) -> Any:
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise self._fault(event, "anchors and aliases (&, *) hide what a file says; text that begins with one goes in quotes")
        if event.tag is not None:
            raise self._fault(event, "tags (!) are not used here; text that begins with ! goes in quotes")
        if len(place) > MAX_DEPTH:
            raise self._fault(event, f"nested more than {MAX_DEPTH} levels deep")
        self.lines[place] = key_line or event.start_mark.line + 1
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(place)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(place)
        return _scalar(event)

    def _mapping(self, place: tuple[Step, ...]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        while not isinstance(key := next(self._events), yaml.MappingEndEvent):
            is_text = isinstance(key, yaml.ScalarEvent) and key.anchor is None and key.tag is None
            if not is_text or (key.value == "<<" and not key.style):
                raise self._fault(key, "a key must be plain text")
            if key.value in result:
                raise self._fault(key, f"{key.value!r} is given twice")
            result[key.value] = self._value(next(self._events), (*place, key.value), key.start_mark.line + 1)
        return result

    def _sequence(self, place: tuple[Step, ...]) -> list[Any]:
        result: list[Any] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            result.append(self._value(event, (*place, len(result)), 0))
        return result

    def _fault(self, event: Any, text: str) -> ConfigError:
        return ConfigError(f"{self._path}:{event.start_mark.line + 1}: {text}")


def _scalar(event: yaml.ScalarEvent) -> Any:
    text = str(event.value)
    if event.style in {"'", '"', "|", ">"}:
        return text
    if text in {"true", "false"}:
        return text == "true"
    if text in {"", "null", "~"}:
        return None
    return int(text) if _INTEGER.fullmatch(text) else text
