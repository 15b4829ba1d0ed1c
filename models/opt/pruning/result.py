"""What pruning a model came to."""

import dataclasses

from flashjax.checkpoint import CheckpointError


class CannotPruneError(CheckpointError):
    """The weights do not allow what is asked: the same would fail again."""


@dataclasses.dataclass(frozen=True)
class MatrixReport:
    """What was done to one matrix.

    Attributes:
      name: as "layers.0.fc1".
      shape: (in, out).
      target: share of zeros that was asked for.
      sparsity: share of zeros as stored.
      nonzeros: what is left.
      error: ``||X (W - W')||_F^2 / ||X W||_F^2`` on the calibration text; None where
        the method needs none.
      seconds: what choosing the zeros took.
    """

    name: str
    shape: tuple[int, int]
    target: float
    sparsity: float
    nonzeros: int
    error: float | None
    seconds: float

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.shape[0] * self.shape[1]


@dataclasses.dataclass(frozen=True)
class PruneResult:
    """What prune_pretrained() wrote.

    Attributes:
      reports: the pruned matrices.
      dense_bytes: all weights in the new dtype if they were stored dense.
      stored_bytes: all weights as stored.
      samples, length: windows of calibration text and their tokens; 0 without.
      resumed_layers: layers that an earlier run had finished.
      seconds: what this run took.
      host_peak_bytes: most memory that this process has had so far.
      device_peak_bytes: the same on the device, where it counts.
    """

    reports: tuple[MatrixReport, ...]
    dense_bytes: int
    stored_bytes: int
    samples: int
    length: int
    resumed_layers: int
    seconds: float
    host_peak_bytes: int
    device_peak_bytes: int | None

    @property
    def matrices(self) -> int:
        """Number of pruned matrices."""
        return len(self.reports)

    @property
    def elements(self) -> int:
        """Their elements."""
        return sum(report.size for report in self.reports)

    @property
    def nonzeros(self) -> int:
        """What is left of them."""
        return sum(report.nonzeros for report in self.reports)

    @property
    def sparsity(self) -> float:
        """Share of zeros in the pruned matrices."""
        return 1 - self.nonzeros / self.elements if self.elements else 0.0
