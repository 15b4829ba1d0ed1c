"""The pass over a model: layer by layer, each on the inputs that pruning left it."""

import contextlib
import time
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np

from flashjax import prune

from ..calibration import Calibration
from ..hf_folder import StoredOPT
from .budgets import fixed_budgets, owl_budgets
from .layers import (
    STAGES,
    Activations,
    Layer,
    embed,
    load_converted,
    to_dtype,
    transpose,
)
from .partial_run import PartialRun
from .result import CannotPruneError, MatrixReport
from .settings import Settings

Progress = Callable[[str, int, int], None]


class Work:
    """What is left to do of a run, in its order."""

    def __init__(
        self,
        stored: StoredOPT,
        settings: Settings,
        tokens: Calibration | None,
        run: PartialRun,
        progress: Progress | None,
    ):
        self._stored, self._settings, self._tokens = stored, settings, tokens
        self._run, self._progress = run, progress
        self._layers = stored.config.num_layers
        # (stored name, name) of every tensor, by layer; last those of none.
        self._names: list[list[tuple[str, str]]] = [[] for _ in range(self._layers + 1)]
        for stored_name, name in stored.names.items():
            module = stored.targets[name].module.split(".")
            index = int(module[1]) if module[0] == "layers" else self._layers
            self._names[index].append((stored_name, name))
        self._sizes = {
            name: int(np.prod(target.shape)) for name, target in stored.targets.items()
        }
        self._done = 0
        self._total = sum(self._sizes.values())
        if settings.budget == "owl" and run.read_json("budgets.json") is None:
            self._total += self._layer_size * self._layers
        self._on_device = Layer(stored.config, settings.activations)
        self.reports: list[MatrixReport] = []

    @property
    def _layer_size(self) -> int:
        return sum(self._sizes[name] for _, name in self._names[0])

    def advance(self, what: str, elements: int) -> None:
        """Reports what comes next, after so many more elements."""
        self._done += elements
        if self._progress is not None:
            self._progress(what, self._done, self._total)

    def do(self) -> None:
        """Prunes the layers that are not finished, and writes the rest."""
        self.advance("", 0)
        budgets = self._budgets()
        finished = self._run.finished_parts
        activations = None
        if self._settings.needs_statistics and finished < self._layers:
            activations = self._embed()
        for index in range(self._layers):
            if index < finished:
                self._pass_finished(index, activations)
            else:
                self._prune_layer(index, budgets, activations)
        if finished <= self._layers:
            self._write_rest()

    def _embed(self) -> Activations:
        assert self._tokens is not None
        settings = self._settings
        self.advance("embeddings", 0)
        return embed(self._stored, self._tokens, settings.activations, settings.dtype)

    def _budgets(self) -> dict[str, float | None]:
        settings, config = self._settings, self._stored.config
        if settings.budget != "owl":
            return fixed_budgets(settings.budget, settings.sparsity, config)
        known = self._run.read_json("budgets.json")
        if known is None:
            assert settings.sparsity is not None
            known = owl_budgets(self._outlier_ratios(), settings.sparsity, config)
            self._run.write_json("budgets.json", known)
        return known

    def _outlier_ratios(self) -> list[float]:
        """OWL's measure of every layer, on the activations of the dense model."""
        activations, ratios = self._embed(), []
        for index in range(self._layers):
            originals, _ = self._load_layer(index)
            outliers = size = 0.0
            for stage in STAGES:
                name = f"layers.{index}.{stage[0]}"
                self.advance(f"{name}: outliers", 0)
                stats = self._statistics(index, stage[0], originals, activations)
                for module in stage:
                    dense = transpose(originals[module])
                    with _named(f"layers.{index}.{module}"):
                        ratio = prune.outlier_ratio(dense, stats)
                    outliers += ratio * dense.size
                    size += dense.size
            self._forward(index, activations)
            ratios.append(outliers / size)
            self.advance(f"layers.{index}", self._layer_size)
        return ratios

    def _load_layer(
        self, index: int
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Reads a layer, and puts it on the device where activations are needed.

        Returns:
          The matrices to prune as they are stored by their name in the layer, and the
          other tensors in the dtype to store by their full name.
        """
        originals, others = {}, {}
        for stored_name, name in self._names[index]:
            target = self._stored.targets[name]
            module = target.module.removeprefix(f"layers.{index}.")
            dtype = self._settings.dtype
            array, converted = load_converted(self._stored, stored_name, dtype)
            if target.attribute == "kernel":
                originals[module] = _narrowed(array)
            else:
                others[name] = converted
            if self._settings.needs_calibration:
                self._on_device.set(module, target.attribute, converted)
        return originals, others

    def _prune_layer(
        self,
        index: int,
        budgets: dict[str, float | None],
        activations: Activations | None,
    ) -> None:
        originals, others = self._load_layer(index)
        pruned, reports = {}, []
        for stage in STAGES:
            stats = None
            if activations is not None:
                self.advance(f"layers.{index}.{stage[0]}: statistics", 0)
                stats = self._statistics(index, stage[0], originals, activations)
            for module in stage:
                name = f"layers.{index}.{module}"
                self.advance(name, 0)
                dense = originals.pop(module)
                report, array = self._prune(name, dense, stats, budgets[name])
                reports.append(report)
                pruned[f"model.decoder.{name}.weight"] = array
                if activations is not None:
                    self._on_device.set(module, "kernel", array)
                self.advance(name, report.size)
            del stats
        if activations is not None and index + 1 < self._layers:
            self._forward(index, activations)
        self.advance(f"layers.{index}", sum(array.size for array in others.values()))
        record = {"matrices": [vars(report) for report in reports]}
        if self._settings.format == "hf":
            self._run.write_part(index, others | pruned, {}, record)
        else:
            self._run.write_part(index, others, pruned, record)
        self.reports += reports

    def _prune(
        self,
        name: str,
        weight: np.ndarray,
        stats: prune.InputStatistics | None,
        sparsity: float | None,
    ) -> tuple[MatrixReport, np.ndarray]:
        started = time.perf_counter()
        dense = transpose(weight)
        with _named(name):
            pruned = np.asarray(self._settings.prune(dense, stats, sparsity))
            error = None
            if stats is not None:
                error = prune.reconstruction_error(dense, pruned, stats)
        array = to_dtype(transpose(pruned), self._settings.dtype, name)
        nonzeros = int(np.count_nonzero(array))
        share = 1 - nonzeros / array.size
        report = MatrixReport(
            name=name,
            shape=(dense.shape[0], dense.shape[1]),
            target=share if sparsity is None else sparsity,
            sparsity=share,
            nonzeros=nonzeros,
            error=error,
            seconds=round(time.perf_counter() - started, 3),
        )
        return report, array

    def _pass_finished(self, index: int, activations: Activations | None) -> None:
        """Sends the activations through a layer that an earlier run has pruned."""
        self.advance(f"layers.{index}: finished before", 0)
        for content in self._run.record(index)["matrices"]:
            shape = tuple(content["shape"])
            self.reports.append(MatrixReport(**content | {"shape": shape}))
        if activations is not None:
            for name, array in self._run.read_part(index).items():
                target = self._stored.targets[name]
                module = target.module.removeprefix(f"layers.{index}.")
                self._on_device.set(module, target.attribute, array)
            self._forward(index, activations)
        self.advance(f"layers.{index}", self._layer_size)

    def _statistics(
        self,
        index: int,
        module: str,
        originals: dict[str, np.ndarray],
        activations: Activations,
    ) -> prune.InputStatistics:
        K = originals[module].shape[1]
        stats, finite = self._on_device.input_statistics(module, K, activations)
        if not finite:
            raise CannotPruneError(
                self._not_finite(f"inputs of layers.{index}.{module}")
            )
        return stats

    def _forward(self, index: int, activations: Activations) -> None:
        if not self._on_device.advance(activations):
            raise CannotPruneError(self._not_finite(f"outputs of layers.{index}"))

    def _not_finite(self, what: str) -> str:
        advice = "the model's weights may be damaged"
        if self._settings.activations == jnp.float16:
            advice = "float16 may be too narrow: compute activations in float32"
        return f"the {what} hold NaN or infinity; {advice}"

    def _write_rest(self) -> None:
        tensors = {}
        for stored_name, name in self._names[-1]:
            self.advance(name.removeprefix("model.decoder."), 0)
            dtype = self._settings.dtype
            _, tensors[name] = load_converted(self._stored, stored_name, dtype)
            self.advance("", self._sizes[name])
        self._run.write_part(self._layers, tensors, {}, {})


def _narrowed(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float64 else array


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Puts a matrix' name in front of what a method says about it."""
    try:
        yield
    except ValueError as error:
        raise CannotPruneError(f"{name}: {error}") from error
