"""Where the tests run, and how strict JAX is meanwhile.

The default is the CPU, as 8 devices. `pytest -m gpu`, or FLASHJAX_TEST_PLATFORM=cuda
for the other tests as well, leaves the choice to JAX, which prefers a GPU.
"""

import gc
import itertools
import os
import re

import hypothesis
import pytest

# Cases for each of the fuzz tests (tests/fuzz), chosen by --hypothesis-profile. The
# default draws the same ones every time; the others go on where luck takes them.
_PROFILES = {"default": 160, "nightly": 13_000, "gpu": 1_104}

for _name, _cases in _PROFILES.items():
    hypothesis.settings.register_profile(
        _name,
        max_examples=_cases,
        deadline=None,
        derandomize=_name == "default",
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
hypothesis.settings.load_profile("default")


def _platform(config: pytest.Config) -> str:
    named = os.environ.get("FLASHJAX_TEST_PLATFORM")
    if named is None:
        selects_gpu = re.search(r"(?<!not )\bgpu\b", config.getoption("markexpr"))
        return "cuda" if selects_gpu else "cpu"
    if named not in ("cpu", "cuda"):
        raise pytest.UsageError(
            f"FLASHJAX_TEST_PLATFORM must be cpu or cuda, got {named!r}"
        )
    return named


def pytest_configure(config: pytest.Config) -> None:
    # What somebody tuned on this machine is none of the tests' business.
    os.environ["FLASHJAX_TUNING"] = ""
    # Before the first import of jax: it reads these once.
    if _platform(config) == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
        flags = os.environ.get("XLA_FLAGS", "")
        if "xla_force_host_platform_device_count" not in flags:
            flags += " --xla_force_host_platform_device_count=8"
        os.environ["XLA_FLAGS"] = flags.strip()
        # Compiling is most of the work; what has not changed is compiled once.
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(config.cache.mkdir("jax"))
            os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    else:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    import jax

    # A conftest.py further down may have imported it: then the variables came too late.
    if _platform(config) == "cpu":
        jax.config.update("jax_platforms", "cpu")
        jax.config.update(
            "jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"]
        )
        least = os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", float(least))
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_finish() -> None:
    # The heap fills with what JAX keeps; to look through it for garbage takes long.
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)


def pytest_report_header() -> str:
    import jax

    import flashjax as fj

    devices = jax.devices()
    return (
        f"flashjax {fj.__version__} from {os.path.dirname(fj.__file__)}, "
        f"jax {jax.__version__}: {len(devices)} x {devices[0].device_kind}; "
        f"CUDA: {fj.cuda_unavailable_reason() or 'available'}"
    )


def pytest_terminal_summary(terminalreporter) -> None:
    reports = itertools.chain(*terminalreporter.stats.values())
    cases = sum(
        dict(report.user_properties).get("cases", 0)
        for report in reports
        if getattr(report, "when", None) == "call"
    )
    if cases:
        terminalreporter.write_line(f"fuzz tests: {cases} cases")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("nightly") is not None and (
        not re.search(r"(?<!not )\bnightly\b", item.config.getoption("markexpr"))
    ):
        pytest.skip("takes minutes or gigabytes: run `pytest -m nightly`")
    if item.get_closest_marker("gpu") is None:
        return
    import flashjax as fj

    if _platform(item.config) == "cpu":
        pytest.skip("needs a GPU: run `pytest -m gpu` on a machine that has one")
    reason = fj.cuda_unavailable_reason()
    if reason:
        pytest.skip(f"needs a GPU: {reason}")


@pytest.fixture
def x64():
    """With the 64-bit dtypes of JAX."""
    import jax

    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def product(request: pytest.FixtureRequest):
    """sparse_matmul; the parameter is an implementation and a platform."""
    import op_cases

    with op_cases.multiplying(*request.param) as multiply:
        yield multiply


@pytest.fixture(scope="session")
def small():
    """A dense (70, 33) matrix, the same packed, and x (4, 5, 70)."""
    import op_cases

    dense, w, _ = op_cases.packed_and_x((70, 33), 0.6, 1, "float16")
    return dense, w, op_cases.random_x((4, 5, 70), "float16")
