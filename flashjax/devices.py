"""What devices are called."""

import os
import platform
from pathlib import Path
from typing import Any


def cpu_count() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def device_name(device: Any) -> str:
    """A device's platform and kind; for a CPU the name the system has for it."""
    kind = device.device_kind
    if device.platform == "cpu":
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
        except OSError:
            lines = []
        names = [li.split(":", 1)[1].strip() for li in lines if "model name" in li]
        kind = names[0] if names else platform.processor() or platform.machine()
    return f"{device.platform} ({kind})"
