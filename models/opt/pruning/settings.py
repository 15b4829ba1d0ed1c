"""What can be asked of pruning, checked."""

import dataclasses
import inspect
import numbers
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from flashjax import prune

from ..config import OPTConfig
from .budgets import Budget, check_budget

Format = Literal["flashjax", "hf"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to prune; see prune_pretrained(). Numbers become floats, budgets dicts.

    Raises:
      TypeError: sparsity or damping is no number.
      ValueError: an argument is out of range, or two do not go together.
    """

    sparsity: float | None
    method: str
    pattern: str | None
    budget: Budget
    damping: float | None
    format: Format
    dtype: np.dtype
    activations: np.dtype

    def __post_init__(self):
        if self.format not in ("flashjax", "hf"):
            raise ValueError(f"format: expected 'flashjax' or 'hf', got {self.format}")
        if self.format == "flashjax" and self.dtype == jnp.float32:
            raise ValueError(
                "dtype: expected float16 or bfloat16 for sparse weights, got float32; "
                "format 'hf' stores it"
            )
        if self.activations not in (self.dtype, jnp.float32):
            raise ValueError(
                f"activations: expected {self.dtype.name} like the weights, or "
                f"float32, got {self.activations.name}"
            )
        if self.method not in prune.METHODS:
            raise ValueError(
                f"method must be one of {', '.join(prune.METHODS)}, got {self.method!r}"
            )
        for name in ("sparsity", "damping"):
            object.__setattr__(self, name, _as_float(getattr(self, name)))
        if isinstance(self.budget, Mapping):
            named = {name: _as_float(value) for name, value in self.budget.items()}
            object.__setattr__(self, "budget", named)
        # The same checks as for every matrix, before anything is read.
        prune.magnitude(
            np.zeros((1, 1), np.float16), self.sparsity, pattern=self.pattern
        )
        if not isinstance(self.damping, float | None):
            raise TypeError(
                "damping: expected a number of at least 0, got "
                f"{type(self.damping).__name__}"
            )
        if self.damping is not None and not 0 <= self.damping < float("inf"):
            raise ValueError(
                f"damping: expected a number of at least 0, got {self.damping}"
            )
        parameters = inspect.signature(prune.METHODS[self.method].function).parameters
        if self.damping is not None and "damping" not in parameters:
            raise ValueError(f"damping: the method {self.method} has none")

    @property
    def needs_calibration(self) -> bool:
        """Whether the model's activations are needed."""
        return self.needs_statistics or self.budget == "owl"

    @property
    def needs_statistics(self) -> bool:
        """Whether the method itself needs them."""
        return prune.METHODS[self.method].needs_statistics

    def check_for(self, config: OPTConfig) -> None:
        """Checks what depends on the model."""
        check_budget(self.budget, self.pattern, config)

    def prune(
        self,
        dense: np.ndarray,
        stats: prune.InputStatistics | None,
        sparsity: float | None,
    ) -> Any:
        """Prunes a matrix, (in, out)."""
        function, needs_statistics = prune.METHODS[self.method]
        inputs = (dense, stats) if needs_statistics else (dense,)
        options = {} if self.damping is None else {"damping": self.damping}
        return function(*inputs, sparsity, pattern=self.pattern, **options)

    def arguments(self) -> dict[str, Any]:
        """All of it as JSON."""
        content = dataclasses.asdict(self)
        for name in ("dtype", "activations"):
            content[name] = content[name].name
        if not isinstance(self.budget, str):
            content["budget"] = dict(sorted(self.budget.items()))
        return content


def _as_float(value: Any) -> Any:
    """The number of any kind as a float; anything else as it is."""
    if isinstance(value, np.ndarray | jax.Array) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, numbers.Real) or isinstance(value, bool | np.bool):
        return value
    try:
        return float(value)
    except OverflowError:  # a whole number that is out of every range
        return value
