"""The two native modules: import, version check, registration, and why CUDA is off.

`cpu` is always there. `cuda` is None where the build had no CUDA compiler.
"""

import importlib
import importlib.util
import pathlib
import re
from types import ModuleType

import jax
import jax.ffi
import jaxlib.version


def _import_cpu() -> ModuleType:
    try:
        return importlib.import_module("flashjax._cpu")
    except ModuleNotFoundError as error:
        if error.name != "flashjax._cpu":
            raise
        here = pathlib.Path(__file__).resolve().parent
        raise ImportError(
            f"flashjax was imported from {here}, where its native module is not "
            "built for this Python. In a source tree run `make install` or "
            "`pip install -e .`; to use an installed flashjax, start Python in another "
            "folder."
        ) from error


def _import_cuda(build_info: dict[str, str]) -> tuple[ModuleType | None, str]:
    """Returns the module, or None and the reason."""
    if build_info["cuda_missing"]:
        return None, f"flashjax has no CUDA module: {build_info['cuda_missing']}"
    try:
        return importlib.import_module("flashjax._cuda"), ""
    except ImportError as error:
        return None, f"flashjax's CUDA module does not load: {error}"


def runtime_ffi_version() -> tuple[int, int] | None:
    """(major, minor) of the installed jaxlib's XLA FFI; None if it cannot be told."""
    header = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    try:
        text = header.read_text(encoding="utf-8")
    except OSError:
        return None
    found = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", text))
    if len(found) != 2:
        return None
    return int(found["MAJOR"]), int(found["MINOR"])


def check_ffi_version(
    built: tuple[int, int], runtime: tuple[int, int] | None, built_with: str
) -> None:
    """Raises ImportError if the runtime would refuse handlers of version `built`.

    XLA itself reports this at the first operation of any kind, as a backend that
    cannot be initialised.
    """
    if runtime is None or (built[0] == runtime[0] and built[1] <= runtime[1]):
        return
    raise ImportError(
        f"flashjax was built with the XLA FFI headers {built[0]}.{built[1]} of jaxlib "
        f"{built_with}, but the installed jaxlib {jaxlib.version.__version__} has XLA "
        f"FFI {runtime[0]}.{runtime[1]}, which cannot run it. Either rebuild flashjax "
        "for this jaxlib (`pip install --force-reinstall --no-deps .` in its source "
        f"tree) or install jaxlib {built_with} or newer."
    )


cpu = _import_cpu()
check_ffi_version(
    cpu.xla_ffi_version(), runtime_ffi_version(), cpu.build_info()["jaxlib"]
)
cuda, _cuda_missing = _import_cuda(cpu.build_info())

for _name, _handler in cpu.registrations().items():
    jax.ffi.register_ffi_target(_name, _handler, platform="cpu", api_version=1)
if cuda is not None:
    # JAX accepts this without a GPU, and needs it to lower for one.
    for _name, _handler in cuda.registrations().items():
        jax.ffi.register_ffi_target(_name, _handler, platform="CUDA", api_version=1)


def _jax_platforms() -> str:
    return jax.config.values.get("jax_platforms") or ""


def _jax_cuda_plugins() -> list[str]:
    if importlib.util.find_spec("jax_plugins") is None:
        return []
    names = ["xla_cuda12", "xla_cuda13"]
    return [n for n in names if importlib.util.find_spec(f"jax_plugins.{n}")]


def cuda_unavailable_reason() -> str:
    """Says why the CUDA kernels cannot run here, and the cure.

    Initialises JAX's backends.

    Returns:
        One sentence, or "" if they can run.
    """
    if cuda is None:
        return _cuda_missing
    if cuda.device_count() == 0:
        error = cuda.driver_error() or "the driver lists no device"
        return f"no usable NVIDIA GPU: {error}"
    try:
        devices = jax.devices("cuda")
    except RuntimeError as error:
        platforms = _jax_platforms()
        if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
            return f"JAX was told not to use CUDA: JAX_PLATFORMS is {platforms}"
        if not _jax_cuda_plugins():
            return (
                "this JAX is for the CPU alone: install its CUDA plugin with "
                "`pip install 'jax[cuda13]'` (or cuda12)"
            )
        return f"JAX found no CUDA device: {error}"
    capability = getattr(devices[0], "compute_capability", "8.0")
    if float(capability) < 8.0:
        return (
            f"{devices[0].device_kind} has compute capability {capability}, "
            "and 8.0 or newer is needed"
        )
    return ""


def cuda_available() -> bool:
    """Whether the CUDA kernels can run here. Initialises JAX's backends."""
    return not cuda_unavailable_reason()


def build_info() -> dict[str, str]:
    """What the native modules were built with.

    Returns:
        "jaxlib" and "compiler": versions; "cuda_version" and "cuda_architectures":
        empty without CUDA, and then "cuda_missing" says why.
    """
    return dict(cpu.build_info())
