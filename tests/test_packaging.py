"""What is installed, what a source tree says, and what a source archive holds."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
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


def test_source_archive_builds_elsewhere(tmp_path):
    """It holds what CMake and the wheel need, and nothing that was built."""
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
