"""Logs: structured, constant messages with fields, on stderr. Never payload, digest, PIN or certificate bytes.

The log is for operators. It is not the audit record.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

from keybroker.config import TelemetryConfig


def configure(room: str, config: TelemetryConfig) -> None:
    """Set up logging for this process, the standard library's included. `room` is on every line."""
    processors: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: Any = structlog.dev.ConsoleRenderer() if config.log_format == "console" else structlog.processors.JSONRenderer()
    level = logging.getLevelNamesMapping().get(config.log_level.upper(), logging.INFO)
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(room=room)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=processors, processors=[_without_internals, renderer]))
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[handler], force=True)


def quiet() -> None:
    """For a program that answers on standard output and says itself what went wrong: nothing but the worst is logged, on stderr."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL), logger_factory=structlog.PrintLoggerFactory(sys.stderr)
    )


def logger() -> structlog.typing.FilteringBoundLogger:
    """A logger for one module."""
    log: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return log


def _without_internals(logger: Any, name: str, event: Any) -> Any:
    return structlog.stdlib.ProcessorFormatter.remove_processors_meta(logger, name, event)
