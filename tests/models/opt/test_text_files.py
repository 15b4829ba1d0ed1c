import json

import pytest

from flashjax.models.opt.text_files import read_documents


def test_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\ufeffone\n\ntwo \u00e9\n", encoding="utf-8")
    assert read_documents(path) == ["one\n\ntwo \u00e9\n"]
    unknown = path.rename(tmp_path / "text")
    assert read_documents(unknown) == ["one\n\ntwo \u00e9\n"]


def test_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": "one\u2028two", "id": 3}, {"text": " "}, {"text": "three"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    assert read_documents(path) == ["one\u2028two", "three"]


def test_folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.jsonl").write_text('{"text": "two"}')
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / ".hidden.txt").write_text("hidden")
    assert read_documents(tmp_path) == ["one", "two"]


def test_parquet_and_arrow(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"text": ["one", "two"], "id": [1, 2]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(tmp_path / "b.arrow", table.schema) as writer:
        writer.write_table(table)
    with pyarrow.ipc.new_file(tmp_path / "c.arrow", table.schema) as writer:
        writer.write_table(table)
    assert read_documents(tmp_path) == ["one", "two"] * 3
    parquet.write_table(table.drop_columns("text"), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="expected a column 'text', got id"):
        read_documents(tmp_path)
    for name in ("a.parquet", "b.arrow"):
        (tmp_path / name).write_bytes(b"nonsense, and not short at all")
        with pytest.raises(ValueError, match=f"{name}: expected a whole"):
            read_documents(tmp_path / name)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"x")
    with pytest.raises(ValueError, match="need pyarrow: pip install pyarrow"):
        read_documents(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "nothing but white space"),
        ("a.txt", b"ab\xff", "UTF-8 text, got byte 0xff at 2"),
        ("a.jsonl", b"{", "line 1: expected a JSON object"),
        ("a.jsonl", b"[" * 100_000, "line 1: expected a JSON object"),
        ("a.jsonl", b'{"text": "a"}\n[1]', "line 2: expected an object with a string"),
        ("a.jsonl", b'{"text": 1}', "expected an object with a string 'text'"),
        ("a.csv", b"", "expected a folder with .txt, .jsonl, .parquet, .arrow files"),
    ],
)
def test_errors(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path)


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_documents(tmp_path / "nothing.txt")
