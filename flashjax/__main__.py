"""`python -m flashjax` is the command line `flashjax`."""

from flashjax.cli import entry_point

if __name__ == "__main__":
    entry_point()
