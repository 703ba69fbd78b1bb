"""Structured log lines on stderr: JSON for machines, text on a terminal, never content."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from datetime import UTC, datetime
from typing import Any

FIELDS = "fields"  # the attribute of a record that holds structured fields


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON; control characters are escaped, so that a line stays a line."""
        when = datetime.fromtimestamp(record.created, UTC)
        entry: dict[str, Any] = {
            "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            entry["exception"] = _exception(record)
        return json.dumps(entry, default=str)


class TextFormatter(logging.Formatter):
    """A line that a person reads."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, message and fields as key=value."""
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = " ".join(f"{k}={_brief(v)}" for k, v in getattr(record, FIELDS, {}).items())
        line = f"{clock} {record.levelname.lower():<7} {record.getMessage()} {fields}".rstrip()
        return f"{line}\n{_exception(record)}" if record.exc_info else line


def set_up(level: str, style: str, text: logging.Formatter | None = None) -> None:
    """Send the logs of this process to stderr. `style` is json, text or auto; `text` formats lines
    for people where TextFormatter is not to."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter((text or TextFormatter()) if is_text(style) else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def is_text(style: str) -> bool:
    """Whether a style means lines for people, here and now."""
    return style == "text" or (style == "auto" and sys.stderr.isatty())


def _brief(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _exception(record: logging.LogRecord) -> str:
    """The traceback without the exception's own text, which could quote a request."""
    assert record.exc_info
    kind, _, trace = record.exc_info
    frames = "".join(traceback.format_tb(trace))
    return f"{frames}{kind.__name__ if kind else ''}"
