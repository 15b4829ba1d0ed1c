"""Documents out of text files, and out of folders of them as `datasets` writes."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_COLUMN = "text"


def read_documents(path: str | os.PathLike[str]) -> list[str]:
    """Reads the documents of a file, or of all files of a folder in order of name.

    Args:
      path: a .txt file or one without a known suffix (one document), .jsonl (one a
        line), .parquet or .arrow (one a row; these need pyarrow), the last three with
        the text in a field "text"; or a folder, searched for such files.

    Returns:
      The documents that hold more than white space.

    Raises:
      ValueError: there is no text; a file is not UTF-8, is damaged or has no field
        "text"; or pyarrow is needed and missing.
      OSError: a file cannot be read.
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if _is_text_file(path, file)]
        if not files:
            raise ValueError(
                f"{path}: expected a folder with {', '.join(_READERS)} files, got one "
                "with none"
            )
    documents = [
        document
        for file in files
        for document in _READERS.get(file.suffix, _read_text)(file)
        if document.strip()
    ]
    if not documents:
        raise ValueError(f"{path}: expected text, got nothing but white space")
    return documents


def _is_text_file(folder: Path, file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.is_file() and file.suffix in _READERS and not hidden


def _read_text(file: Path) -> Iterator[str]:
    yield _decode(file, file.read_bytes())


def _decode(file: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: expected UTF-8 text, got byte 0x{content[error.start]:02x} at "
            f"{error.start}"
        ) from error


def _read_jsonl(file: Path) -> Iterator[str]:
    # Split by "\n" alone: JSON strings may hold other line separators.
    for number, line in enumerate(_decode(file, file.read_bytes()).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: expected a JSON object, got {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get(_COLUMN), str):
            raise ValueError(
                f"{where}: expected an object with a string {_COLUMN!r}, got "
                f"{line.strip():.60}"
            )
        yield row[_COLUMN]


def _read_parquet(file: Path) -> Iterator[str]:
    pyarrow = _import_pyarrow(file)
    from pyarrow import parquet

    with _damage(file, pyarrow):
        yield from _column(file, parquet.read_table(file))


def _read_arrow(file: Path) -> Iterator[str]:
    pyarrow = _import_pyarrow(file)
    with _damage(file, pyarrow), pyarrow.memory_map(os.fspath(file)) as source:
        try:  # what `datasets` writes
            table = pyarrow.ipc.open_stream(source).read_all()
        except pyarrow.ArrowInvalid:
            table = pyarrow.ipc.open_file(source).read_all()
        yield from _column(file, table)


def _import_pyarrow(file: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(
            f"{file}: {file.suffix} files need pyarrow: pip install pyarrow, or give "
            ".txt or .jsonl files"
        ) from error
    return pyarrow


@contextlib.contextmanager
def _damage(file: Path, pyarrow: Any) -> Iterator[None]:
    try:
        yield
    except pyarrow.ArrowInvalid as error:
        raise ValueError(
            f"{file}: expected a whole {file.suffix} file, got: {error}"
        ) from error


def _column(file: Path, table: Any) -> Iterator[str]:
    if _COLUMN not in table.column_names:
        raise ValueError(
            f"{file}: expected a column {_COLUMN!r}, got "
            f"{', '.join(table.column_names) or 'none'}"
        )
    for value in table.column(_COLUMN).to_pylist():
        if not isinstance(value, str):
            raise ValueError(
                f"{file}: expected strings in the column {_COLUMN!r}, got "
                f"{type(value).__name__}"
            )
        yield value


_READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
