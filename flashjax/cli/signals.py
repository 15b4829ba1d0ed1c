"""Signals that end a command: an interrupt (Ctrl-C) and a request to terminate.

Both become exceptions, so that a command cleans up. An exception that is raised in a
callback from C++, such as JAX's at every garbage collection, is printed and dropped,
and the command would run on. So one that is lost before it got out of the command is
silent and comes again. A timer of the system brings it: a thread takes locks, and
__del__ may run anywhere. A callback may also make another error of it, as __eq__ in
JAX's caches; so whoever reports errors asks for arrived() first.
"""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

# Enough to leave the callback that the exception was lost in.
_AGAIN_SECONDS = 0.05

# The signal that came last inside of ending_signals().
_arrived: int | None = None


def arrived() -> int | None:
    """The signal that is to end what is done, None if none has come.

    What was to raise it again is stopped.
    """
    if _arrived is not None:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return _arrived


class _Ending(BaseException):
    """What both exceptions have."""

    def __init__(self, lost: Callable[[type["_Ending"]], None]) -> None:
        self.lost: Callable[[type[_Ending]], None] | None = lost

    def __del__(self) -> None:
        self.raise_again()

    def raise_again(self) -> None:
        lost, self.lost = self.lost, None
        if lost is not None:
            lost(type(self))


class _Interrupt(_Ending, KeyboardInterrupt):
    pass


# No SystemExit: where C prints an exception, that one ends the process then and there.
class _Terminate(_Ending):
    pass


@contextlib.contextmanager
def ending_signals() -> Iterator[None]:
    """Ends what is done inside at SIGINT, by KeyboardInterrupt, and at SIGTERM.

    A signal that this process was started to ignore stays ignored.

    Raises:
      SystemExit: with the code 143, at SIGTERM.
    """
    global _arrived
    _arrived, running = None, True
    lost: type[_Ending] = _Interrupt

    def raise_again(kind: type[_Ending]) -> None:
        nonlocal lost
        if running and not sys.is_finalizing():
            lost = kind
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_SECONDS)

    def end(number: int, frame: FrameType | None) -> None:
        global _arrived
        signal.setitimer(signal.ITIMER_REAL, 0)
        if number in kinds:
            _arrived = number
        # No name here for it, which would keep it alive until a garbage collection.
        raise kinds.get(number, lost)(raise_again)

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

    kinds: dict[int, type[_Ending]]
    kinds = {signal.SIGINT: _Interrupt, signal.SIGTERM: _Terminate}
    numbers = (*kinds, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in numbers}
    unraisable, printed = sys.unraisablehook, sys.excepthook
    try:
        sys.unraisablehook, sys.excepthook = show_unraisable, show_printed
        for number in numbers:
            if before[number] != signal.SIG_IGN or number == signal.SIGALRM:
                signal.signal(number, end)
        yield
    except _Terminate:
        sys.exit(128 + signal.SIGTERM)
    finally:
        _arrived, running = None, False
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook, sys.excepthook = unraisable, printed
        for number, earlier in before.items():
            signal.signal(number, earlier)
