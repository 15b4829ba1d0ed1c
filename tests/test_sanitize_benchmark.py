"""benchmarks/sanitize.py, with a stand-in for compute-sanitizer."""

import importlib
import json
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent

# Prints what pytest would, and writes a log as the tool does.
STAND_IN = """#!/bin/sh
for argument; do
  case "$argument" in
    --tool=*) tool="${argument#--tool=}" ;;
    --log-file=*) log="${argument#--log-file=}" ;;
  esac
done
echo "5 passed in 1.00s"
echo "========= COMPUTE-SANITIZER" > "$log"
case "$tool" in
  memcheck) echo "========= ERROR SUMMARY: 0 errors" ;;
  racecheck)
    echo "========= Race reported"
    echo "========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)" ;;
esac >> "$log"
"""


@pytest.fixture
def sanitize(monkeypatch, tmp_path):
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(STAND_IN)
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("sanitize")


def run(sanitize, tmp_path, tools):
    name = str(tmp_path / "sanitize")
    done = CliRunner().invoke(sanitize.app, ["--tools", tools, "--name", name])
    (path,) = tmp_path.glob("sanitize-*.json")
    return done.exit_code, json.loads(path.read_text())["results"]


def test_no_errors(sanitize, tmp_path):
    code, (result,) = run(sanitize, tmp_path, "memcheck")
    assert code == 0
    assert (result["errors"], result["findings"]) == (0, [])
    assert result["tests"] == "5 passed in 1.00s"


def test_errors(sanitize, tmp_path):
    code, results = run(sanitize, tmp_path, "memcheck,racecheck")
    assert code == 1
    assert [r["errors"] for r in results] == [0, 1]
    assert results[1]["warnings"] == 2
    assert results[1]["findings"] == ["Race reported"]


def test_unknown_tool(sanitize):
    done = CliRunner().invoke(sanitize.app, ["--tools", "heapcheck"])
    assert done.exit_code != 0
    assert "heapcheck" in str(done.exception)
