"""benchmarks/sanitize.py, with a stand-in for compute-sanitizer."""

import importlib
import json
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parent.parent

# Prints what pytest would, and writes the logs of two processes as the tool does.
STAND_IN = """#!/bin/sh
for argument; do
  case "$argument" in
    --tool=*) tool="${argument#--tool=}" ;;
    --log-file=*%p) log="${argument#--log-file=}"; log="${log%??}" ;;
  esac
done
echo "tests/test_one.py::test_one PASSED [ 50%]"
if [ -n "$DIES" ] && mkdir "$DIES" 2> /dev/null; then kill -SEGV $$; fi
echo "tests/test_one.py::test_another PASSED [100%]"
for process in 1 2; do
  echo "========= COMPUTE-SANITIZER" > "$log$process"
  case "$tool" in
    memcheck) echo "========= ERROR SUMMARY: 0 errors" ;;
    racecheck)
      echo "========= Race reported"
      echo "========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)" ;;
    initcheck)
      echo "========= Uninitialized read"
      echo "=========     at void flashjax::Kernel"
      echo "========= Uninitialized read"
      echo "=========     at a kernel of XLA" ;;
  esac >> "$log$process"
done
case "$tool" in
  initcheck) sleep 100 ;;
  synccheck) rm "$log"* ;;
esac
[ -z "$KILLED" ] || exit 137
echo "on GPU $CUDA_VISIBLE_DEVICES"
echo "2 passed in 1.00s"
"""


@pytest.fixture
def sanitize(monkeypatch, tmp_path):
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(STAND_IN)
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("sanitize")
    tests = ["tests/test_one.py::test_one", "tests/test_one.py::test_another"]
    monkeypatch.setattr(module, "collect", lambda arguments: tests * 2)
    monkeypatch.setattr(module, "fill_cache", lambda *args: None)
    return module


def run(sanitize, tmp_path, tools, *options):
    name = str(tmp_path / "sanitize")
    options = ["--tools", tools, "--name", name, "--together", "2", *options]
    done = CliRunner().invoke(sanitize.app, options)
    (path,) = tmp_path.glob("sanitize-*.json")
    return done.exit_code, json.loads(path.read_text())["results"]


def test_no_errors(sanitize, tmp_path):
    code, (result,) = run(sanitize, tmp_path, "memcheck")
    assert code == 0
    assert (result["errors"], result["findings"]) == (0, [])
    assert (result["tests"], result["outcomes"]) == (4, {"passed": 4})
    assert result["finished"]


def test_other_tools_stay(sanitize, tmp_path):
    _, earlier = run(sanitize, tmp_path, "memcheck,racecheck")
    code, results = run(sanitize, tmp_path, "memcheck")
    assert code == 0  # of the tool that was run
    results = {result["tool"]: result for result in results}
    assert sorted(results) == ["memcheck", "racecheck"]
    assert results["racecheck"] in earlier
    assert all("commit" in result for result in results.values())


def test_errors(sanitize, tmp_path):
    code, results = run(sanitize, tmp_path, "memcheck,racecheck")
    assert code == 1
    memory, races = sorted(results, key=lambda r: r["tool"])
    assert (memory["errors"], races["errors"]) == (0, 4)
    assert races["warnings"] == 8
    tests = ["tests/test_one.py::test_another", "tests/test_one.py::test_one"]
    assert (memory["errors_among"], races["errors_among"]) == ([], [tests, tests])
    assert races["findings"] == ["4 x Race reported"]


def test_ended(sanitize, tmp_path):
    """What a tool found until then counts; what others found is there as well."""
    code, results = run(sanitize, tmp_path, "memcheck,initcheck", "--minutes", "0.05")
    assert code == 1
    ended, memory = sorted(results, key=lambda r: r["tool"])
    assert memory["finished"]
    assert not ended["finished"]
    assert ended["exit_statuses"] == [None]
    assert ended["errors"] == 4


def test_no_log(sanitize, tmp_path):
    code, (result,) = run(sanitize, tmp_path, "synccheck")
    assert code == 1
    assert result["findings"] == ["2 x no log"]
    assert result["ended"][2::3] == ["2 passed in 1.00s"] * 2


def test_tests_that_the_system_ends(sanitize, tmp_path, monkeypatch):
    monkeypatch.setenv("KILLED", "1")
    code, (result,) = run(sanitize, tmp_path, "memcheck")
    assert code == 1
    assert result["exit_statuses"] == [137]
    assert "test_another PASSED" in result["ended"][-1]


def test_what_dies_is_run_again(sanitize, tmp_path, monkeypatch):
    monkeypatch.setenv("DIES", str(tmp_path / "died"))
    code, (result,) = run(sanitize, tmp_path, "racecheck")
    assert code == 1
    # What it found until then counts, too.
    assert (result["died"], result["exit_statuses"]) == (1, [0])
    assert (result["errors"], result["outcomes"]) == (4, {"passed": 4})


def test_logs_of_what_found_something_are_kept(sanitize, tmp_path):
    logs = tmp_path / "some" / "logs"
    options = ["--logs", str(logs), "--gpus", "2"]
    run(sanitize, tmp_path, "memcheck,racecheck", *options)
    texts = [path.read_text() for path in logs.glob("racecheck-*")]
    assert len(texts) == len(list(logs.iterdir())) == 2
    assert all("test_one PASSED" in text and "Race reported" in text for text in texts)
    gpus = {line for text in texts for line in text.splitlines() if "on GPU" in line}
    assert gpus == {"on GPU 0", "on GPU 1"}


def test_a_test_is_missing(sanitize, tmp_path):
    """A process that ended well without all its tests has not finished."""
    code, (result,) = run(sanitize, tmp_path, "memcheck", "--together", "4")
    assert code == 1
    assert (result["tests"], result["outcomes"]) == (4, {"passed": 2})
    assert not result["finished"]


def test_collects(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sanitize = importlib.import_module("sanitize")
    tests = sanitize.collect(["tests/test_decode_attention.py"])
    assert "tests/test_decode_attention.py::test_nan_on_a_gpu" in tests
    with pytest.raises(SystemExit, match="expected tests"):
        sanitize.collect(["tests/no_such_file.py"])


def test_unknown_tool(sanitize):
    done = CliRunner().invoke(sanitize.app, ["--tools", "heapcheck"])
    assert done.exit_code != 0
    assert "heapcheck" in str(done.exception)


def test_findings_of_one_kind(sanitize):
    """Kernels of several types, at several places: one line."""
    log = "".join(
        f"""========= Warning: Race reported between Write access at void \
flashjax::LscdKernel<{dtype}, (int)8, flashjax::PackedWeight>(CUtensorMap_st, T3)+0x1560
=========     and Read access at void \
flashjax::LscdKernel<{dtype}, (int)8, flashjax::PackedWeight>(CUtensorMap_st, T3)+{at} \
[4 hazards]
=========
"""
        for dtype, at in (("__half", "0x2800"), ("__nv_bfloat16", "0x3b0"))
    )
    found = sanitize.summarise([log])
    assert (found["errors"], found["warnings"]) == (0, 2)
    text = (
        "Warning: Race reported between Write access at LscdKernel; and Read access at "
        "LscdKernel"
    )
    assert found["findings"] == {text: 2}
