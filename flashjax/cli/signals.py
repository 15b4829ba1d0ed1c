"""Signals that end a command: an interrupt (Ctrl-C) and a request to terminate.

Both become exceptions, so that a command cleans up. An exception that is raised in a
callback from C++, such as JAX's at every garbage collection, is printed and dropped,
and the command would run on. So one that is lost before it got out of the command is
silent and raises its signal again.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

# Enough to leave the callback that the exception was lost in.
_AGAIN_SECONDS = 0.05


class _Ending(BaseException):
    """What both exceptions have."""

    number: signal.Signals
    # Whether a command is running that has to end.
    wanted: Callable[[], bool] = staticmethod(lambda: False)

    def __del__(self) -> None:
        self.raise_again()

    def raise_again(self) -> None:
        if self.wanted():
            again = threading.Timer(_AGAIN_SECONDS, signal.raise_signal, (self.number,))
            again.daemon = True
            again.start()


class _Interrupt(_Ending, KeyboardInterrupt):
    number = signal.SIGINT


# No SystemExit: where C prints an exception, that one ends the process then and there.
class _Terminate(_Ending):
    number = signal.SIGTERM


@contextlib.contextmanager
def ending_signals() -> Iterator[None]:
    """Ends what is done inside at SIGINT, by KeyboardInterrupt, and at SIGTERM.

    A signal that this process was started to ignore stays ignored.

    Raises:
      SystemExit: with the code 143, at SIGTERM.
    """
    running = True

    def handler(kind: type[_Ending]) -> Callable[[int, Any], None]:
        def end(number: int, frame: FrameType | None) -> None:
            error = kind()
            error.wanted = lambda: running
            raise error

        return end

    def show_unraisable(lost: Any) -> None:
        if not isinstance(lost.exc_value, _Ending):
            unraisable(lost)

    def show_printed(
        kind: type[BaseException], error: BaseException, where: TracebackType | None
    ) -> None:
        if isinstance(error, _Ending):
            error.raise_again()  # sys.last_exc keeps it alive
        else:
            printed(kind, error, where)

    handlers = {
        signal.SIGINT: handler(_Interrupt),
        signal.SIGTERM: handler(_Terminate),
    }
    before = {number: signal.getsignal(number) for number in handlers}
    unraisable, printed = sys.unraisablehook, sys.excepthook
    try:
        sys.unraisablehook, sys.excepthook = show_unraisable, show_printed
        for number, end in handlers.items():
            if before[number] != signal.SIG_IGN:
                signal.signal(number, end)
        yield
    except _Terminate:
        sys.exit(128 + signal.SIGTERM)
    finally:
        running = False
        sys.unraisablehook, sys.excepthook = unraisable, printed
        for number, earlier in before.items():
            signal.signal(number, earlier)
