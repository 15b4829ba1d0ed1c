"""Runs the GPU tests and writes a summary of their log.

    python benchmarks/gpu_tests.py [pytest arguments]

Writes `benchmarks/results/gpu-tests-DEVICE.json`, or `gpu-fuzz-DEVICE.json` if the fuzz
tests are named: counts by outcome and by test file, what failed, the cases of the fuzz
tests, and the time.
"""

import collections
import pathlib
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET

import report

ROOT = pathlib.Path(__file__).resolve().parent.parent


def outcome(case: ET.Element) -> str:
    for name in ("failure", "error", "skipped"):
        if case.find(name) is not None:
            return {"failure": "failed", "error": "errors"}.get(name, name)
    return "passed"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        xml = pathlib.Path(folder, "log.xml")
        command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={xml}"]
        status = subprocess.run([*command, *sys.argv[1:]], cwd=ROOT, check=False)
        if not xml.exists():
            raise SystemExit(f"pytest ended with {status.returncode} and wrote no log")
        suite = ET.parse(xml).getroot().find("testsuite")
    cases = list(suite.iter("testcase"))
    files: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for case in cases:
        files[case.get("classname")][outcome(case)] += 1
    content = {
        "command": "pytest -m gpu " + " ".join(sys.argv[1:]),
        "outcomes": dict(collections.Counter(map(outcome, cases))),
        "seconds": round(float(suite.get("time")), 1),
        "failed": [
            f"{case.get('classname')}::{case.get('name')}"
            for case in cases
            if outcome(case) in ("failed", "errors")
        ],
        # Of the fuzz tests, each of which is one test above.
        "fuzz_cases": sum(
            int(noted.get("value"))
            for noted in suite.iter("property")
            if noted.get("name") == "cases"
        ),
        "files": {name: dict(counts) for name, counts in sorted(files.items())},
    }
    is_fuzz = any(argument.startswith("tests/fuzz") for argument in sys.argv[1:])
    path = report.save("gpu-fuzz" if is_fuzz else "gpu-tests", content)
    print(f"written to {path}")
    raise SystemExit(status.returncode)


if __name__ == "__main__":
    main()
