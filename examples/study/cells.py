"""What a study measures: one cell is one pruned, perhaps fine-tuned, model."""

import dataclasses
from collections.abc import Sequence

from flashjax import prune

PATTERNS = ("2:4", "4:8")
# Below this share of zeros budgets hardly matter.
OWL_FROM = 0.5


@dataclasses.dataclass(frozen=True)
class Cell:
    """One model of the study.

    Attributes:
      method: of flashjax.prune.METHODS, or "dense" for none.
      sparsity: share of zeros.
      budget: "uniform" or "owl".
      pattern: as "2:4", or None.
      steps: of fine-tuning.
      tuning: "none"; "masked", dense weights and gradients with a mask after every
        step; "sparse", the nonzero values alone; or "dense", as a control.
    """

    method: str = "dense"
    sparsity: float = 0.0
    budget: str = "uniform"
    pattern: str | None = None
    tuning: str = "none"
    steps: int = 0

    @property
    def name(self) -> str:
        """For people, and to find a cell again."""
        parts = [self.method, self.pattern or f"{self.sparsity:.4g}"]
        parts += [self.budget] if self.budget != "uniform" else []
        parts += [f"{self.tuning}, {self.steps} steps"] if self.tuning != "none" else []
        return " ".join(parts)


def cells(
    methods: Sequence[str],
    sparsities: Sequence[float],
    tuned: Sequence[str],
    tuned_sparsities: Sequence[float],
    steps: int,
) -> list[Cell]:
    """Returns the cells of a study, the dense model first.

    Args:
      methods: names of flashjax.prune.METHODS.
      sparsities: shares of zeros in one shot.
      tuned: methods whose result is fine-tuned.
      tuned_sparsities: shares of zeros at which it is.
      steps: of fine-tuning; 0 for none.

    Raises:
      ValueError: an unknown method, or a sparsity that is not in (0, 1).
    """
    for method in {**dict.fromkeys(methods), **dict.fromkeys(tuned)}:
        if method not in prune.METHODS:
            raise ValueError(
                f"expected a method of {', '.join(prune.METHODS)}, got {method!r}"
            )
    for sparsity in (*sparsities, *tuned_sparsities):
        if not 0 < sparsity < 1:
            raise ValueError(f"expected a sparsity in (0, 1), got {sparsity}")
    found = [Cell()]
    for method in methods:
        found += [Cell(method, s) for s in sparsities]
        found += [Cell(method, s, budget="owl") for s in sparsities if s >= OWL_FROM]
        found += [Cell(method, 0.5, pattern=pattern) for pattern in PATTERNS]
    if not steps:
        return found
    found.append(Cell(tuning="dense", steps=steps))
    for method in tuned:
        for kind in ("masked", "sparse"):
            found += [
                Cell(method, s, tuning=kind, steps=steps) for s in tuned_sparsities
            ]
    return found
