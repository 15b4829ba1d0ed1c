"""``flashjax info``: the system, or a model folder."""

import dataclasses
import json
import platform
import re
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flashjax.checkpoint import CheckpointError, CheckpointReader, read_json
from flashjax.cli.errors import describe
from flashjax.cli.report import format_bytes
from flashjax.devices import cpu_count, device_name

_PACKAGES = ("flashjax", "jax", "jaxlib", "flax", "numpy", "safetensors", "tokenizers")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def show_system(as_json: bool) -> None:
    """Prints versions, devices, and which kernels can run and why not."""
    system = system_info()
    console = _console()
    if as_json:
        print(json.dumps(system, indent=2))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, version in system["versions"].items():
        table.add_row(name, escape(version))
    problem = system["backend_unavailable_reason"]
    backend = system["backend"] + (f": {problem}" if problem else "")
    table.add_row("jax backend", escape(backend))
    for device in system["devices"]:
        table.add_row("device", escape(device))
    table.add_row(
        "cpu", f"{system['cpu_count']} cores, kernel for {system['cpu_simd']}"
    )
    cuda = system["cuda"]
    built = "not built"
    if cuda["built"]:
        built = f"built with CUDA {cuda['version']} for {cuda['architectures']}"
    table.add_row("cuda module", escape(built))
    reason = cuda["unavailable_reason"]
    table.add_row("cuda available", escape(f"no: {reason}" if reason else "yes"))
    for name, state in system["implementations"].items():
        table.add_row(f"kernel {name}", escape(state))
    tuning = system["tuning"]
    if tuning["matrices"] or tuning["problem"]:
        count = tuning["matrices"]
        found = f"{count} {'matrix' if count == 1 else 'matrices'}: {tuning['file']}"
        table.add_row("tuned", escape(tuning["problem"] or found))
    console.print(table)


def system_info() -> dict[str, Any]:
    """The system as JSON values."""
    import jax

    from flashjax import _native

    backend, devices, problem = "none", [], ""
    try:
        backend, devices = jax.default_backend(), jax.devices()
    except (RuntimeError, AssertionError) as error:
        problem = describe(error, hint=False)
    try:
        reason = _native.cuda_unavailable_reason()
    except AssertionError:  # JAX's own, where it has no backend
        reason = problem
    build = _native.build_info()
    best = {"cpu": "cpu", "gpu": "xla" if reason else "cuda"}.get(backend, "xla")
    simd = _native.cpu.simd()
    states = {
        "cuda": f"cannot run: {reason}" if reason else "ready",
        "cpu": f"ready ({simd})",
        "xla": "ready, on every platform; the reference",
    }
    if problem:
        states = dict.fromkeys(states, "cannot run: JAX has no backend")
    else:
        states[best] += "; used here unless another is named"
    return {
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in _PACKAGES},
        "backend": backend,
        "backend_unavailable_reason": problem,
        "devices": [f"{d.id}: {device_name(d)}" for d in devices],
        "cpu_count": cpu_count(),
        "cpu_simd": simd,
        "cuda": {
            "built": _native.cuda is not None,
            "version": build.get("cuda_version", ""),
            "architectures": build.get("cuda_architectures", ""),
            "available": not reason,
            "unavailable_reason": reason,
        },
        "implementations": states,
        "tuning": _tuning(None if problem else backend),
    }


def _tuning(backend: str | None) -> dict[str, Any]:
    """What `flashjax.autotune` left for the devices of the backend, if there is one."""
    from flashjax import tuned_rows

    file = tuned_rows.file()
    kind = None if backend is None else tuned_rows.device_kind(backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        matrices = len(tuned_rows.known(kind))
    problem = str(caught[0].message) if caught else ""
    return {"file": str(file or ""), "matrices": matrices, "problem": problem}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint.

    Attributes:
      name: as stored.
      shape: dense shape.
      dtype: dtype's name.
      stored_sparse: whether it is stored in our sparse form.
      sparsity: share of zeros; None for tensors that are no matrix of a layer.
      dense_bytes: bytes if it were stored dense.
      stored_bytes: bytes as stored.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored_sparse: bool
    sparsity: float | None
    dense_bytes: int
    stored_bytes: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))


def show_folder(folder: Path, as_json: bool, every_tensor: bool) -> None:
    """Prints a checkpoint's sparsity and bytes: per layer and in total.

    Raises:
      CheckpointError: the folder is no model, or a file is damaged.
    """
    tensors = read_tensors(folder)
    config = folder / "config.json"
    model_type = read_json(config).get("model_type") if config.is_file() else None
    model_type = str(model_type or "unknown")
    groups = {title: _sum(group) for title, group in _group(tensors).items()}
    total = _sum(tensors)
    if as_json:
        content = {
            "folder": str(folder),
            "model_type": model_type,
            "total": total,
            "groups": groups,
            "tensors": [dataclasses.asdict(tensor) for tensor in tensors],
        }
        print(json.dumps(content, indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("tensor" if every_tensor else "part")
    titles = "shape" if every_tensor else "matrices", "stored", "zeros", "dense bytes"
    for title in (*titles, "stored bytes", "share"):
        table.add_column(title, justify="right")
    if every_tensor:
        for t in tensors:
            shape = " x ".join(map(str, t.shape))
            form = f"sparse {t.dtype}" if t.stored_sparse else t.dtype
            row = dataclasses.asdict(t)
            table.add_row(escape(t.name), shape, form, *_numbers(row))
    else:
        for title, row in groups.items():
            table.add_row(title, str(row["matrices"] or ""), _form(row), *_numbers(row))
    table.add_section()
    row = total
    table.add_row("total", str(row["matrices"] or ""), _form(row), *_numbers(row))
    console = _console()
    console.print(f"{escape(str(folder))}: model type {escape(model_type)}")
    console.print(table)
    if model_type == "opt":
        _print_packed_when_loaded(console, tensors)


def _print_packed_when_loaded(console: Console, tensors: list[TensorInfo]) -> None:
    """Says what becomes of a pruned model that is stored as others store it."""
    from flashjax.models.opt.loading import AUTO_SPARSITY

    dense = [t.sparsity for t in tensors if t.sparsity and not t.stored_sparse]
    count = sum(sparsity >= AUTO_SPARSITY for sparsity in dense)
    if count:
        console.print(
            f"{count} matrices are stored dense and have at least {AUTO_SPARSITY:.0%} "
            "zeros: loaded in half precision they are packed"
        )


def read_tensors(folder: Path) -> list[TensorInfo]:
    """Reads what a folder holds; dense matrices of layers are read to count zeros."""
    from flashjax.models.opt.hf_folder import open_weights

    if not folder.is_dir():
        what = "a file" if folder.exists() else "nothing"
        raise CheckpointError(f"{folder}: expected a model folder, got {what}")
    tensors = []
    with open_weights(folder) as reader:
        for name in reader.names():
            shape, dtype = reader.shape(name), reader.dtype(name)
            dense_bytes = int(np.prod(shape)) * dtype.itemsize
            stored_bytes, zeros = dense_bytes, None
            stored_sparse = isinstance(reader, CheckpointReader) and (
                name in reader.sparse
            )
            if isinstance(reader, CheckpointReader) and stored_sparse:
                stored_bytes = reader.stored_bytes(name)
                zeros = int(np.prod(shape)) - reader.counted_nnz(name)
            elif len(shape) == 2 and _LAYER.search(name):
                zeros = int(np.prod(shape)) - int(np.count_nonzero(reader.load(name)))
            sparsity = None
            if zeros is not None:
                sparsity = zeros / max(int(np.prod(shape)), 1)
            tensors.append(
                TensorInfo(
                    name,
                    shape,
                    dtype.name,
                    stored_sparse,
                    sparsity,
                    dense_bytes,
                    stored_bytes,
                )
            )
    return tensors


def _group(tensors: list[TensorInfo]) -> dict[str, list[TensorInfo]]:
    """The tensors by layer, in order, and the others."""
    layers: dict[int, list[TensorInfo]] = {}
    others: list[TensorInfo] = []
    for tensor in tensors:
        found = _LAYER.search(tensor.name)
        group = layers.setdefault(int(found.group(1)), []) if found else others
        group.append(tensor)
    groups = {f"layer {i}": layers[i] for i in sorted(layers)}
    return groups | ({"other tensors": others} if others else {})


def _sum(tensors: list[TensorInfo]) -> dict[str, Any]:
    """Bytes of all tensors; sparsity and number of the layers' matrices."""
    matrices = [t for t in tensors if t.sparsity is not None]
    elements = sum(t.size for t in matrices)
    zeros = sum((t.sparsity or 0.0) * t.size for t in matrices)
    return {
        "matrices": len(matrices),
        "stored_sparse": sum(t.stored_sparse for t in matrices),
        "sparsity": zeros / elements if elements else None,
        "dense_bytes": sum(t.dense_bytes for t in tensors),
        "stored_bytes": sum(t.stored_bytes for t in tensors),
    }


def _form(row: dict[str, Any]) -> str:
    if not row["matrices"]:
        return "dense"
    sparse = row["stored_sparse"]
    return {0: "dense", row["matrices"]: "sparse"}.get(sparse, f"{sparse} sparse")


def _numbers(row: dict[str, Any]) -> tuple[str, str, str, str]:
    share = row["stored_bytes"] / row["dense_bytes"] if row["dense_bytes"] else 1.0
    return (
        "" if row["sparsity"] is None else f"{row['sparsity']:.1%}",
        format_bytes(row["dense_bytes"]),
        format_bytes(row["stored_bytes"]),
        f"{share:.1%}",
    )


def _console() -> Console:
    # Tables that are piped must not be cut to an assumed width.
    width = None if sys.stdout.isatty() else 200
    return Console(highlight=False, width=width)
