"""Numbers that several commands show."""

import dataclasses
from typing import Any

from flashjax.devices import device_name


@dataclasses.dataclass(frozen=True)
class WeightBytes:
    """What a loaded model's weights take.

    Attributes:
      layers: number of sparse layers.
      elements: elements of their kernels.
      nonzeros: nonzero ones among them.
      dense: bytes of their kernels if they were dense, in the same dtype.
      sparse: bytes of their kernels as they are.
      other: bytes of everything else: embeddings, norms, biases, dense layers.
    """

    layers: int
    elements: int
    nonzeros: int
    dense: int
    sparse: int
    other: int

    @property
    def sparsity(self) -> float:
        """Share of zeros in the sparse layers."""
        return 1 - self.nonzeros / self.elements if self.elements else 0.0

    def to_json(self) -> dict[str, Any]:
        """The numbers that weight_lines() shows, as JSON values."""
        return {
            "sparse_layers": self.layers,
            "sparsity": self.sparsity if self.layers else None,
            "sparse_bytes": self.sparse,
            "sparse_bytes_if_dense": self.dense,
            "other_bytes": self.other,
        }


def measure(model: Any) -> WeightBytes:
    """Adds up a loaded model's weights."""
    from flashjax.nn import parameter_bytes, sparse_layers

    kernels = [layer.kernel.get_value() for _, layer in sparse_layers(model)]
    sparse = sum(kernel.nbytes for kernel in kernels)
    return WeightBytes(
        layers=len(kernels),
        elements=sum(kernel.size for kernel in kernels),
        nonzeros=sum(kernel.nnz for kernel in kernels),
        dense=sum(kernel.size * kernel.dtype.itemsize for kernel in kernels),
        sparse=sparse,
        other=parameter_bytes(model) - sparse,
    )


def format_bytes(count: float) -> str:
    """Bytes in the unit that reads best."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def weight_lines(weights: WeightBytes) -> list[tuple[str, str]]:
    """The weights as titles and texts."""
    if not weights.layers:
        return [("weights", f"{format_bytes(weights.other)} dense, no sparse layers")]
    total_dense = weights.dense + weights.other
    total_sparse = weights.sparse + weights.other
    return [
        (
            "sparse layers",
            f"{weights.layers} layers, {weights.sparsity:.1%} zeros: "
            f"{format_bytes(weights.sparse)} sparse, "
            f"{format_bytes(weights.dense)} dense "
            f"({weights.sparse / weights.dense:.1%})",
        ),
        (
            "all weights",
            f"{format_bytes(total_sparse)} with sparse layers, "
            f"{format_bytes(total_dense)} dense",
        ),
    ]


def device_line(model: Any) -> str:
    """The device and the implementation of the sparse product."""
    import jax

    from flashjax import _native
    from flashjax.nn import sparse_layers

    device = jax.devices()[0]
    name = device_name(device)
    named = {layer.implementation for _, layer in sparse_layers(model)}
    if not named:
        return f"{name}, dense layers alone"
    best = {"cpu": "cpu", "gpu": "cuda" if _native.cuda_available() else "xla"}
    used = sorted({n or best.get(device.platform, "xla") for n in named})
    details = f" ({_native.cpu.simd()})" if used == ["cpu"] else ""
    return f"{name}, implementation {', '.join(used)}{details}"
