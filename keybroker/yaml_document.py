"""A YAML file as plain values, with the line of each part, so that an error can name file and line.

Strict on purpose: duplicate keys, aliases and tags are refused; dates, times and `yes`/`no` stay text, because a file that
decides trust must not mean something other than what it looks like.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from keybroker.errors import ConfigError

MAX_FILE_BYTES = 64 * 1024 * 1024

T = TypeVar("T")

_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_MSGSPEC_PATH = re.compile(r"(?P<what>.*?)(?: - at `(?P<path>\$.*)`)?", re.DOTALL)
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
        lines: dict[tuple[Step, ...], int] = {}
        try:
            node = yaml.compose(data, Loader=yaml.CSafeLoader)
            value = None if node is None else _build(path, node, (), lines)
        except yaml.MarkedYAMLError as err:
            mark = err.problem_mark
            where = f"{path}:{mark.line + 1}" if mark else str(path)
            msg = f"{where}: not YAML: {err.problem or err.context}"
            raise ConfigError(msg) from err
        except (yaml.YAMLError, UnicodeError, RecursionError) as err:
            msg = f"{path}: not YAML: {type(err).__name__}"
            raise ConfigError(msg) from err
        return cls(path, value, lines)

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
            msg = f"{self.where(_steps(path))}: {path.lstrip('$.') or 'the file'}: {what[0].lower()}{what[1:]}"
            raise ConfigError(msg) from err


def _steps(path: str) -> tuple[Step, ...]:
    """The steps of msgspec's `$.grants[0].workloads`; stops where msgspec does not say which key it was."""
    steps: list[Step] = []
    for name, index in _STEP.findall(path):
        if index == "...":
            break
        steps.append(name or int(index))
    return tuple(steps)


def _build(path: Path, node: yaml.Node, place: tuple[Step, ...], lines: dict[tuple[Step, ...], int], key_line: int = 0) -> Any:
    line = key_line or node.start_mark.line + 1
    if place in lines:
        msg = f"{path}:{line}: {place[-1]!r} is given twice"
        raise ConfigError(msg)
    lines[place] = line
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key, child in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                msg = f"{path}:{key.start_mark.line + 1}: a key must be plain text"
                raise ConfigError(msg)
            result[key.value] = _build(path, child, (*place, key.value), lines, key.start_mark.line + 1)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_build(path, child, (*place, index), lines) for index, child in enumerate(node.value)]
    return _scalar(node)


def _scalar(node: yaml.Node) -> Any:
    text = str(node.value)
    if getattr(node, "style", None) in {"'", '"', "|", ">"}:
        return text
    if text in {"true", "false"}:
        return text == "true"
    if text in {"", "null", "~"}:
        return None
    return int(text) if _INTEGER.fullmatch(text) else text
