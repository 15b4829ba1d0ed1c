"""How long kernels take beside what else there is, and what follows from it."""

import contextlib
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flashjax as fj
from flashjax import matmul, matmul_impl, tuned_rows, tuning

from . import cuda_stand_in, op_cases

K, M = 260, 150
KERNEL, EXPAND = "flashjax_lscd_matmul_cpu", "flashjax_lscd_unpack_cpu"


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "cache" / "tuning.json"
    monkeypatch.setenv("FLASHJAX_TUNING", str(path))
    tuned_rows.forget()
    yield path
    tuned_rows.forget()


@pytest.fixture
def same_times(monkeypatch):
    monkeypatch.setattr(tuning, "_microseconds", lambda *args: 1.0)


@pytest.fixture
def no_timing(monkeypatch):
    def microseconds(*args):
        raise AssertionError("timed before everything was checked")

    monkeypatch.setattr(tuning, "_microseconds", microseconds)


def matrix(k=K, m=M, sparsity=0.7, dtype="float16", seed=0):
    dense = op_cases.random_dense(k, m, sparsity, dtype, seed=seed)
    return fj.SparseMatrix.from_dense(dense)


def entry(w, kernel_rows, **others):
    stored = matmul_impl.stored_share(w.shape, w.packed)
    new = tuned_rows.describe(w.shape, w.dtype, w.layout, stored, kernel_rows)
    return tuned_rows.dataclasses.replace(new, **others)


def device_kind():
    return tuned_rows.device_kind("cpu")


def remember(w, kernel_rows, platform="cpu", **others):
    tuned_rows.add(tuned_rows.device_kind(platform), [entry(w, kernel_rows, **others)])


def target(w, rows, platform="cpu"):
    """What the product is lowered to."""
    x = jax.ShapeDtypeStruct((rows, w.shape[0]), w.dtype)
    jax.clear_caches()
    lowered = jax.jit(fj.sparse_matmul).trace(x, w)
    text = lowered.lower(lowering_platforms=(platform,)).as_text()
    (found,) = re.findall(r"stablehlo\.custom_call @(flashjax\w+)", text)
    return found


@pytest.mark.parametrize(
    "platform", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]
)
def test_autotune(file, platform):
    device = jax.local_devices(backend=platform)[0]
    w = jax.device_put(matrix(), device)
    calls = []
    alike = jax.device_put(matrix(seed=1), device)
    (found,) = fj.autotune(
        [w, alike], [16, 1, 1], progress=lambda *done: calls.append(done)
    )
    assert found.shape == (K, M)
    assert found.sparsity == w.sparsity
    assert [timing.rows for timing in found.timings] == [1, 16]
    for timing in found.timings:
        assert min(timing.kernel, timing.expand, timing.dense) > 0
    usual = matmul_impl.usual_kernel_rows("cpu" if platform == "cpu" else "cuda")
    if all(timing.kernel <= timing.expand for timing in found.timings):
        assert found.kernel_rows == usual  # 16 rows say nothing of more
    assert calls == [(1, 2), (2, 2)]
    assert f"{K} x {M}, float16, 70% zeros" in str(found)
    assert len(str(found).splitlines()) == 4

    content = json.loads(file.read_text())
    ((stored,),) = content["devices"].values()
    assert stored["kernel_rows"] == found.kernel_rows
    assert {p.name for p in file.parent.iterdir()} == {file.name, f"{file.name}.lock"}
    # And products are right, on either side.
    for rows in (1, 20):
        x = jnp.ones((rows, K), w.dtype)
        y = fj.sparse_matmul(jax.device_put(x, device), w)
        expected = np.asarray(w.to_dense(), np.float32).sum(0)
        np.testing.assert_allclose(y[-1].astype(np.float32), expected, atol=0.1)


def test_both_ways_are_timed(monkeypatch, file):
    seen = []

    def microseconds(product, n, w, weight):
        if isinstance(weight, jax.Array):
            seen.append("dense")
            assert product(jnp.ones((n, K), w.dtype), weight).shape == (n, M)
            return 1.0
        lowered = jax.jit(product).lower(jnp.ones((n, K), w.dtype), weight)
        seen.append(re.search(r"@(flashjax\w+)", lowered.as_text())[1])
        return {KERNEL: 2.0, EXPAND: 1.0 if n > 8 else 3.0}[seen[-1]]

    monkeypatch.setattr(tuning, "_microseconds", microseconds)
    (found,) = fj.autotune(matrix(), [4, 8, 16])
    assert seen == 3 * [KERNEL, EXPAND, "dense"]
    assert found.kernel_rows == 8


def test_kernel_rows():
    def rows(*kernel, first=1, usual=100):
        timings = tuple(
            tuning.Timing(first * 2**i, t, 10.0, 5.0) for i, t in enumerate(kernel)
        )
        return tuning._kernel_rows(timings, usual)

    assert rows(1, 2, 11, 12) == 2
    assert rows(10.5, 2, 3, 20) == 4  # one time that is off
    assert rows(11, 12) == 0
    assert rows(1, 10.2) == 100  # by less than timings differ
    # What was not timed is as usual, unless that contradicts what was found.
    assert rows(1, 10) == 100
    assert rows(1, 10, first=80) == 160
    assert rows(11, 12, first=200) == 100
    assert rows(11, 12, first=50) == 49


def test_found_rows_count(file):
    w = matrix()
    most = matmul.KERNEL_ROWS["cpu"]
    assert target(w, most) == KERNEL
    remember(w, 5)
    assert [target(w, n) for n in (1, 5, 6, most)] == [KERNEL] * 2 + [EXPAND] * 2
    remember(w, 2 * most)  # in the place of what was there
    assert target(w, 2 * most) == KERNEL
    remember(w, 0)
    assert target(w, 1) == EXPAND
    (entries,) = json.loads(file.read_text())["devices"].values()
    assert len(entries) == 1


def test_neighbours_stay(file):
    """What counts for others within 5% is not replaced."""
    remember(matrix(sparsity=0.7), 5)
    remember(matrix(sparsity=0.66), 7)
    remember(matrix(sparsity=0.7, seed=1), 6)
    assert sorted(e.kernel_rows for e in tuned_rows.known(device_kind())) == [6, 7]


def test_autotune_changes_functions_compiled_before(file, monkeypatch):
    w = matrix()
    x = jnp.ones((9, K), w.dtype)
    jitted = jax.jit(lambda x, w: fj.sparse_matmul(x, w))
    looked_up = []

    def kernel_rows(platform, *args):
        rows = original(platform, *args)
        if platform == "cpu":  # it is asked for others, too
            looked_up.append(rows)
        return rows

    original = matmul_impl._kernel_rows
    monkeypatch.setattr(matmul_impl, "_kernel_rows", kernel_rows)
    before = [f(x, w) for f in (fj.sparse_matmul, jitted)]
    for f in (fj.sparse_matmul, jitted):
        f(x, w)
    assert set(looked_up) == {matmul.KERNEL_ROWS["cpu"]}
    looked_up.clear()
    times = iter([1.0, 2.0, 1.0, 2.0, 1.0, 1.0])  # 3 rows: the kernel, 9: not
    monkeypatch.setattr(tuning, "_microseconds", lambda *args: next(times))
    (found,) = fj.autotune(w, [3, 9])
    assert found.kernel_rows == 3
    after = [f(x, w) for f in (fj.sparse_matmul, jitted)]
    assert set(looked_up) == {3}
    np.testing.assert_allclose(before, after, atol=0.1)


@pytest.mark.parametrize(
    "other",
    [
        {"m": 151},
        {"k": 261},
        {"dtype": "bfloat16"},
        {"sparsity": 0.5},
    ],
)
def test_other_matrices_keep_what_is_usual(file, other):
    remember(matrix(), 5)
    assert target(matrix(**other), 6) == KERNEL


def test_about_as_many_zeros_count(file):
    remember(matrix(sparsity=0.7), 5)
    remember(matrix(sparsity=0.76), 7)
    assert target(matrix(sparsity=0.71), 6) == EXPAND
    assert target(matrix(sparsity=0.75), 7) == KERNEL
    assert target(matrix(sparsity=0.75), 8) == EXPAND


@pytest.mark.parametrize("others", [{"flashjax": "0.0.1"}, {"layout": "lscd16/0"}])
def test_other_kernels_do_not_count(file, others):
    w = matrix()
    remember(w, 5, **others)
    assert target(w, 6) == KERNEL


def test_other_devices_do_not_count(file):
    w = matrix()
    tuned_rows.add("Some GPU", [entry(w, 5)])
    assert target(w, 6) == KERNEL
    remember(w, 4)
    assert len(json.loads(file.read_text())["devices"]) == 2


def test_stacks_count_as_their_matrices(file):
    w = matrix()
    remember(w, 5)
    stack = fj.SparseMatrix.stack([w, w])
    x = jax.ShapeDtypeStruct((6, K), w.dtype)
    text = jax.jit(lambda x, w: fj.sparse_matmul(x, w, layer=1)).lower(x, stack)
    assert EXPAND in text.as_text()


def test_rows_found_for_a_gpu(file, monkeypatch):
    w = matrix()
    with cuda_stand_in.cuda_module():
        assert target(w, 600, "cuda") == "flashjax_lscd_matmul_cuda"
        monkeypatch.setattr(tuned_rows, "device_kind", {"cuda": "Some GPU"}.get)
        tuned_rows.add("Some GPU", [entry(w, 500)])
        assert target(w, 600, "cuda") == "flashjax_lscd_unpack_cuda"
        assert target(w, 500, "cuda") == "flashjax_lscd_matmul_cuda"
        monkeypatch.setattr(tuned_rows, "device_kind", lambda platform: None)
        assert target(w, 600, "cuda") == "flashjax_lscd_matmul_cuda"


def test_nothing_is_saved_if_not_wanted(file, monkeypatch, same_times):
    fj.autotune(matrix(), [3], save=False)
    assert not file.parent.exists()
    monkeypatch.setenv("FLASHJAX_TUNING", "")
    fj.autotune(matrix(), [3])
    assert tuned_rows.file() is None


def test_place_of_the_file(monkeypatch, tmp_path):
    monkeypatch.delenv("FLASHJAX_TUNING")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned_rows.file() == tmp_path / "flashjax" / "tuning.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(tuned_rows.file()) == "/somewhere/.cache/flashjax/tuning.json"
    monkeypatch.setenv("FLASHJAX_TUNING", "~/tuning.json")
    assert str(tuned_rows.file()) == "/somewhere/tuning.json"


def test_a_link_to_the_file_stays(file, tmp_path):
    file.parent.mkdir()
    file.symlink_to(tmp_path / "elsewhere.json")
    w = matrix()
    remember(w, 5)
    assert file.is_symlink()
    assert target(w, 6) == EXPAND
    assert (tmp_path / "elsewhere.json").exists()


ADDS_MANY = """
import sys
from flashjax import tuned_rows
first = int(sys.argv[1])
for k in range(first, first + 20):
    new = tuned_rows.describe((k, 8), "float16", "lscd16/1", 0.3, k)
    tuned_rows.add("Some GPU", [new])
"""


def test_processes_that_write_at_a_time(file):
    command = [sys.executable, "-c", ADDS_MANY]
    processes = [subprocess.Popen([*command, first]) for first in ("100", "200")]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(tuned_rows.known("Some GPU")) == 40


def test_what_is_done_is_kept(file, same_times):
    """Of several matrices, when the second one is interrupted."""

    def progress(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fj.autotune([matrix(), matrix(m=64)], [4], progress=progress)
    (found,) = tuned_rows.known(device_kind())
    assert found.out_features == M


@pytest.mark.parametrize("named", [False, True])
def test_a_cache_that_cannot_be_read(file, monkeypatch, named):
    """Another user's: said only if somebody named it."""
    if not named:
        monkeypatch.delenv("FLASHJAX_TUNING")
        monkeypatch.setenv("XDG_CACHE_HOME", str(file.parent))

    def read_bytes(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(tuned_rows.Path, "read_bytes", read_bytes)
    said = pytest.warns(UserWarning, match="not used: .*Permission denied")
    with said if named else contextlib.nullcontext():
        assert target(matrix(), 6) == KERNEL


def test_a_name_that_no_file_can_have(file, monkeypatch):
    monkeypatch.setenv("FLASHJAX_TUNING", "/tmp/" + 300 * "n")
    with pytest.warns(UserWarning, match="not used: .*File name too long"):
        assert target(matrix(), 6) == KERNEL


GOOD = {
    "in_features": K,
    "out_features": M,
    "dtype": "float16",
    "layout": "lscd16/1",
    "stored": 0.3,
    "kernel_rows": 5,
    "flashjax": "0.1.0",
}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"version": 2, "devices": {}}',
        '{"version": 1}',
        '{"version": 1, "devices": []}',
        '{"version": 1, "devices": {"a": 1}}',
        '{"version": 1, "devices": {"a": [1]}}',
        '{"version": 1, "devices": {"a": [{"in_features": 3}]}}',
        json.dumps({"version": 1, "devices": {"a": [GOOD | {"kernel_rows": "5"}]}}),
        json.dumps({"version": 1, "devices": {"a": [GOOD | {"kernel_rows": True}]}}),
        json.dumps({"version": 1, "devices": {"a": [GOOD | {"stored": None}]}}),
        json.dumps({"version": 1, "devices": {"a": [GOOD | {"more": 1}]}}),
        json.dumps({"version": 1, "devices": {"a": [GOOD | {"stored": 10**400}]}}),
        json.dumps({"version": 1, "devices": {"a": [GOOD | {"stored": float("nan")}]}}),
        json.dumps({"version": 1, "devices": {"a": [GOOD | {"stored": -1}]}}),
        json.dumps({"version": 1, "devices": {"a": [GOOD | {"kernel_rows": -1}]}}),
        "[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_a_file_that_is_none_of_ours(file, content, no_timing):
    """Products warn and do what is usual; nothing is written over it."""
    file.parent.mkdir()
    content = content if isinstance(content, bytes) else content.encode()
    file.write_bytes(content)
    w = matrix()
    with pytest.warns(UserWarning, match="expected what flashjax.autotune writes"):
        assert target(w, 6) == KERNEL
    with pytest.raises(ValueError, match=r"tuning\.json: expected what flashjax"):
        fj.autotune(w, [3])
    assert file.read_bytes() == content


def test_a_file_that_cannot_be_written(file, monkeypatch, no_timing):
    monkeypatch.setenv("FLASHJAX_TUNING", "/proc/nothing/tuning.json")
    with pytest.raises(OSError, match="/proc/nothing"):
        fj.autotune(matrix(), [3])


class Two(nnx.Module):
    def __init__(self):
        self.a = fj.SparseDense(64, 32, rngs=nnx.Rngs(0), sparsity=0.6)
        self.b = fj.SparseDense(32, 64, rngs=nnx.Rngs(0), sparsity=0.6)

    def get_value(self, x):  # as networks in reinforcement learning have
        return self.b(self.a(x))


def test_models_and_variables(file, same_times):
    model = Two()
    layers = nnx.Sequential(model.a, model.b)
    for weights in (model, layers, nnx.List([model.a, model.b]), [model.a, model.b]):
        found = fj.autotune(weights, [3])
        assert [f.shape for f in found] == [(64, 32), (32, 64)]
    assert fj.autotune(model.a, [3])[0].shape == (64, 32)
    assert fj.autotune(model.a.kernel, [3])[0].shape == (64, 32)
    assert len(fj.autotune((model.a.kernel, matrix()), [3])) == 2
    assert len(fj.autotune({"a": model.a.kernel, "b": matrix()}, iter([3]))) == 2


def test_arrays_of_numpy(file, same_times):
    (found,) = fj.autotune(jax.device_get(matrix()), np.array([3]))
    assert found.shape == (K, M)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([], ValueError, "at least one sparse matrix, got none"),
        (
            nnx.Linear(3, 4, rngs=nnx.Rngs(0)),
            ValueError,
            "at least one sparse matrix, got none",
        ),
        ([np.ones((3, 4))], TypeError, "a SparseMatrix, .*got ndarray"),
        (3, TypeError, "a SparseMatrix, .*got int"),
        (fj.TrainableMatrix, TypeError, "a SparseMatrix, .*got "),
    ],
)
def test_weights_that_are_none(file, no_timing, weights, error, message):
    with pytest.raises(error, match=f"autotune: expected {message}"):
        fj.autotune(weights)


def test_calls_that_are_traced(file, no_timing):
    w = matrix()
    x = jnp.ones((2, K), w.dtype)
    for transform in (jax.jit, lambda f: lambda x: jax.eval_shape(f, x)):
        with pytest.raises(TypeError, match="expected a call outside of jit"):
            transform(lambda x: (fj.autotune(w), x)[1])(x)
    assert not file.exists()


def test_jit_that_is_disabled(file):
    with jax.disable_jit():
        (found,) = fj.autotune(matrix(), [1])
    assert found.timings[0].kernel < 1e5


def test_it_computes_where_the_matrix_is(file, monkeypatch):
    devices = jax.local_devices(backend="cpu")
    if len(devices) < 2:
        pytest.skip("needs two CPU devices: run without FLASHJAX_TEST_PLATFORM")
    with jax.transfer_guard_device_to_device("disallow"):
        (found,) = fj.autotune(jax.device_put(matrix(), devices[1]), [2])
    assert found.device == device_kind()


def test_matrices_that_cannot_be_timed(file, no_timing):
    w = matrix()
    with pytest.raises(ValueError, match="stack"):
        fj.autotune(fj.SparseMatrix.stack([w, w]))
    with pytest.raises(ValueError, match="with elements"):
        fj.autotune(fj.SparseMatrix.from_dense(np.zeros((0, 3), np.float16)))
    few = op_cases.gather_matrix(op_cases.random_dense(64, 64, 0.9, "float16"))
    with pytest.raises(ValueError, match=r"layout 'lscd16/1'.* got 'gather16/1'"):
        fj.autotune(few)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), w)
    deleted = jax.tree.map(jnp.copy, w)
    deleted.values.delete()
    for unreadable in (shapes, deleted):
        with pytest.raises(TypeError, match="whose arrays can be read"):
            fj.autotune(unreadable)
    other = jax.device_put(w, jax.devices()[-1])
    if other.bitmap.devices() != w.bitmap.devices():
        with pytest.raises(ValueError, match="on one device"):
            fj.autotune([w, other])


@pytest.mark.parametrize(
    "rows", [[], [0], [-1], [2.0], [True], ["8"], 4, np.array(4), [10**25]]
)
def test_bad_rows(file, rows, no_timing):
    with pytest.raises(ValueError, match=r"autotune: expected .*rows"):
        fj.autotune(matrix(), rows)
