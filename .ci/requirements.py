"""Prints the requirements of building, running and testing, or of an extra alone.

    requirements.py test    build requirements, dependencies and the extra "test"
    requirements.py dev     the extra "dev" alone; so for "docs"

The project is built without isolation, so that a rebuild is incremental; then nobody
but us installs what it needs.
"""

import pathlib
import sys
import tomllib

root = pathlib.Path(__file__).parent.parent
pyproject = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
project = pyproject["project"]
extra = sys.argv[1]

lines = list(project["optional-dependencies"][extra])
if extra not in ("dev", "docs"):
    # jaxlib is pinned for isolated builds; here the headers are those of the jax used.
    build = pyproject["build-system"]["requires"]
    lines += [line for line in build if not line.startswith("jaxlib")]
    lines += ["cmake>=3.24", "ninja"]
    lines += project["dependencies"]
print("\n".join(lines))
