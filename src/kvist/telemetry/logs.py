"""Logs of a server: lines for people, or one JSON object a line. Knows `logging`; must not know what is logged."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any, Final

from kvist.telemetry.spans import current_ids

LEVELS: Final = ("critical", "error", "warning", "info", "debug")
FORMATS: Final = ("text", "json")
TEXT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"

_OWN: Final = {*logging.makeLogRecord({}).__dict__, "message", "asctime", "color_message"}
"""What every record has; whatever else is on one, its logger was given as ``extra``."""


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON.

    ``time`` (UTC), ``level``, ``logger``, ``message``; ``fields`` with what the logger was given as ``extra``;
    ``exception`` with the traceback; ``trace_id`` and ``span_id`` where a span is recorded.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        document: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields = {name: value for name, value in record.__dict__.items() if name not in _OWN}
        if fields:
            document["fields"] = fields
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        ids = current_ids()
        if ids is not None:
            document["trace_id"], document["span_id"] = ids
        return json.dumps(document, ensure_ascii=False, default=str)


def start_logging(level: str, form: str) -> None:
    """Send what the process logs to stderr.

    Args:
        level: the least that is told, one of `LEVELS`.
        form: one of `FORMATS`.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
