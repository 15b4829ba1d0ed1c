"""Runs tests of the CUDA kernels under compute-sanitizer and writes a summary.

    python benchmarks/sanitize.py [--tools memcheck,racecheck] [pytest arguments]

The tests run once without a tool, so that all that XLA compiles for them is in a cache:
compiling under a sanitizer takes most of the time, and processes die of segmentation
faults in it. Then the tests of each tool are dealt out to many processes, each under a
sanitizer of its own, several at a time. If one dies nevertheless or is ended by the
system (`died` counts that), the tests that it had not ended are run again. Tests of
XLA's products, in which no kernel of this project runs, are left out.

The tools look into the kernels of this project alone: XLA's own kernels, hundreds of
times slower, and tuning them would take most of the time. But initcheck must see what
those write; of it only errors in this project's kernels count.

Every read of memory that was not written is an error to initcheck, so the workspace's
flags are cleared for it (cuda/lscd_stream_k.cuh says why they need not be).

Writes `benchmarks/results/sanitize-DEVICE.json` when all tests of a tool ended: its
errors, warnings, tests, and what it found, by kernel and kind. What takes longer than
`--minutes` is ended, and the tool recorded as not finished. What is there of tools that
are not run this time stays; each tool's result has the commit it is of.
"""

import collections
import contextlib
import dataclasses
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Annotated

import report
import typer

from flashjax.cli.environment import environment

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Every kernel by name, and the op in every transformation; small shapes, as the
# sanitizers are hundreds of times slower. The mma kernel takes 32 columns a launch: of
# thousands it is the same launch many times.
TESTS = (
    "tests/test_cuda_kernels.py",
    "tests/test_activation.py",
    "tests/test_gather.py",
    "tests/test_decode_attention.py",
    "tests/test_matmul.py",
    "tests/test_sparse_matrix.py",
    "tests/test_trainable_matrix.py",
    "tests/transforms",
    "-k",
    "not test_shares_of_blocks and not test_large and not xla and not "
    "(test_tiles_of_columns and not wgmma and (2048 or 4096))",
)
KERNELS = "flashjax"  # in their names, which are in its namespace
FAST_COMPILE = "--xla_gpu_autotune_level=0"
OUTCOMES = ("PASSED", "FAILED", "ERROR", "SKIPPED")  # as pytest prints them
_SHOWN = 40  # kinds of findings that are kept
_LAST = 3  # and of what a process printed that did not end well
_TRIES = 3  # processes in a row that die before a test has ended
_PYTEST_STATUSES = (0, 1, 2, 3, 4, 5)

app = typer.Typer(add_completion=False)


def records(log: str) -> list[list[str]]:
    """What a log reports: first lines, each with the indented ones after it."""
    found: list[list[str]] = []
    for line in log.splitlines():
        text = line.removeprefix("=========").rstrip()
        if not text or "SUMMARY" in text or text.strip() == "COMPUTE-SANITIZER":
            continue
        if found and text.startswith("  "):
            found[-1].append(text.strip())
        else:
            found.append([text.strip()])
    return found


def kind(record: list[str]) -> str:
    """What is alike in records of one kind: the accesses and the kernels' names."""
    text = "; ".join(record[:3])
    text = re.sub(rf"void {KERNELS}::(\w+)<.*?\)(?=\+0x)", r"\1", text)
    return re.sub(r"\+0x[0-9a-f]+| \[\d+ hazards?\]|0x[0-9a-f]+", "", text)


def summarise(logs: list[str], ours_alone: bool = False) -> dict:
    """Errors, warnings and kinds of findings in the logs of a tool's processes.

    With `ours_alone` what is reported of other kernels than this project's is left out.
    """
    counts = {"errors": 0, "warnings": 0}
    findings: collections.Counter[str] = collections.Counter()
    for log in logs:
        reported = records(log)
        if ours_alone:
            reported = [r for r in reported if any(KERNELS in line for line in r)]
        findings.update(map(kind, reported))
        if "SUMMARY" not in log or ours_alone:
            # The process was ended, or the summary counts what does not matter.
            warned = sum(record[0].startswith("Warning:") for record in reported)
            counts["errors"] += len(reported) - warned
            counts["warnings"] += warned
            continue
        for errors in re.findall(r"ERROR SUMMARY: (\d+) error", log):
            counts["errors"] += int(errors)
        races = re.findall(r"RACECHECK SUMMARY: .*\((\d+) errors?, (\d+) warn", log)
        for errors, warnings in races:
            counts["errors"] += int(errors)
            counts["warnings"] += int(warnings)
    return counts | {"findings": findings}


def run_within(seconds: float, command: list[str], **kwargs) -> int | None:
    """Runs a command; its exit status, or None if it was ended after a time.

    What it started is ended with it.
    """
    process = subprocess.Popen(command, start_new_session=True, **kwargs)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        for last in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, last)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)


def collect(arguments: list[str]) -> list[str]:
    """The tests that pytest would run."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q"]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    if done.returncode or not tests:
        raise SystemExit(f"expected tests of pytest, got\n{done.stdout}{done.stderr}")
    return tests


def environment_of_tests(cache: str, gpu: int | None) -> dict[str, str]:
    """That of processes which share a cache of programs, on one GPU if it is given."""
    return dict(
        os.environ,
        **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}),
        PYTHONUNBUFFERED="1",
        XLA_PYTHON_CLIENT_PREALLOCATE="false",
        XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILE}".strip(),
        JAX_COMPILATION_CACHE_DIR=cache,
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
    )


def fill_cache(tests: list[str], environment: dict[str, str], workers: int) -> None:
    """Runs the tests without a tool. Those that fail will fail under it as well."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q"]
    command += ["-p", "no:benchmark", "-n", str(workers), *tests]
    subprocess.run(command, cwd=ROOT, env=environment, check=False)


@dataclasses.dataclass(frozen=True)
class Sanitizer:
    """A tool, and how processes run under it."""

    tool: str
    options: list[str]
    environment: dict[str, str]
    logs: pathlib.Path | None  # a folder for those of processes that found or failed
    deadline: float  # of time.monotonic()


def run_tests(sanitizer: Sanitizer, tests: list[str]) -> dict:
    """Runs some tests in one process."""
    tool, environment = sanitizer.tool, sanitizer.environment
    if tool == "initcheck":
        environment = environment | {"FLASHJAX_CLEAR_WORKSPACE": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        # %p: the number of the process.
        command = ["compute-sanitizer", f"--tool={tool}", f"--log-file={folder}/log.%p"]
        command += ["--target-processes=all", *sanitizer.options]
        if tool == "initcheck":
            # It has to see what kernels of XLA write, and what these read is no matter.
            command += ["--print-limit=1000", "--check-api-memory-access=no"]
        else:
            command += ["--print-limit=20", f"--kernel-regex=kns={KERNELS}"]
        command += [sys.executable, "-m", "pytest", "-m", "gpu", "-v"]
        command += ["-p", "no:benchmark", "-p", "no:xdist", *tests]
        with open(folder / "printed", "w") as printed:
            status = run_within(
                max(0.0, sanitizer.deadline - time.monotonic()),
                command,
                cwd=ROOT,
                env=environment,
                stdout=printed,
                stderr=subprocess.STDOUT,
            )
        lines = (folder / "printed").read_text(errors="replace").strip().splitlines()
        logs = [path.read_text(errors="replace") for path in folder.glob("log.*")]
    outcomes = {
        line.split(f" {word}")[0]: word.lower()
        for line in lines
        for word in OUTCOMES
        if "::" in line and f" {word}" in line
    }
    found = summarise(logs, ours_alone=tool == "initcheck")
    if not logs and status in _PYTEST_STATUSES:
        no_log = collections.Counter(["no log"])
        found = {"errors": 1, "warnings": 0, "findings": no_log}
    if sanitizer.logs is not None and (found["findings"] or status != 0):
        path = sanitizer.logs / f"{tool}-{time.monotonic_ns()}.txt"
        path.write_text("\n".join([*lines, *logs]), encoding="utf-8")
    # Where tests failed, or were ended.
    ended = lines[-_LAST:] if status != 0 or not logs else []
    return {"exit_status": status, "outcomes": outcomes, "ended": ended, **found}


def run_until_ended(sanitizer: Sanitizer, tests: list[str]) -> dict:
    """The same; again with what has not ended when it dies, not by a time limit."""
    found: collections.Counter[str] = collections.Counter()
    result: dict = {"outcomes": {}, "errors": 0, "warnings": 0, "findings": found}
    died = fruitless = 0
    while fruitless < _TRIES:
        left = [test for test in tests if test not in result["outcomes"]]
        # What died at its very end has its last test run again, for the log.
        last = run_tests(sanitizer, left or tests[-1:])
        result = {
            "exit_status": last["exit_status"],
            "outcomes": result["outcomes"] | last["outcomes"],
            "ended": last["ended"],
            "errors": result["errors"] + last["errors"],
            "warnings": result["warnings"] + last["warnings"],
            "findings": result["findings"] + last["findings"],
        }
        if last["exit_status"] in (None, *_PYTEST_STATUSES):
            break
        died += 1
        fruitless = 0 if left and last["outcomes"] else fruitless + 1
    return result | {"died": died}


def total(tool: str, count: int, parts: list[dict]) -> dict:
    """One tool's result of the tests of several processes."""
    outcomes = collections.Counter(
        outcome for part in parts for outcome in part["outcomes"].values()
    )
    statuses = {part["exit_status"] for part in parts}
    found = sum((part["findings"] for part in parts), collections.Counter())
    return {
        "tool": tool,
        "finished": sum(outcomes.values()) == count and None not in statuses,
        "tests": count,
        "outcomes": dict(outcomes),
        "exit_statuses": sorted(statuses, key=str),
        "died": sum(part["died"] for part in parts),
        "errors": sum(part["errors"] for part in parts),
        "warnings": sum(part["warnings"] for part in parts),
        # An error is in one test of its process.
        "errors_among": [sorted(p["outcomes"]) for p in parts if p["errors"]],
        "findings": [f"{count} x {text}" for text, count in found.most_common(_SHOWN)],
        "ended": [line for part in parts for line in part["ended"]],
    }


def of_other_tools(earlier: dict, chosen: list[str]) -> list[dict]:
    """The results in a file of tools that are not going to be run."""
    facts = {
        "commit": earlier.get("environment", {}).get("commit"),
        "arguments": earlier.get("arguments"),
    }
    results = earlier.get("results", [])
    return [facts | result for result in results if result["tool"] not in chosen]


def clean(result: dict) -> bool:
    """Whether all tests of a tool passed and it found nothing."""
    passed = result["finished"] and result["exit_statuses"] == [0]
    return passed and not result["errors"]


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def main(
    context: typer.Context,
    tools: str = typer.Option(",".join(TOOLS), help="Comma-separated."),
    workers: int = typer.Option(12, help="Processes at once, of all tools."),
    together: int = typer.Option(10, help="Tests of a process."),
    minutes: float = typer.Option(60.0, help="What takes longer is ended."),
    gpus: int = typer.Option(0, help="Of several GPUs, those that take turns."),
    options: str = typer.Option("", help="More options of compute-sanitizer."),
    logs: Annotated[
        pathlib.Path | None,
        typer.Option(help="Folder for what processes printed that found or failed."),
    ] = None,
    name: str = typer.Option("sanitize", help="Stem of the result."),
) -> None:
    """Runs tests of the CUDA kernels under compute-sanitizer."""
    chosen = tools.split(",")
    if set(chosen) - set(TOOLS):
        raise SystemExit(f"expected tools from {TOOLS}, got {tools!r}")
    if shutil.which("compute-sanitizer") is None:
        raise SystemExit("compute-sanitizer was not found; it comes with CUDA")
    began = time.monotonic()
    arguments = context.args or list(TESTS)
    tests = collect(arguments)
    processes = -(-len(tests) // together)
    deals = [tests[i::processes] for i in range(processes)]
    commit = environment().get("commit")
    results = of_other_tools(report.load(name), chosen)
    parts: dict[str, list[dict]] = {tool: [] for tool in chosen}
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(workers) as pool:
        on_gpus = [
            environment_of_tests(cache, gpu)
            for gpu in (range(gpus) if gpus else [None])
        ]
        fill_cache(tests, on_gpus[0], workers)
        runs = {}
        for tool in chosen:
            for turn, deal in enumerate(deals):
                sanitizer = Sanitizer(
                    tool,
                    shlex.split(options),
                    on_gpus[turn % len(on_gpus)],
                    logs,
                    began + 60 * minutes,
                )
                runs[pool.submit(run_until_ended, sanitizer, deal)] = tool
        for run in as_completed(runs):
            tool = runs[run]
            parts[tool].append(run.result())
            if len(parts[tool]) < len(deals):
                continue
            result = total(tool, len(tests), parts[tool])
            facts = {"commit": commit, "options": options, "arguments": arguments}
            results.append(result | facts)
            print(results[-1], flush=True)
            seconds = round(time.monotonic() - began, 1)
            path = report.save(name, {"seconds": seconds, "results": results})
    print(f"written to {path}")
    raise SystemExit(not all(clean(r) for r in results if r["tool"] in chosen))


if __name__ == "__main__":
    app()
