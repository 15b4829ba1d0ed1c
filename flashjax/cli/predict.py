"""``flashjax info --config``: what a model will take, before anything is loaded."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flashjax.cli.errors import UsageError
from flashjax.cli.report import format_bytes
from flashjax.models.opt import OPTConfig
from flashjax.models.opt.memory import RUNTIME, MemoryPrediction, predict

_ROWS = {
    "linear_weights": "linear layers",
    "other_weights": "other weights",
    "kv_cache": "key-value cache",
    "prefill_temporaries": "temporaries of the prompts",
    "decode_temporaries": "temporaries of a step",
}
SIZES = ("125m", "350m", "1_3b", "2_7b", "6_7b", "13b", "30b", "66b", "175b")


def find_config(name: str) -> OPTConfig:
    """The configuration of a folder, or of a published size such as opt-1.3b.

    Raises:
      ValueError: it is neither.
    """
    if Path(name).is_dir():
        return OPTConfig.from_hf(name)
    size = name.lower().rsplit("/", 1)[-1].replace("-", "_").replace(".", "_")
    size = size.removeprefix("opt_")
    if size not in SIZES:
        known = ", ".join(f"opt-{known.replace('_', '.')}" for known in SIZES)
        raise ValueError(f"expected a model folder or one of {known}, got {name!r}")
    return getattr(OPTConfig, f"opt_{size}")()


def check_sparse_dtype(dtype: str, sparsities: Iterable[float]) -> None:
    """Raises UsageError if there are no sparse weights of the dtype, but should be."""
    if dtype == "float32" and any(sparsities):
        raise UsageError(
            "--dtype: expected float16 or bfloat16, got float32, which only dense "
            "weights (--sparsity 0) may have"
        )


def run(
    name: str,
    *,
    sparsity: float,
    batch: int,
    length: int | None,
    prompt: int | None,
    dtype: str,
    cache_dtype: str | None,
    devices: int,
    gigabytes: float | None,
    as_json: bool,
) -> None:
    """Prints the prediction of models.opt.memory.predict() for a size or folder.

    Raises:
      ValueError: a value does not fit.
    """
    if gigabytes is not None and not gigabytes > 0:
        raise UsageError(f"--memory: expected more than 0 GB, got {gigabytes}")
    check_sparse_dtype(dtype, [sparsity])
    config = find_config(name)
    if length is None:
        length = config.max_positions
    found = predict(
        config,
        sparsity=sparsity,
        batch=batch,
        length=length,
        prompt=prompt,
        dtype=dtype,
        cache_dtype=cache_dtype,
        devices=devices,
        device_bytes=None if gigabytes is None else int(gigabytes * 1e9),
    )
    if as_json:
        request = {
            "config": name,
            "sparsity": sparsity,
            "batch": batch,
            "length": length,
            "prompt": prompt,
            "dtype": dtype,
            "cache_dtype": cache_dtype or dtype,
            "devices": devices,
        }
        print(json.dumps(request | found.to_json(), indent=2))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    for field, title in _ROWS.items():
        table.add_row(title, format_bytes(getattr(found, field)))
    table.add_section()
    each = " on each device" if devices > 1 else ""
    table.add_row(f"at the peak{each}", format_bytes(found.total))
    if found.device_bytes is not None:
        table.add_row("memory of a device", format_bytes(found.device_bytes))
    console = Console(highlight=False, width=100)
    console.print(table)
    console.print(_verdict(found))


def _verdict(found: MemoryPrediction) -> str:
    if found.device_bytes is None:
        return "give --memory in GB to learn whether it fits"
    if not found.fits:
        return f"does not fit, with {format_bytes(RUNTIME)} for CUDA itself"
    if found.fits_by_default:
        return "fits"
    # A hundredth more, for what the allocator cannot use.
    share = min(math.ceil(100 * found.total / found.device_bytes) + 1, 99)
    return (
        "fits, but JAX takes only 75% of a GPU by default: set "
        f"XLA_PYTHON_CLIENT_MEM_FRACTION=.{share}"
    )
