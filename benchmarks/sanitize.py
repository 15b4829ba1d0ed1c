"""Runs tests of the CUDA kernels under compute-sanitizer and writes a summary.

    python benchmarks/sanitize.py [--tools memcheck,racecheck] [pytest arguments]

The tools run side by side, each with tests of its own, and look into the kernels of
this project alone: XLA's, hundreds of times slower, would take most of the time.

Every read of memory that was not written is an error to initcheck, so the workspace's
flags are cleared for it (cuda/lscd_stream_k.cuh says why they need not be).

Writes `benchmarks/results/sanitize-DEVICE.json`: of every tool the errors, warnings,
tests, and the first lines of what it found.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

import report
import typer

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Small shapes, every kernel by name; the sanitizers are hundreds of times slower.
TESTS = ("tests/test_cuda_kernels.py", "-k", "not test_shares_of_blocks")
KERNELS = "flashjax"  # in their names, which are in its namespace
_SHOWN = 12  # lines of findings that are kept

app = typer.Typer(add_completion=False)


def summarise(log: str) -> dict:
    """Errors and warnings of one tool's log, and how its findings begin."""
    counts = {"errors": 0, "warnings": 0}
    for errors in re.findall(r"ERROR SUMMARY: (\d+) error", log):
        counts["errors"] += int(errors)
    races = re.findall(r"RACECHECK SUMMARY: .*\((\d+) errors?, (\d+) warn", log)
    for errors, warnings in races:
        counts["errors"] += int(errors)
        counts["warnings"] += int(warnings)
    lines = [line.removeprefix("=========").strip() for line in log.splitlines()]
    kept = [
        line
        for line in lines
        if line and "SUMMARY" not in line and line != "COMPUTE-SANITIZER"
    ]
    return counts | {"findings": kept[:_SHOWN]}


def run_tool(tool: str, arguments: list[str]) -> dict:
    """Runs pytest under one tool."""
    environment = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false")
    if tool == "initcheck":
        environment["FLASHJAX_CLEAR_WORKSPACE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder, "log")
        command = ["compute-sanitizer", f"--tool={tool}", f"--log-file={log}"]
        command += ["--target-processes=all", "--print-limit=20"]
        command += [f"--kernel-regex=kns={KERNELS}"]
        command += [sys.executable, "-m", "pytest", "-m", "gpu", "-q", *arguments]
        began = time.perf_counter()
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            check=False,
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - began
        if not log.exists():
            raise SystemExit(f"{tool} wrote no log: {done.stderr.strip()[-500:]}")
        found = summarise(log.read_text(encoding="utf-8", errors="replace"))
    last = done.stdout.strip().splitlines()[-1:] or ["pytest printed nothing"]
    return {"tool": tool, "tests": last[0], "seconds": round(seconds, 1), **found}


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def main(
    context: typer.Context,
    tools: str = typer.Option(",".join(TOOLS), help="Comma-separated."),
    name: str = typer.Option("sanitize", help="Stem of the result."),
) -> None:
    """Runs tests of the CUDA kernels under compute-sanitizer."""
    chosen = tools.split(",")
    if set(chosen) - set(TOOLS):
        raise SystemExit(f"expected tools from {TOOLS}, got {tools!r}")
    if shutil.which("compute-sanitizer") is None:
        raise SystemExit("compute-sanitizer was not found; it comes with CUDA")
    arguments = context.args or list(TESTS)
    results = []
    with ThreadPoolExecutor(len(chosen)) as pool:
        runs = [pool.submit(run_tool, tool, arguments) for tool in chosen]
        for run in as_completed(runs):
            results.append(run.result())
            print(results[-1], flush=True)
            content = {"arguments": arguments, "results": results}
            path = report.save(name, content)
    print(f"written to {path}")
    raise SystemExit(any(r["errors"] for r in results))


if __name__ == "__main__":
    app()
