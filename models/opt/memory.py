"""How much memory a model will take, from its configuration alone."""

import dataclasses
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flashjax.matmul_impl import cuda_kernel_rows
from flashjax.packed_size import packed_bytes

from .attention import check_cache_dtype
from .config import OPTConfig
from .fused_qkv import QKV
from .generation_request import bucket, prefill_sequences
from .hf_folder import opt_targets
from .modeling import check_dtype
from .parallel import DECODER_LINEARS

# Partial sums of the CUDA kernel, LscdWorkspaceBytes() at its largest tile.
_WORKSPACE = 80 * 16 * (8 + 344 // 8 * 32 * 16)
# CUDA's context, cuBLAS and loaded programs. An estimate, not counted on CPUs.
RUNTIME = 1 << 30
# JAX takes this share of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
_DEFAULT_FRACTION = 0.75


@dataclasses.dataclass(frozen=True)
class MemoryPrediction:
    """Bytes that one device needs.

    Attributes:
      linear_weights: kernels of the decoder's linear layers, packed or dense.
      other_weights: embeddings, output layer, norms and biases.
      kv_cache: keys, values and their mask.
      prefill_temporaries: the largest set of activations of the prompts, with one
        expanded kernel where the layers are sparse and the prompts have more tokens
        than CUDA's kernel takes rows (any number on a Hopper).
      decode_temporaries: the same of one step; both with the kernel's workspace.
      device_bytes: of the device, None where unknown.
    """

    linear_weights: int
    other_weights: int
    kv_cache: int
    prefill_temporaries: int
    decode_temporaries: int
    device_bytes: int | None

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.linear_weights + self.other_weights

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        temporaries = max(self.prefill_temporaries, self.decode_temporaries)
        return self.weights + self.kv_cache + temporaries

    @property
    def fits(self) -> bool | None:
        """Whether the device is large enough, CUDA's own memory included."""
        if self.device_bytes is None:
            return None
        return self.total + RUNTIME <= self.device_bytes

    @property
    def fits_by_default(self) -> bool | None:
        """Whether the share that JAX takes of a GPU by default is large enough."""
        if self.device_bytes is None:
            return None
        return self.fits and self.total <= _DEFAULT_FRACTION * self.device_bytes

    def to_json(self) -> dict[str, Any]:
        """All figures by name."""
        names = ("weights", "total", "fits", "fits_by_default")
        figures = {name: getattr(self, name) for name in names}
        return dataclasses.asdict(self) | figures | {"runtime": RUNTIME}


def predict(
    config: OPTConfig,
    *,
    sparsity: float,
    batch: int,
    length: int,
    prompt: int | None = None,
    dtype: DTypeLike = jnp.float16,
    cache_dtype: DTypeLike | None = None,
    devices: int = 1,
    device_bytes: int | None = None,
) -> MemoryPrediction:
    """Predicts what `generate` needs on a GPU, before anything is loaded.

    Packed kernels are predicted by `flashjax.packed_size.packed_bytes`, in the default
    layout and for zeros that are anywhere, with q, k and v of a layer in one matrix
    (three take a few percent more in tiny models, and the same in others). With several
    devices, kernels, cache and (where it divides) vocabulary are split evenly (tensor
    parallelism) and everything else is counted on each. Up to how many rows of x no
    weight is expanded is what is usual, not what `flashjax.autotune` found.

    Args:
      config: the architecture.
      sparsity: share of zeros in the decoder's linear layers; 0: dense.
      batch: sequences at once.
      length: tokens of a sequence, prompt and new ones together.
      prompt: tokens of the longest prompt; None is the worst case, `length`.
      dtype: of the model.
      cache_dtype: of keys and values; None is the model's.
      devices: number of devices.
      device_bytes: memory of one; None takes JAX's first device if it says.

    Returns:
      The prediction for one device.

    Raises:
      ValueError: a value is out of range.
    """
    dtype = check_dtype(dtype)
    prompt = length if prompt is None else prompt
    _check(config, sparsity, batch, length, prompt, devices, dtype)
    if device_bytes is None:
        device_bytes = detect_device_bytes()
    linear, other = _weights(config, sparsity, dtype.itemsize, devices)
    slots = bucket(prompt) + (bucket(length - prompt) if prompt < length else 0)
    cached = check_cache_dtype(cache_dtype, dtype).itemsize
    kv = 2 * config.num_layers * config.hidden_size * batch * slots * cached
    size = dtype.itemsize
    workspace = _WORKSPACE if sparsity else 0
    return MemoryPrediction(
        linear_weights=linear,
        other_weights=other,
        kv_cache=kv // devices + batch * slots,
        prefill_temporaries=_activations(
            config,
            sparsity,
            prefill_sequences(batch, bucket(prompt)),
            bucket(prompt),
            bucket(prompt),
            size,
            devices,
        )
        + workspace,
        decode_temporaries=_activations(
            config, sparsity, batch, 1, slots, size, devices
        )
        + workspace,
        device_bytes=device_bytes,
    )


def detect_device_bytes() -> int | None:
    """Memory of JAX's first device, None where it has none of its own.

    JAX says what it may take, which is a share of what there is.
    """
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return None
    share = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
    return int(limit / (float(share) if share else _DEFAULT_FRACTION))


def _weights(
    config: OPTConfig, sparsity: float, itemsize: int, devices: int
) -> tuple[int, int]:
    linear = other = 0
    for target in opt_targets(config).values():
        name = target.module.split(".")[-1]
        elements = math.prod(target.shape)
        if name in ("embed_tokens", "lm_head") and config.vocab_size % devices == 0:
            elements //= devices  # see parallel.py
        if target.attribute != "kernel" or name not in DECODER_LINEARS:
            other += elements * itemsize
        elif sparsity:
            out_features, in_features = target.shape
            if name in QKV:
                if name != QKV[0]:
                    continue
                out_features *= len(QKV)
            if DECODER_LINEARS[name] == "in":
                in_features = -(-in_features // devices)
            else:
                out_features = -(-out_features // devices)
            linear += packed_bytes((in_features, out_features), sparsity)
        else:
            linear += elements * itemsize // devices
    return linear, other


def _activations(
    config: OPTConfig,
    sparsity: float,
    batch: int,
    length: int,
    slots: int,
    itemsize: int,
    devices: int,
) -> int:
    """The largest of attention, feed-forward and logits, in bytes.

    Attention holds scores and weights in float32 and the weights in the model's dtype,
    for queries, keys and values; feed-forward its input to the activation and its
    result. Two arrays of the hidden size live beside either.
    """
    rows, hidden, ffn = batch * length, config.hidden_size, config.ffn_size
    block = min(batch * config.num_heads * length * slots, 1 << 28)
    attention = block * (4 + 4 + itemsize) + 4 * rows * hidden * itemsize
    feed_forward = 2 * rows * ffn * itemsize
    expanded = 0
    if sparsity and rows > cuda_kernel_rows():
        expanded = hidden * max(ffn, 3 * hidden) * itemsize
    layer = max(attention, feed_forward) // devices + 2 * rows * hidden * itemsize
    logits = 4 * 4 * batch * config.vocab_size  # noise, sorted and filtered beside them
    return max(layer + expanded // devices, logits)


def _check(config, sparsity, batch, length, prompt, devices, dtype) -> None:
    if not 0 <= sparsity <= 1:
        raise ValueError(f"expected sparsity from 0 to 1, got {sparsity}")
    if sparsity and dtype == jnp.float32:
        raise ValueError("sparse layers are float16 or bfloat16, got float32")
    for name, value in (("batch", batch), ("length", length), ("devices", devices)):
        if value < 1:
            raise ValueError(f"expected {name} of at least 1, got {value}")
    if not 1 <= prompt <= length:
        raise ValueError(f"expected prompt from 1 to length={length}, got {prompt}")
    if length > config.max_positions:
        raise ValueError(
            f"expected length up to the model's {config.max_positions} positions, got "
            f"{length}"
        )
    if config.num_heads % devices:
        raise ValueError(
            f"expected a number of devices that divides {config.num_heads} heads, got "
            f"{devices}"
        )
