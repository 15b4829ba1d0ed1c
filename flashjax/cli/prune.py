"""``flashjax prune``."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import typer
from rich.console import Console
from rich.markup import escape

from flashjax.checkpoint import read_json
from flashjax.cli.errors import UsageError
from flashjax.cli.progress import progress_bar
from flashjax.cli.report import format_bytes
from flashjax.models.opt.calibration import CalibrationText
from flashjax.models.opt.pruning import PruneResult, prune_pretrained
from flashjax.models.opt.pruning.pipeline import COPIED
from flashjax.models.opt.pruning.settings import Settings
from flashjax.user_files import write_json


def run(
    folder: str,
    out: Path,
    *,
    options: Mapping[str, Any],
    budget: str,
    calibration: Mapping[str, Any],
    report: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Prunes a model folder and prints what came of it.

    Args:
      folder: the model.
      out: the folder to write.
      options: of prune_pretrained().
      budget: its name, or a JSON file.
      calibration: of CalibrationText.
      report: JSON file to write, or None.
      as_json: print what would be in that file.
      quiet: print nothing.
    """
    content: dict[str, Any] = {
        "model": folder,
        "out": str(out),
        "options": {**options, "budget": budget},
    }
    if report is not None:
        _check_report(report, out, content)
    budgets: Any = budget if budget in ("uniform", "owl") else read_json(budget)
    settings, text = _check_options(options, budgets, calibration)
    if calibration["path"] is not None and not settings.needs_calibration:
        raise UsageError(
            f"--calibration: the method {settings.method} needs none with this budget"
        )
    try:
        with progress_bar(disable=quiet) as advance:
            result = prune_pretrained(
                folder,
                out,
                **options,
                budget=budgets,
                calibration=text,
                progress=lambda what, done, total: advance(
                    what.removeprefix("model.decoder."), done, total
                ),
            )
    except KeyboardInterrupt:
        whole = out.resolve()
        partial = whole.with_name(f"{whole.name}.partial")
        if partial.exists():
            typer.echo(
                f"flashjax: the layers that are done are kept in {partial}; "
                "--resume goes on with the others",
                err=True,
            )
        raise
    content |= dataclasses.asdict(result)
    content |= {"sparsity": result.sparsity, "matrices": content.pop("reports")}
    if report is not None:
        write_json(report, content)
    if as_json:
        print(json.dumps(content, indent=1))
    elif not quiet:
        _print(out, options["dtype"], result)


def _check_options(
    options: Mapping[str, Any], budget: Any, calibration: Mapping[str, Any]
) -> tuple[Settings, CalibrationText]:
    """Raises UsageError if options are wrong, whatever the model is."""
    dtype = jnp.dtype(options["dtype"])
    names = ("sparsity", "method", "pattern", "damping", "format")
    try:
        settings = Settings(
            **{name: options[name] for name in names},
            budget=budget,
            dtype=dtype,
            activations=jnp.dtype(options["activations"] or dtype),
        )
        return settings, CalibrationText(**calibration)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _check_report(report: Path, out: Path, run: Mapping[str, Any]) -> None:
    """Finds before anything is pruned that the report must not or cannot be written.

    Args:
      report: the file.
      out: the folder to write.
      run: what the report will say of the command.
    """
    weights = (".safetensors", ".bin", ".index.json")
    if report.name in ("config.json", *COPIED) or report.name.endswith(weights):
        raise UsageError(
            f"--report: expected another name than that of a model's file, got {report}"
        )
    if os.path.realpath(report) == os.path.realpath(out):
        raise ValueError(f"{report}: expected another file than the folder to write")
    # It is replaced as a whole, which a device must not be.
    if report.exists() and not report.is_file():
        raise ValueError(f"{report}: expected a file, got a folder, device or pipe")
    if not report.absolute().parent.is_dir():
        raise ValueError(f"{report}: expected a file in an existing folder")
    options = run["options"]
    if not os.path.lexists(report) or options["overwrite"]:
        return
    if not (options["resume"] and _is_report_of(report, run)):
        raise ValueError(
            f"{report}: expected a new file, got one that exists (overwrite replaces "
            "it)"
        )


def _is_report_of(report: Path, run: Mapping[str, Any]) -> bool:
    """Whether it is what the same command wrote, with or without --resume."""
    try:
        content = json.loads(report.read_bytes())
        options = content["options"] | {"resume": True, "overwrite": False}
        return {key: content[key] for key in run} | {"options": options} == run
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _print(out: Path, dtype: str, result: PruneResult) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{escape(str(out))}: {result.matrices} matrices pruned to "
        f"{result.sparsity:.1%} zeros; all weights {format_bytes(result.stored_bytes)}"
        f", {format_bytes(result.dense_bytes)} if they were dense {dtype}"
    )
    errors = [r for r in result.reports if r.error is not None]
    if errors:
        mean = sum(r.error or 0.0 for r in errors) / len(errors)
        worst = max(errors, key=lambda r: r.error or 0.0)
        console.print(
            f"calibrated on {result.samples} windows of {result.length} tokens; error "
            f"of the outputs {mean:.2%} on average, at most {worst.error:.2%} "
            f"({worst.name})"
        )
    device = ""
    if result.device_peak_bytes is not None:
        device = f", {format_bytes(result.device_peak_bytes)} on the device"
    resumed = ""
    if result.resumed_layers:
        resumed = f", after {result.resumed_layers} layers of an earlier run"
    host = format_bytes(result.host_peak_bytes)
    console.print(
        f"{result.seconds:.1f} s{resumed}; peak memory {host} on the host{device}"
    )
