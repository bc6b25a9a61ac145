"""The requests of a batch file."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

MAX_LINES = 50_000
MAX_ERRORS = 20  # that are told


@dataclasses.dataclass(frozen=True)
class BatchLine:
    """One request of a batch."""

    custom_id: str
    body: Mapping[str, Any]


def parse_lines(data: bytes, endpoint: str) -> tuple[list[BatchLine], list[tuple[int, str]]]:
    """Read a batch file.

    Args:
        data: One JSON object a line: custom_id, method, url, body.
        endpoint: What each url must be.

    Returns:
        The requests, and what is wrong: (line, message).
    """
    lines: list[BatchLine] = []
    errors: list[tuple[int, str]] = []
    seen: set[str] = set()
    for number, text in enumerate(data.split(b"\n"), 1):
        if not text.strip():
            continue
        if len(lines) >= MAX_LINES or len(errors) >= MAX_ERRORS:
            errors.append((number, f"over {MAX_LINES:,} requests, or too many errors"))
            break
        row = json.loads(text)  # an upload has JSON objects only
        identity, body = row.get("custom_id"), row.get("body")
        if not isinstance(identity, str) or not 0 < len(identity) <= 512:
            errors.append((number, "custom_id: a text of 1 to 512 characters is wanted"))
        elif identity in seen:
            errors.append((number, f"custom_id: {identity[:50]!r} comes twice"))
        elif row.get("method") != "POST" or row.get("url") != endpoint:
            errors.append((number, f"method and url: POST and {endpoint} are wanted"))
        elif not isinstance(body, dict):
            errors.append((number, "body: an object is wanted"))
        else:
            seen.add(identity)
            lines.append(BatchLine(identity, body))
    return lines, errors
