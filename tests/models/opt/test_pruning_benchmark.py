"""benchmarks/pruning.py, on a small model."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
MODEL = ROOT / "tests" / "models" / "opt" / "data" / "pre_norm"


@pytest.fixture
def pruning(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("pruning")


def test_writes_its_results(pruning, tmp_path):
    name = str(tmp_path / "pruning")
    pruning.main(
        str(MODEL), "magnitude,sparsegpt", layers=1, samples=3, length=8, name=name
    )
    (path,) = tmp_path.glob("pruning-*.json")
    results = json.loads(path.read_text())["results"]
    assert [r["method"] for r in results] == ["magnitude", "sparsegpt"]
    assert [r["samples"] for r in results] == [0, 3]  # magnitude needs none
    assert all(r["layers"] == 1 and "seconds" in r for r in results)
    assert len(results[1]["seconds_when_done"]) == 1
