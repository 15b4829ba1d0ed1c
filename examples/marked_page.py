"""Pages of the documentation with a part that a script writes."""

from pathlib import Path


def write_between(page: Path, marks: tuple[str, str], part: str) -> None:
    """Puts text between two marks of a Markdown page.

    Raises:
      ValueError: the page lacks the marks.
    """
    first, last = marks
    content = page.read_text(encoding="utf-8")
    head, start, rest = content.partition(first)
    _, end, tail = rest.partition(last)
    if not start or not end:
        raise ValueError(f"{page}: expected the marks {first!r} and {last!r}")
    page.write_text(f"{head}{first}\n{part}\n{last}{tail}", encoding="utf-8")
