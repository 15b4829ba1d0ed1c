"""What the readers of checkpoints have in common: checks, and JSON."""

import json
import os
from pathlib import Path
from typing import Any

from flashjax.atomic_folder import CheckpointError


def expect(ok: bool, where: str, what: str, expected: object, got: object) -> None:
    """Raises CheckpointError unless `ok`."""
    if not ok:
        raise CheckpointError(f"{where}: {what}: expected {expected}, got {got!s:.80}")


def kind(value: object) -> str:
    """What JSON calls the type of a value."""
    return {dict: "object", list: "array", str: "string", type(None): "nothing"}.get(
        type(value), type(value).__name__
    )


def parse_json(text: str, where: str) -> dict[str, Any]:
    """Parses a JSON object in which no key occurs twice.

    Raises:
      CheckpointError: the text is something else.
    """
    try:
        content = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: expected JSON, got {error}: {text[:40]!r}"
        ) from error
    expect(isinstance(content, dict), where, "content", "object", kind(content))
    return content


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a file with a JSON object in which no key occurs twice.

    Raises:
      CheckpointError: the file cannot be read or holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"{path}: expected a readable file: {error.strerror}"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: expected JSON, got {error}") from error
    return parse_json(text, str(path))


def _unique(pairs: list[tuple[str, object]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"the key {name!r:.80} twice")
        content[name] = value
    return content
