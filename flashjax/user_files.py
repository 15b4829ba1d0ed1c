"""Files of the user's, and writing JSON as a whole."""

import json
import os
from pathlib import Path
from typing import Any


def user_cache() -> Path:
    """The folder of what may be deleted at any time; it need not exist."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "flashjax")


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file as a whole or not at all; one process at a time.

    Raises:
      OSError: it cannot be written; what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
