"""Drawings and figures are those that their scripts make."""

import importlib.util
import json
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


def test_drawn_rows_meet_in_no_bank():
    orders = drawings.gather_orders()
    assert all(len(set(row)) == 8 and max(row) < drawings.STEP_K for row in orders)
    for columns in zip(*orders, strict=True):
        assert len({column % 8 for column in columns}) == 8


def test_figures_in_pages_are_up_to_date(benchmarks, tmp_path, monkeypatch):
    update = load(benchmarks / "update_readme.py")
    copies = {}
    for name in ("README", "WHEN_SPARSE_PAYS", "MULTI_GPU", "GENERATION", "PRUNING"):
        page = getattr(update, name)
        copies[page] = tmp_path / page.name
        copies[page].write_bytes(page.read_bytes())
        monkeypatch.setattr(update, name, copies[page])
    update.main()
    for page, copy in copies.items():
        assert copy.read_bytes() == page.read_bytes(), "run benchmarks/update_readme.py"


def test_the_scaling_model_is_up_to_date(benchmarks, tmp_path, monkeypatch):
    scaling = load(benchmarks / "scaling_model.py")
    page, copy = scaling.DOCUMENT, tmp_path / "page.md"
    copy.write_bytes(page.read_bytes())
    monkeypatch.setattr(scaling, "DOCUMENT", copy)
    monkeypatch.setattr(scaling, "PLOT", tmp_path / "plot.png")
    scaling.main()
    assert copy.read_bytes() == page.read_bytes(), "run benchmarks/scaling_model.py"


def test_collectives_are_told_by_their_names(benchmarks):
    tables = load(benchmarks / "parallel_tables.py")
    names = {
        "LscdWgmmaKernel": ("command_buffer", 700.0),
        "psum_invariant_fusion": ("psum_invariant-fusion", 100.0),
        "ncclDevKernel_AllGather_RING_LL": ("all-gather", 30.0),
        "input_reduce_fusion": ("command_buffer", 50.0),
    }
    kernels = [
        {"kernel": name, "operation": operation, "us": us}
        for name, (operation, us) in names.items()
    ]
    result = {"profiled_step_ms": 1.0, "kernels": kernels}
    assert tables.communication_share(result) == pytest.approx(0.13)


def test_requests_of_several_runs_are_one_table(benchmarks, tmp_path):
    tables = load(benchmarks / "model_tables.py")
    request = {"dtype": "float16", "batch": 8, "sparsity": 0.8, "step_ms": 10.0}
    runs = {
        "1": [request | {"sparsity": 0.0, "step_ms": 16.0, "speedup": 1.0}],
        "3": [request, request | {"cache_dtype": "float8_e4m3fn"}],
        "2": [request | {"step_ms": 12.0}, request | {"batch": 16}],
    }
    del runs["2"][1]["step_ms"]  # did not fit
    for day, results in runs.items():
        facts = {"date": f"2026-11-0{day}", "commit": f"c{day}"}
        content = {"environment": facts, "results": results}
        (tmp_path / f"{day}.json").write_text(json.dumps(content))
    facts, results = tables.load_requests(tmp_path.iterdir())
    # Of the second run nothing is used.
    assert (facts["commit"], facts["date"]) == ("c1 and c3", "2026-11-03")
    found = [
        (r["sparsity"], r["cache_dtype"], r["step_ms"], r.get("speedup"))
        for r in results
    ]
    assert found == [
        (0.0, "float16", 16.0, 1.0),
        (0.8, "float16", 10.0, 1.6),
        (0.8, "float8_e4m3fn", 10.0, None),
    ]


def test_memory_is_without_what_the_allocator_rounds_up(benchmarks):
    tables = load(benchmarks / "model_tables.py")
    request = {"weight_bytes": 50, "held_bytes": 60, "request_peak_bytes": 75}
    assert tables.request_bytes(request) == 65
    assert tables.request_bytes({"weight_bytes": 50}) is None


def test_times_of_kernels_by_name(benchmarks):
    times = load(benchmarks / "device_time.py")
    kernels = [
        times.Kernel(
            0, 2000, "psum_invariant_36_0_fusion", "psum_invariant.36.0-fusion"
        ),
        times.Kernel(
            3000, 7000, "psum_invariant_7_0_fusion", "psum_invariant.7.0-fusion"
        ),
        times.Kernel(8000, 9000, "nvjet_192x64_64x6_TNT", "custom-call.3"),
        times.Kernel(8000, 9000, "nvjet_128x64_64x6_TNT", "custom-call.4"),
    ]
    assert times.span(kernels) == 9000
    rows = times.by_name(kernels, 2)
    assert [(r["kernel"], r["operation"], r["calls"], r["us"]) for r in rows] == [
        ("psum_invariant_fusion", "psum_invariant-fusion", 1.0, 3.0),
        ("nvjet_192x64_64x6_TNT", "custom-call", 0.5, 0.5),
        ("nvjet_128x64_64x6_TNT", "custom-call", 0.5, 0.5),
    ]


def test_plot_is_of_the_stored_results(benchmarks):
    plot = load(benchmarks / "plot_speedup.py")
    sources = [plot.load(path) for path in (plot.FEW_ROWS, plot.MANY_ROWS)]
    stored = plot.OUT.read_text(encoding="utf-8")
    for svg in (stored, plot.figure()):
        for facts, results in sources:
            assert plot.origin(facts) in svg, "run benchmarks/plot_speedup.py"
            assert svg.count("% zeros") == len({r["sparsity"] for r in results})
        assert "prefers-color-scheme" in svg


def test_plot_of_a_result(benchmarks, tmp_path):
    """Of more zeros than there are colours, and of layers that no page shows."""
    pytest.importorskip("matplotlib")
    plot = load(benchmarks / "plot_speedup.py")
    facts = {"device": "Some GPU", "jax": "0.12", "commit": "abc", "date": "2026-11-28"}
    row = {"layer": "mine", "m": 16, "k": 32, "dtype": "float16"}
    results = [
        row | {"pattern": pattern, "sparsity": s / 8, "n": n, "speedup": 1 + s / 8}
        for pattern in ("random", "rows")
        for s in range(7)
        for n in (1, 8)
    ]
    path = tmp_path / "matmul-some-gpu.json"
    path.write_text(json.dumps({"environment": facts, "results": results}))
    assert plot.save_png(path) == tmp_path / "matmul-some-gpu.png"
    assert (tmp_path / "matmul-some-gpu.png").read_bytes().startswith(b"\x89PNG")
