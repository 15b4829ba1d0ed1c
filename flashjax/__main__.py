"""`python -m flashjax` is the command line `flashjax`."""

from flashjax.cli import main

if __name__ == "__main__":
    main()
