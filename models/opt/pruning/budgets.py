"""How sparse each matrix becomes."""

import numbers
from collections.abc import Mapping
from typing import Literal

from flashjax import prune

from ..config import OPTConfig
from .layers import STAGES, pruned_modules

Budget = Literal["uniform", "owl"] | Mapping[str, float]
_LISTED = 8


def check_budget(budget: Budget, pattern: str | None, config: OPTConfig) -> None:
    """Checks a budget for a model.

    Raises:
      ValueError: it is none, names matrices that the model does not have, holds values
        that are no sparsities, or comes with a pattern, which leaves no choice.
    """
    if isinstance(budget, str) and budget not in ("uniform", "owl"):
        raise ValueError(
            f"budget: expected 'uniform', 'owl' or sparsities by name, got {budget!r}"
        )
    if pattern is not None and budget != "uniform":
        raise ValueError(
            f"budget: expected 'uniform' with the pattern {pattern}, which gives every "
            f"matrix its sparsity, got {budget if budget == 'owl' else 'sparsities'}"
        )
    if isinstance(budget, str):
        return
    if not isinstance(budget, Mapping):
        raise ValueError(
            "budget: expected 'uniform', 'owl' or sparsities by name, got "
            f"{type(budget).__name__}"
        )
    known = pruned_modules(config)
    unknown = [name for name in budget if name not in set(known)]
    if unknown:
        more = f", and {len(unknown) - _LISTED} more" if len(unknown) > _LISTED else ""
        raise ValueError(
            f"budget: expected names from {known[0]} to {known[-1]}, got "
            f"{', '.join(map(repr, unknown[:_LISTED]))}{more}"
        )
    for name, value in budget.items():
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not number or not 0 <= value <= 1:
            raise ValueError(
                f"budget: expected a sparsity from 0 to 1 for {name}, got {value!r}"
            )


def fixed_budgets(
    budget: Budget, sparsity: float | None, config: OPTConfig
) -> dict[str, float | None]:
    """The sparsity of every matrix; those that a budget does not name take `sparsity`.

    Args:
      budget: "uniform" or sparsities by name.
      sparsity: of the others; None where a pattern says it.
      config: the architecture.
    """
    named = {} if isinstance(budget, str) else budget
    return {name: named.get(name, sparsity) for name in pruned_modules(config)}


def owl_budgets(
    ratios: list[float], sparsity: float, config: OPTConfig
) -> dict[str, float | None]:
    """Sparsities by OWL: layers with more outliers keep more.

    Args:
      ratios: the outlier ratio of every layer.
      sparsity: the mean.
      config: the architecture.
    """
    by_layer = prune.owl({str(i): r for i, r in enumerate(ratios)}, sparsity)
    modules = pruned_modules(config)
    per_layer = sum(map(len, STAGES))
    return {name: by_layer[str(i // per_layer)] for i, name in enumerate(modules)}
