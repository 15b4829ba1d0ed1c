"""The most memory that is in use on devices while something runs."""

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import jax

_SECONDS = 2e-4  # XLA gives temporaries back when all is queued, not when it has run


class MemoryWatch:
    """Reads again and again how much is in use while a `with` block runs.

    JAX's own peak is that of the process, making or loading the weights included.

    Attributes:
      before: bytes in use before the block on the device that had most; None where
        devices do not count.
      peak: the same at its most.
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None) -> None:
        """Watches JAX's first device unless told otherwise."""
        self.before: int | None = None
        self.peak: int | None = None
        self._devices = jax.devices()[:1] if devices is None else devices
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._read()
        self.before = self.peak
        if self.peak is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_SECONDS):
            self._read()

    def _read(self) -> None:
        for device in self._devices:
            used = (device.memory_stats() or {}).get("bytes_in_use")
            if used is not None:
                self.peak = max(self.peak or 0, used)


def memory_bytes(result: dict[str, Any]) -> int:
    """As measured; where it was not, as predicted."""
    return result.get("request_peak_bytes") or result["predicted_bytes"]
