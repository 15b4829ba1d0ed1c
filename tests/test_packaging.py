"""What is installed, what a source tree says, and what a source archive holds."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

import flashjax as fj

ROOT = Path(__file__).resolve().parent.parent

# An editable install answers to the package's name before sys.path is asked.
WITHOUT_EDITABLE = """
    import sys
    sys.meta_path[:] = [
        finder for finder in sys.meta_path
        if "Editable" not in type(finder).__name__ + type(finder).__module__
        and "Scikit" not in type(finder).__name__
    ]
"""


def run_python(code: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        **kwargs,
    )


@pytest.fixture
def source_tree(tmp_path):
    """A copy of the package as in a fresh clone."""
    tree = tmp_path / "clone"
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "flashjax", tree / "flashjax", symlinks=True, ignore=ignore)
    shutil.copytree(ROOT / "models", tree / "models", ignore=ignore)
    return tree


def test_bare_source_tree_says_how_to_build(source_tree):
    result = run_python(
        WITHOUT_EDITABLE + "    import flashjax\n",
        cwd=source_tree,
        env={k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"},
    )
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: flashjax was imported from")
    assert str(source_tree / "flashjax") in message
    assert "make" in message
    assert "pip install" in message


def test_version_is_the_installed_one():
    assert fj.__version__ == importlib.metadata.version("flashjax")
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", fj.__version__)


def test_public_names_exist():
    for name in fj.__all__:
        assert hasattr(fj, name), name
    assert len(set(fj.__all__)) == len(fj.__all__)


def test_models_are_part_of_the_package(tmp_path):
    link = ROOT / "flashjax" / "models"
    if not (ROOT / "PKG-INFO").exists():  # a source archive holds a copy instead
        assert link.is_symlink()
        assert os.readlink(link) == "../models"
    result = run_python(
        "import flashjax.models.opt; print(flashjax.models.opt.__file__)", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).parent.name == "opt"


def test_console_command_is_installed():
    (entry,) = (
        entry
        for entry in importlib.metadata.entry_points(group="console_scripts")
        if entry.name == "flashjax"
    )
    assert entry.value.startswith("flashjax.cli:")
    assert callable(entry.load())


def test_typing_marker_is_installed():
    assert (Path(fj.__file__).parent / "py.typed").is_file()


def test_content_of_the_source_archive(tmp_path):
    """What CMake and the wheel need, nothing that was built; .ci/run builds from it."""
    pytest.importorskip("scikit_build_core", reason="builds the archive")
    archive = run_python(
        f"""
        from scikit_build_core.build import build_sdist
        print(build_sdist({str(tmp_path)!r}))
        """,
        cwd=ROOT,
    )
    assert archive.returncode == 0, archive.stderr
    path = tmp_path / archive.stdout.split()[-1]
    with tarfile.open(path) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    for needed in (
        ".ci/find-python",
        "CMakeLists.txt",
        "LICENSE",
        "Makefile",
        "README.md",
        "bindings/cpu_module.cc",
        "cmake/FlashjaxCuda.cmake",
        "cpu/lscd_layout.h",
        "cuda/lscd_matmul_launch.cu",
        "flashjax/__init__.py",
        "flashjax/py.typed",
        "models/opt/__init__.py",
    ):
        assert needed in names
    # Either the link or, in its place, what it leads to.
    assert "flashjax/models" in names or "flashjax/models/opt/__init__.py" in names
    for name in names:
        assert not name.startswith(("build/", ".venv", ".git/"))
        assert not name.endswith((".so", ".o", ".pyc"))


WHEEL = (
    "flashjax/__init__.py",
    "flashjax/_cpu.abi3.so",
    "flashjax/_cuda.abi3.so",
    "flashjax/models/opt/__init__.py",
    "flashjax/py.typed",
    "flashjax-0.1.0.dist-info/licenses/LICENSE",
)


def check_wheel(tmp_path, names, *options, listed=None):
    """Runs .ci/check_wheel.py with a cuobjdump that lists these, or with none."""
    wheel = tmp_path / "flashjax-0.1.0-cp312-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.writestr(name, b"")
    if listed:
        program = tmp_path / "cuobjdump"
        files = {f"--list-{kind}": text for kind, text in listed.items()}
        program.write_text(
            f"#!{sys.executable}\nimport sys\nprint({files!r}[sys.argv[1]])\n"
        )
        program.chmod(0o755)
    return subprocess.run(
        [sys.executable, ROOT / ".ci/check_wheel.py", wheel, *options],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PATH": str(tmp_path), "CUDA_HOME": ""},
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda names: names, None),
        (lambda names: names - {"flashjax/py.typed"}, "py.typed is missing"),
        (lambda names: names - {"flashjax/_cpu.abi3.so"}, "module _cpu is missing"),
        (lambda names: names - {WHEEL[-1]}, "the licence is missing"),
        (lambda names: names | {"tests/conftest.py"}, "tests is there"),
    ],
)
def test_check_of_wheels(tmp_path, change, problem):
    result = check_wheel(tmp_path, change(set(WHEEL)))
    assert result.returncode == (problem is not None), result.stderr
    assert f"{problem or ': ok'}\n" in result.stdout


@pytest.mark.parametrize(
    ("elf", "ptx", "problem"),
    [
        (("sm_80", "sm_90a"), ("sm_80",), None),
        (("sm_80",), ("sm_80",), "CUDA elf: expected ['sm_80', 'sm_90a'], got"),
        (("sm_80", "sm_90a"), (), "CUDA ptx: expected ['sm_80'], got []"),
    ],
)
def test_check_of_machine_code(tmp_path, elf, ptx, problem):
    listed = {
        "elf": "\n".join(f"ELF file 1: _cuda.abi3.1.{arch}.cubin" for arch in elf),
        "ptx": "\n".join(f"PTX file 1: _cuda.abi3.1.{arch}.ptx" for arch in ptx),
    }
    result = check_wheel(tmp_path, WHEEL, "--cuda", listed=listed)
    assert result.returncode == (problem is not None), result.stderr
    assert (problem or ": ok\n") in result.stdout


def test_check_of_the_cuda_module_without_cuobjdump(tmp_path):
    if Path("/usr/local/cuda/bin/cuobjdump").exists():
        pytest.skip("there is a cuobjdump")
    assert "needs cuobjdump" in check_wheel(tmp_path, WHEEL, "--cuda").stderr
    options = "--cuda", "--cuobjdump-optional"
    result = check_wheel(tmp_path, WHEEL, *options)
    assert result.returncode == 0, result.stderr
    assert "the machine code is not looked at" in result.stdout
    without = set(WHEEL) - {"flashjax/_cuda.abi3.so"}
    result = check_wheel(tmp_path, without, *options)
    assert result.returncode == 1
    assert "the module _cuda is missing" in result.stdout
