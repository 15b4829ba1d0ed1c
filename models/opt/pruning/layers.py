"""One decoder layer at a time: loading, statistics of its inputs, its outputs."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flashjax.nnx_tree import node_at, set_node
from flashjax.prune import InputStatistics

from ..attention import attention
from ..calibration import Calibration
from ..config import OPTConfig
from ..hf_folder import StoredOPT, convert
from ..modeling import OPT, DecoderLayer, positions_from_mask
from ..parallel import transpose as transpose
from .result import CannotPruneError

# Matrices with the same inputs, in the order in which they are pruned.
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.out_proj",),
    ("fc1",),
    ("fc2",),
)
_STEM = ("embed_tokens", "embed_positions", "project_in")
# Tokens that go through a layer at once.
_BATCH_TOKENS = 8192


def pruned_modules(config: OPTConfig) -> list[str]:
    """The matrices that are pruned, as "layers.0.fc1"."""
    names = [name for stage in STAGES for name in stage]
    return [f"layers.{i}.{name}" for i in range(config.num_layers) for name in names]


def load_converted(
    stored: StoredOPT, stored_name: str, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Reads a tensor as it is stored, and in the dtype to be stored.

    Raises:
      CannotPruneError: its values are too large for the dtype.
    """
    array = stored.reader.load(stored_name)
    return array, to_dtype(array, dtype, stored_name)


def to_dtype(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The array in the dtype.

    Raises:
      CannotPruneError: its values are too large.
    """
    converted, fits = convert(array, dtype)
    if not fits:
        raise CannotPruneError(
            f"{name}: values too large for {dtype.name}; prune to bfloat16"
        )
    return converted


class Layer:
    """The weights of one decoder layer on the device, replaced for the next one.

    All layers share the functions that are compiled for the first.
    """

    def __init__(self, config: OPTConfig, dtype: np.dtype):
        """Makes a layer without weights.

        Args:
          config: the architecture.
          dtype: of the weights on the device, and of the activations.
        """
        self._dtype = dtype
        self._layer = nnx.eval_shape(
            lambda: DecoderLayer(config, dtype=dtype, rngs=nnx.Rngs(0))
        )

    def set(self, module: str, attribute: str, array: np.ndarray) -> None:
        """Puts a tensor, as a checkpoint orients it, on the device."""
        if attribute == "kernel":
            array = transpose(array)
        variable = getattr(node_at(self._layer, module), attribute)
        variable.set_value(jax.device_put(array.astype(self._dtype)))

    def input_statistics(
        self, module: str, K: int, activations: "Activations"
    ) -> tuple[InputStatistics, bool]:
        """Sums up the inputs of a linear layer; False says that some are not finite."""
        graphdef, state = nnx.split(self._layer)
        stats = InputStatistics.zeros(K)
        finite = jnp.ones((), jnp.bool_)
        for _, x, mask in activations.batches():
            stats, finite = _gather(
                graphdef, state, x, mask, (stats, finite), module=module
            )
            # Otherwise all batches would be on the device at once.
            finite.block_until_ready()
        return stats, bool(finite)

    def advance(self, activations: "Activations") -> bool:
        """Replaces the layer's inputs by its outputs; False: some are not finite."""
        graphdef, state = nnx.split(self._layer)
        all_finite = True
        for rows, x, mask in activations.batches():
            y, finite = _forward(graphdef, state, x, mask)
            activations.values[rows] = np.asarray(y)
            all_finite = all_finite and bool(finite)
        return all_finite


@dataclasses.dataclass(frozen=True)
class Activations:
    """The inputs of a layer, on the host.

    Attributes:
      values: (samples, length, hidden), in the dtype of computation; whole batches, so
        that every one has the same shape.
      mask: (samples, length) bool, False for padding.
      batch: samples that go through a layer at once.
    """

    values: np.ndarray
    mask: np.ndarray
    batch: int

    def batches(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Yields rows, values and mask."""
        for start in range(0, len(self.values), self.batch):
            rows = slice(start, start + self.batch)
            yield rows, self.values[rows], self.mask[rows]


def embed(
    stored: StoredOPT, calibration: Calibration, dtype: np.dtype, stored_dtype: np.dtype
) -> Activations:
    """Looks up the inputs of the first layer.

    Args:
      stored: the model.
      calibration: the tokens.
      dtype: of the activations.
      stored_dtype: of the weights as they will be stored.

    Raises:
      CannotPruneError: values are too large for stored_dtype.
    """
    samples, length = calibration.token_ids.shape
    batch = max(1, min(_BATCH_TOKENS // length, samples))
    padding = ((0, -samples % batch), (0, 0))
    ids = np.pad(calibration.token_ids, padding)
    mask = np.pad(calibration.mask, padding)
    graphdef, state = nnx.split(_load_stem(stored, dtype, stored_dtype))
    values = np.empty((*ids.shape, stored.config.hidden_size), dtype)
    for start in range(0, len(ids), batch):
        rows = slice(start, start + batch)
        values[rows] = np.asarray(_embed(graphdef, state, ids[rows], mask[rows]))
    return Activations(values, mask, batch)


def _load_stem(stored: StoredOPT, dtype: np.dtype, stored_dtype: np.dtype) -> OPT:
    """The model up to its first layer."""
    config = dataclasses.replace(stored.config, num_layers=1)
    model = nnx.eval_shape(lambda: OPT(config, dtype=dtype, rngs=nnx.Rngs(0)))
    model.layers = nnx.List([])
    model.final_layer_norm = model.lm_head = model.project_out = nnx.data(None)
    for stored_name, name in stored.names.items():
        target = stored.targets[name]
        if target.module in _STEM:
            _, array = load_converted(stored, stored_name, stored_dtype)
            if target.attribute == "kernel":
                array = transpose(array)
            variable = getattr(getattr(model, target.module), target.attribute)
            variable.set_value(jax.device_put(array.astype(dtype)))
    return model


class _Tap(nnx.Module):
    """Shows the inputs of a layer to a function on their way."""

    def __init__(self, layer: nnx.Module, see: Callable[[jax.Array], None]):
        self.layer = layer
        self.see = see

    def __call__(self, x: jax.Array) -> jax.Array:
        self.see(x)
        return self.layer(x)


# At module level, so that another run of the same shapes compiles nothing.
@jax.jit(static_argnames="graphdef")
def _embed(
    graphdef: nnx.GraphDef[Any],
    state: nnx.State[Any, Any],
    ids: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    return nnx.merge(graphdef, state)._embed(ids, positions_from_mask(mask))


@jax.jit(static_argnames="graphdef")
def _forward(
    graphdef: nnx.GraphDef[Any],
    state: nnx.State[Any, Any],
    x: jax.Array,
    mask: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    y = _apply(nnx.merge(graphdef, state), x, mask)
    return y, _all_finite(y, mask)


@jax.jit(static_argnames=("graphdef", "module"), donate_argnames="found")
def _gather(
    graphdef: nnx.GraphDef[Any],
    state: nnx.State[Any, Any],
    x: jax.Array,
    mask: jax.Array,
    found: tuple[InputStatistics, jax.Array],
    *,
    module: str,
) -> tuple[InputStatistics, jax.Array]:
    """Adds the inputs of a linear layer; what comes after it is not computed."""
    layer = nnx.merge(graphdef, state)
    seen: list[jax.Array] = []
    set_node(layer, module, _Tap(node_at(layer, module), seen.append))
    _apply(layer, x, mask)
    stats, finite = found
    return stats.update(seen[0], mask), finite & _all_finite(seen[0], mask)


def _apply(layer: DecoderLayer, x: jax.Array, mask: jax.Array) -> jax.Array:
    slots = jnp.arange(x.shape[1], dtype=jnp.int32)
    return layer(x, functools.partial(attention, mask=mask, query_slots=slots))


def _all_finite(x: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(x) | ~mask[..., None])
