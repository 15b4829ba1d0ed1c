"""Checks what wheels hold: check_wheel.py WHEEL... [--cuda [--cuobjdump-optional]].

With --cuda the CUDA module must be there, with machine code for sm_80 and sm_90a and
with PTX; that needs cuobjdump, a part of the CUDA toolkit. Where that may be missing,
the module is still looked for.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NEEDED = (
    "flashjax/__init__.py",
    "flashjax/py.typed",
    "flashjax/models/opt/__init__.py",
)
CUDA_CODE = ["sm_80", "sm_90a"]
CUDA_PTX = ["sm_80"]


def find_cuobjdump() -> str | None:
    """Where the program is."""
    folders = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ["PATH"], *(f"{f}/bin" for f in folders if f)])
    return shutil.which("cuobjdump", path=path)


def architectures(cuobjdump: str, module: Path, kind: str) -> list[str]:
    """What a module holds of "elf" (machine code) or "ptx"."""
    command = [cuobjdump, f"--list-{kind}", str(module)]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    return sorted(set(re.findall(r"\.(sm_\w+)\.", listed.stdout)))


def problems(wheel: Path, cuda: bool, cuobjdump: str | None) -> list[str]:
    """What is wrong with a wheel; its machine code counts if there is cuobjdump."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        found = [f"{name} is missing" for name in NEEDED if name not in names]
        modules = {"_cpu", "_cuda"} if cuda else {"_cpu"}
        paths = {
            m: [n for n in names if n.startswith(f"flashjax/{m}.")] for m in modules
        }
        found += [f"the module {m} is missing" for m in modules if not paths[m]]
        if not any(name.endswith("licenses/LICENSE") for name in names):
            found.append("the licence is missing")
        other = {name.split("/")[0] for name in names} - {"flashjax"}
        found += [f"{n} is there" for n in other if not n.endswith(".dist-info")]
        if not cuda or not paths["_cuda"] or not cuobjdump:
            return found
        with tempfile.TemporaryDirectory() as folder:
            module = Path(archive.extract(paths["_cuda"][0], folder))
            for kind, wanted in (("elf", CUDA_CODE), ("ptx", CUDA_PTX)):
                got = architectures(cuobjdump, module, kind)
                if got != wanted:
                    found.append(f"CUDA {kind}: expected {wanted}, got {got}")
    return found


def main() -> None:  # noqa: D103
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--cuobjdump-optional", action="store_true")
    arguments = parser.parse_args()
    cuobjdump = find_cuobjdump()
    if arguments.cuda and not cuobjdump:
        if not arguments.cuobjdump_optional:
            sys.exit("check_wheel.py: --cuda needs cuobjdump, of the CUDA toolkit")
        print("There is no cuobjdump: the machine code is not looked at")
    failed = False
    for wheel in arguments.wheels:
        found = problems(wheel, arguments.cuda, cuobjdump)
        failed |= bool(found)
        print(f"{wheel.name}: {'; '.join(found) or 'ok'}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
