"""The progress bar: on a terminal alone, and in colours only where they are wanted."""

import re

import pytest

from flashjax.cli.progress import progress_bar, reading_weights

COLOUR = re.compile(r"\x1b\[[\d;]*\b(3\d|4\d|9\d)\b[\d;]*m")


@pytest.fixture
def shown(capfd, monkeypatch):
    """What a bar leaves on stderr, which FORCE_COLOR makes a terminal."""

    def show(terminal, **options):
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.delenv("FORCE_COLOR", raising=False)
        if terminal:
            monkeypatch.setenv("FORCE_COLOR", "1")
        for name, value in options.items():
            monkeypatch.setenv(name, value)
        with progress_bar(disable=False) as advance:
            for done in range(3):
                advance("[layers]", done + 1, 3)
        return capfd.readouterr().err

    return show


def test_terminal(shown):
    text = shown(terminal=True)
    assert "100%" in text
    assert "[layers]" in text
    assert COLOUR.search(text)


def test_no_color(shown):
    text = shown(terminal=True, NO_COLOR="1")
    assert "100%" in text
    assert not COLOUR.search(text)


def test_piped(shown):
    assert shown(terminal=False) == ""


def test_nothing_before_the_first_call(capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar(disable=False):
        pass
    assert capfd.readouterr().err == ""


def test_reading_weights(capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    with reading_weights(disable=False) as progress:
        progress(5, 10)
        progress(10, 10)
    text = capfd.readouterr().err
    assert "reading weights" in text
    assert text.endswith("\x1b[2K")  # the line is cleared


def test_commands_show_that_they_read_weights(cli, sparse_folder, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    arguments = ("generate", sparse_folder, "-p", "x", "-n", 2)
    assert "reading weights" in cli(*arguments).err
    assert "reading weights" not in cli(*arguments, "-q").err
