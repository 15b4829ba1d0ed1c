"""Drawings and figures are those that their scripts make."""

import importlib.util
import sys

import numpy as np
import pytest
from doc_pages import ROOT

import flashjax as fj


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


drawings = load(ROOT / "docs" / "drawings.py")


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    monkeypatch.delitem(sys.modules, "update_readme", raising=False)
    return ROOT / "benchmarks"


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_drawing_is_up_to_date(name):
    stored = (ROOT / "docs" / "images" / f"{name}.svg").read_text(encoding="utf-8")
    assert drawings.DRAWINGS[name]() == stored


@pytest.mark.parametrize("lane", [0, drawings.LANE, 31])
@pytest.mark.parametrize("stream", [0, 1])
def test_drawn_elements_are_the_lane_s(lane, stream):
    """A matrix that is nonzero there alone has bits in that lane's word alone."""
    dense = np.zeros((drawings.STEP_K, drawings.STRIP_ROWS), np.float16)
    dense[drawings.columns(lane), drawings.rows(lane)[stream]] = 1
    bitmap = np.asarray(fj.SparseMatrix.from_dense(dense).bitmap)
    expected = np.zeros_like(bitmap)
    expected[0, 0, lane, 0] = 0xFFFF << 16 * stream
    np.testing.assert_array_equal(bitmap, expected)


def test_figures_in_pages_are_up_to_date(benchmarks, tmp_path, monkeypatch):
    update = load(benchmarks / "update_readme.py")
    copies = {}
    for name in ("README", "WHEN_SPARSE_PAYS"):
        page = getattr(update, name)
        copies[page] = tmp_path / page.name
        copies[page].write_bytes(page.read_bytes())
        monkeypatch.setattr(update, name, copies[page])
    update.main()
    for page, copy in copies.items():
        assert copy.read_bytes() == page.read_bytes(), "run benchmarks/update_readme.py"


def test_plot_is_of_the_stored_results(benchmarks):
    plot = load(benchmarks / "plot_speedup.py")
    facts, results = plot.load(plot.SOURCE)
    stored = plot.OUT.read_text(encoding="utf-8")
    for svg in (stored, plot.figure(facts, results)):
        assert plot.origin(facts) in svg, "run benchmarks/plot_speedup.py"
        assert "prefers-color-scheme" in svg
        assert svg.count("% zeros") == len({r["sparsity"] for r in results})
