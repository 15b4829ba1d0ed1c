"""Signals end a command, wherever they catch it."""

import ctypes
import gc
import signal
import time

import pytest
import typer

from flashjax.cli.errors import reported
from flashjax.cli.signals import arrived, ending_signals

ENDINGS = [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]


@pytest.fixture(autouse=True)
def interruptible():
    """A shell's background jobs, and so these tests in one, ignore the interrupt."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def end_of(work) -> BaseException:
    """What ends the work, which is interrupted."""

    def interrupted():
        with ending_signals():
            work()
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                time.sleep(0.01)

    with pytest.raises((KeyboardInterrupt, SystemExit)) as ended:
        interrupted()
    return ended.value


@pytest.mark.parametrize(("number", "ending"), ENDINGS)
def test_an_exception_that_is_lost_comes_again(number, ending, capsys):
    """As in JAX's callback at a garbage collection, three times here."""
    raised = []

    def callback(phase, info):
        if len(raised) < 3:
            raised.append(phase)
            signal.raise_signal(number)

    def work():
        gc.collect()
        gc.collect()

    gc.callbacks.append(callback)
    try:
        ended = end_of(work)
    finally:
        gc.callbacks.remove(callback)
    assert len(raised) == 3
    assert isinstance(ended, ending)
    assert getattr(ended, "code", 143) == 143
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("number", "ending"), ENDINGS)
def test_an_exception_that_c_prints(number, ending, capfd):
    """There Python would end at once at a SystemExit, and clean nothing up."""

    def work():
        code = f"import signal; signal.raise_signal({int(number)})"
        ctypes.pythonapi.PyRun_SimpleStringFlags(code.encode(), None)

    assert isinstance(end_of(work), ending)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("number", "ending"), ENDINGS)
def test_a_lost_exception_comes_again_once(number, ending, capfd):
    """What is cleaned up after it came again is left alone."""
    cleaned = []

    def work():
        code = f"import signal; signal.raise_signal({int(number)})"
        ctypes.pythonapi.PyRun_SimpleStringFlags(code.encode(), None)
        try:
            time.sleep(20)
        finally:
            time.sleep(0.3)
            cleaned.append(number)

    assert isinstance(end_of(work), ending)
    assert cleaned == [number]


@pytest.mark.parametrize(("number", "ending"), ENDINGS)
def test_an_exception_comes_once(number, ending):
    """What is cleaned up meanwhile is not interrupted by the same signal again."""
    cleaned = []

    def work():
        try:
            signal.raise_signal(number)
        finally:
            gc.collect()
            time.sleep(0.3)
            cleaned.append(number)

    assert isinstance(end_of(work), ending)
    assert cleaned == [number]


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(signal.SIGINT, 130, "flashjax: interrupted\n"), (signal.SIGTERM, 143, "")],
)
def test_an_exception_that_becomes_another_error(number, code, message, debug, capsys):
    """As in __eq__ of a static argument, which JAX's C++ calls."""

    @reported
    def command(debug):
        text = ""
        try:
            signal.raise_signal(number)
        except BaseException as error:
            text = str(error)
        raise ValueError(f"static arguments should be comparable: {text}")

    with ending_signals():
        with pytest.raises(typer.Exit) as ended:
            command(debug=debug)
        time.sleep(0.3)  # in which nothing is raised
    assert ended.value.exit_code == code
    assert capsys.readouterr().err == message


def test_a_signal_of_before_is_forgotten():
    end_of(lambda: signal.raise_signal(signal.SIGINT))
    assert arrived() is None
    with ending_signals():
        assert arrived() is None


def test_afterwards_all_is_as_before():
    numbers = [number for number, _ in ENDINGS]
    before = [signal.getsignal(number) for number in numbers]
    end_of(lambda: signal.raise_signal(signal.SIGINT))
    assert [signal.getsignal(number) for number in numbers] == before
    time.sleep(0.3)  # in which nothing is raised


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with ending_signals():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
