import importlib
import os
import subprocess
import sys
import textwrap

import jax
import pytest

import flashjax as fj
from flashjax import _native


def test_registered_names_follow_the_platform():
    assert _native.cpu.registrations()
    for name in _native.cpu.registrations():
        assert name.startswith("flashjax_")
        assert name.endswith("_cpu")
    if _native.cuda is not None:
        for name in _native.cuda.registrations():
            assert name.startswith("flashjax_")
            assert name.endswith("_cuda")


def test_ffi_version_of_the_build_is_one_the_runtime_takes():
    major, minor = _native.cpu.xla_ffi_version()
    runtime = _native.runtime_ffi_version()
    assert runtime is not None
    assert major == runtime[0]
    assert minor <= runtime[1]


@pytest.mark.parametrize("runtime", [(0, 5), (0, 6), None])
def test_version_guard_accepts(runtime):
    _native.check_ffi_version((0, 5), runtime, "0.12.0")


@pytest.mark.parametrize("runtime", [(0, 4), (1, 5)])
def test_version_guard_names_versions_and_cure(runtime):
    with pytest.raises(ImportError) as caught:
        _native.check_ffi_version((0, 5), runtime, "0.12.0")
    message = str(caught.value)
    assert "0.5 of jaxlib 0.12.0" in message
    assert f"{runtime[0]}.{runtime[1]}" in message
    assert jax.lib.__version__ in message
    assert "rebuild" in message


def test_build_info():
    info = _native.build_info()
    assert set(info) == {
        "jaxlib",
        "compiler",
        "cuda_version",
        "cuda_architectures",
        "cuda_missing",
    }
    assert info["jaxlib"]
    # Either CUDA was built, or it is said why not.
    assert bool(info["cuda_version"]) != bool(info["cuda_missing"])
    assert (_native.cuda is None) == bool(info["cuda_missing"])


def test_cuda_available_agrees_with_its_reason():
    assert fj.cuda_available() == (fj.cuda_unavailable_reason() == "")


class _Cuda:
    """Stands in for flashjax._cuda."""

    def __init__(self, devices: int, error: str = ""):
        self._devices, self._error = devices, error

    def device_count(self):
        return self._devices

    def driver_error(self):
        return self._error


class _Device:
    device_kind = "Tesla T4"
    compute_capability = "7.5"


def _no_cuda_backend(platform):
    raise RuntimeError(f"Unknown backend {platform}")


def test_reason_not_built(monkeypatch):
    monkeypatch.setattr(_native, "cuda", None)
    monkeypatch.setattr(_native, "_cuda_missing", "nvcc was not found")
    assert fj.cuda_unavailable_reason() == "nvcc was not found"
    assert not fj.cuda_available()


def test_reason_comes_from_the_build(monkeypatch):
    info = _native.build_info() | {"cuda_missing": "nvcc was not found"}
    module, reason = _native._import_cuda(info)
    assert module is None
    assert "nvcc was not found" in reason


def test_reason_no_driver(monkeypatch):
    monkeypatch.setattr(_native, "cuda", _Cuda(0, "no NVIDIA driver is installed"))
    assert "no NVIDIA driver is installed" in fj.cuda_unavailable_reason()


def test_reason_no_device(monkeypatch):
    monkeypatch.setattr(_native, "cuda", _Cuda(0))
    assert "no device" in fj.cuda_unavailable_reason()


@pytest.mark.parametrize(
    ("platforms", "plugins", "expected"),
    [
        ("cpu", ["xla_cuda13"], "JAX_PLATFORMS is cpu"),
        ("", [], "jax[cuda13]"),
        ("", ["xla_cuda13"], "Unknown backend cuda"),
        ("cuda,cpu", ["xla_cuda13"], "Unknown backend cuda"),
    ],
)
def test_reason_no_backend(monkeypatch, platforms, plugins, expected):
    monkeypatch.setattr(_native, "cuda", _Cuda(1))
    monkeypatch.setattr(_native, "_jax_platforms", lambda: platforms)
    monkeypatch.setattr(_native, "_jax_cuda_plugins", lambda: plugins)
    monkeypatch.setattr(jax, "devices", _no_cuda_backend)
    assert expected in fj.cuda_unavailable_reason()


def test_reason_old_gpu(monkeypatch):
    monkeypatch.setattr(_native, "cuda", _Cuda(1))
    monkeypatch.setattr(jax, "devices", lambda platform: [_Device()])
    reason = fj.cuda_unavailable_reason()
    assert "Tesla T4" in reason
    assert "7.5" in reason
    assert "8.0" in reason


def test_reason_is_empty_with_a_gpu(monkeypatch):
    device = _Device()
    device.compute_capability = "9.0"
    monkeypatch.setattr(_native, "cuda", _Cuda(1))
    monkeypatch.setattr(jax, "devices", lambda platform: [device])
    assert fj.cuda_unavailable_reason() == ""
    assert fj.cuda_available()


def test_cuda_module_loads_without_a_driver():
    if _native.cuda is None:
        pytest.skip(f"no CUDA module: {_native.build_info()['cuda_missing']}")
    assert _native.cuda.device_count() >= 0
    assert isinstance(_native.cuda.driver_error(), str)
    assert (_native.cuda.device_count() == 0) or not _native.cuda.driver_error()


def test_reloading_registers_again_without_harm():
    importlib.reload(_native)
    assert _native.cpu.registrations()


def _run(code: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        **kwargs,
    )


def test_import_initialises_no_backend(tmp_path):
    # A library that starts the backends at import makes later settings fail.
    result = _run(
        """
        import flashjax
        import jax
        jax.config.update("jax_num_cpu_devices", 3)
        assert len(jax.devices("cpu")) == 3
        """,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    )
    assert result.returncode == 0, result.stderr
