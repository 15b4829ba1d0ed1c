"""OPT in Flax NNX.

Module and attribute names follow the Hugging Face checkpoint, so that
``model.decoder.layers.0.fc1.weight`` is ``model.layers[0].fc1.kernel`` transposed. One
name is not among them: `qkv_proj`, which a fused model has instead of three layers.
The semantics are those of PyTorch's OPT in transformers: learned positions offset by
two and derived from the mask, queries scaled before the product, softmax in float32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from flashjax.nn import SparseDense

from .attention import (
    KVCache,
    attention,
    check_cache_dtype,
    decode_attention,
    product_precision,
    row_major,
    to_cache,
)
from .config import OPTConfig
from .fused_qkv import split_by_head
from .parallel import TensorParallel

# Rows of the position table before position 0; padding looks up row 1.
POSITION_OFFSET = 2

_LAYER_NORM_EPSILON = 1e-5

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_10": lambda x: jnp.clip(jax.nn.gelu(x, approximate=False), -10, 10),
    "gelu_accurate": jax.nn.gelu,
    "gelu_fast": jax.nn.gelu,
    "gelu_new": jax.nn.gelu,
    "gelu_python": partial(jax.nn.gelu, approximate=False),
    "gelu_python_tanh": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "hardswish": jax.nn.hard_swish,
    "leaky_relu": jax.nn.leaky_relu,
    "linear": lambda x: x,
    "mish": jax.nn.mish,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


class Attention(nnx.Module):
    """Multi-headed causal self-attention.

    Attributes:
      qkv_proj: one layer of 3 * hidden outputs, ordered as `fused_qkv` says; None
        where there are three.
      q_proj, k_proj, v_proj: the three layers; None where they are fused.
      out_proj: the output layer.
    """

    def __init__(
        self,
        config: OPTConfig,
        *,
        dtype: DTypeLike,
        fuse_qkv: bool = False,
        rngs: nnx.Rngs,
    ):
        size = config.hidden_size
        linear = partial(
            _linear, config, size, dtype=dtype, use_bias=config.enable_bias, rngs=rngs
        )
        self.q_proj: Any = nnx.data(None if fuse_qkv else linear(size))
        self.k_proj: Any = nnx.data(None if fuse_qkv else linear(size))
        self.v_proj: Any = nnx.data(None if fuse_qkv else linear(size))
        self.qkv_proj: Any = nnx.data(linear(3 * size) if fuse_qkv else None)
        self.out_proj = linear(size)
        self.num_heads = config.num_heads
        self.head_dim = config.head_dim

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Maps (batch, length, hidden) to queries, keys, values by head.

        Each is (batch, num_heads, length, head_dim); queries are scaled.
        """
        scale = np.asarray(self.head_dim**-0.5, x.dtype)
        if self.qkv_proj is not None:
            queries, keys, values = split_by_head(self.qkv_proj(x), self.num_heads)
            return queries * scale, keys, values
        queries = self.q_proj(x) * scale
        shape = (*x.shape[:2], self.num_heads, self.head_dim)

        def by_head(projected):
            return jnp.swapaxes(projected.reshape(shape), 1, 2)

        return by_head(queries), by_head(self.k_proj(x)), by_head(self.v_proj(x))

    def output(self, heads: jax.Array) -> jax.Array:
        """Maps (batch, num_heads, length, head_dim) to (batch, length, hidden)."""
        merged = jnp.swapaxes(heads, 1, 2)
        return self.out_proj(merged.reshape(*merged.shape[:2], -1))


class DecoderLayer(nnx.Module):
    """One layer: attention and feed-forward, each with a residual and a norm."""

    def __init__(
        self,
        config: OPTConfig,
        *,
        dtype: DTypeLike,
        fuse_qkv: bool = False,
        rngs: nnx.Rngs,
    ):
        size, ffn, bias = config.hidden_size, config.ffn_size, config.enable_bias
        linear = partial(_linear, config, dtype=dtype, use_bias=bias, rngs=rngs)
        self.self_attn = Attention(config, dtype=dtype, fuse_qkv=fuse_qkv, rngs=rngs)
        self.self_attn_layer_norm = _layer_norm(config, dtype=dtype, rngs=rngs)
        self.fc1 = linear(size, ffn)
        self.fc2 = linear(ffn, size)
        self.final_layer_norm = _layer_norm(config, dtype=dtype, rngs=rngs)
        self.norm_before = config.do_layer_norm_before
        self.activation = config.activation

    def __call__(
        self,
        x: jax.Array,
        attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    ) -> jax.Array:
        """Applies the layer to (batch, length, hidden).

        ``attend`` maps queries, keys and values to attention outputs, so that the
        layer knows no cache.
        """
        residual = x
        if self.norm_before:
            x = _normalize(self.self_attn_layer_norm, x)
        x = residual + self.self_attn.output(attend(*self.self_attn.project(x)))
        if not self.norm_before:
            x = _normalize(self.self_attn_layer_norm, x)

        residual = x
        if self.norm_before:
            x = _normalize(self.final_layer_norm, x)
        x = residual + self.fc2(self._activated_fc1(x))
        if not self.norm_before:
            x = _normalize(self.final_layer_norm, x)
        return x

    def _activated_fc1(self, x: jax.Array) -> jax.Array:
        if self.activation == "relu" and isinstance(self.fc1, SparseDense):
            return self.fc1(x, activation="relu")
        return _ACTIVATIONS[self.activation](self.fc1(x))


class OPT(nnx.Module):
    """OPT language model.

    Args:
      config: the architecture.
      dtype: of parameters and activations: float32, float16 or bfloat16. Layer norms,
        softmax and logits are computed in float32 whatever it is.
      fuse_qkv: whether queries, keys and values of a layer come from one layer
        `qkv_proj`, which is faster where the product has a constant cost; otherwise
        from `q_proj`, `k_proj` and `v_proj`, as Hugging Face names them.
      cache_dtype: in which generation keeps keys and values: float8_e4m3fn, which
        halves them and rounds them to 3 bits behind the first, or None, the model's.
      rngs: keys of the random initialisation.

    Raises:
      ValueError: another dtype or cache_dtype.
    """

    def __init__(
        self,
        config: OPTConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        fuse_qkv: bool = False,
        cache_dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        dtype = check_dtype(dtype)
        self.config = config
        self.dtype = dtype
        self.cache_dtype = check_cache_dtype(cache_dtype, dtype)
        self.parallel: TensorParallel | None = None
        embed = partial(
            nnx.Embed,
            dtype=dtype,
            param_dtype=dtype,
            embedding_init=nnx.initializers.normal(config.init_std),
            rngs=rngs,
        )
        linear = partial(_linear, config, dtype=dtype, use_bias=False, rngs=rngs)
        size = config.hidden_size
        proj = config.word_embed_proj_dim or size
        self.embed_tokens = embed(config.vocab_size, proj)
        self.embed_positions = embed(config.max_positions + POSITION_OFFSET, size)
        self.project_in = nnx.data(None)
        self.project_out = nnx.data(None)
        if config.has_projections:
            self.project_in = linear(proj, size)
            self.project_out = linear(size, proj)
        self.layers = nnx.List(
            DecoderLayer(config, dtype=dtype, fuse_qkv=fuse_qkv, rngs=rngs)
            for _ in range(config.num_layers)
        )
        self.final_layer_norm = nnx.data(None)
        if config.has_final_layer_norm:
            self.final_layer_norm = _layer_norm(config, dtype=dtype, rngs=rngs)
        self.lm_head = nnx.data(None)
        if not config.tie_word_embeddings:
            self.lm_head = linear(
                proj, config.vocab_size, preferred_element_type=jnp.float32
            )

    def __call__(
        self, token_ids: ArrayLike, attention_mask: ArrayLike | None = None
    ) -> jax.Array:
        """Computes the logits of every token's successor.

        Args:
          token_ids: (batch, length) integers in [0, vocab_size).
          attention_mask: (batch, length) bool, or integers 0 and 1; False marks
            padding, on any side. None means no padding.

        Returns:
          (batch, length, vocab_size) float32 logits. Those of padding have no meaning.

        Raises:
          ValueError: a wrong shape or dtype, more tokens than positions, or (where the
            values are known) a token id or mask value out of range.
        """
        token_ids, mask = check_tokens(self.config, token_ids, attention_mask)
        length = token_ids.shape[1]
        slots = jnp.arange(length, dtype=jnp.int32)

        x = self._embed(token_ids, positions_from_mask(mask))
        for layer in self.layers:
            x = layer(x, partial(attention, mask=mask, query_slots=slots))
        return self._logits(self._finish(x))

    def init_cache(self, batch: int, max_length: int) -> KVCache:
        """Returns an empty cache of ``max_length`` slots for ``batch`` sequences.

        Raises:
          ValueError: a size below one.
        """
        if batch < 1 or max_length < 1:
            raise ValueError(
                "batch and max_length must be at least 1, got "
                f"batch={batch}, max_length={max_length}"
            )
        shape = (batch, self.config.num_heads, max_length, self.config.head_dim)
        layers = range(self.config.num_layers)

        def empty():
            slots = jnp.zeros(shape, self.cache_dtype)
            return slots if self.parallel is None else self.parallel.by_heads(slots)

        return KVCache(
            keys=tuple(empty() for _ in layers),
            values=tuple(empty() for _ in layers),
            mask=jnp.zeros((batch, max_length), jnp.bool_),
        )

    def step(
        self,
        token_ids: jax.Array,
        mask: jax.Array,
        positions: jax.Array,
        cache: KVCache,
        start: ArrayLike,
        *,
        slots: int | None = None,
        first_sequence: ArrayLike | None = None,
        last_only: bool = False,
        logits_index: jax.Array | None = None,
        output_table: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Appends tokens to a cache: the whole prompt (prefill) or one (decode).

        The tokens go to slots ``start .. start + length - 1`` and attend to every slot
        up to their own that holds a real token.

        Args:
          token_ids: (batch, length) int32.
          mask: (batch, length) bool, False for padding.
          positions: (batch, length) int32; ``positions_from_mask`` for a prompt, the
            number of real tokens before it for a later token.
          cache: the cache, of the same batch. Under jit, donate it.
          start: int32 scalar, first slot to write. With a Python int only the slots
            before ``start + length`` are read, so prefill costs no more for a longer
            cache. ``start + length`` must not exceed ``cache.max_length``; this is
            checked for a Python int only.
          slots: read only so many slots of the cache, from the first; they must hold
            ``start + length``. None reads all, but for a start that is a Python int.
            The kernel of one new token on GPUs reads those in use, whatever this says.
          first_sequence: int32 scalar: the batch is a part of the cache's, from this
            sequence on. None: it is the whole. What does not fit is checked for a
            Python int only.
          last_only: compute the logits of the last token alone.
          logits_index: (batch,) int32, compute the logits of that token alone.
          output_table: what ``float32_output_table`` returned, to be used instead of
            converting the embedding in every step.

        Returns:
          Logits in float32, (batch, length, vocab_size), or (batch, vocab_size) with
          ``last_only`` or ``logits_index``; and the updated cache.

        Raises:
          ValueError: shapes that do not fit each other.
        """
        _check_step(token_ids, mask, positions, cache, start, slots, first_sequence)
        batch, length = token_ids.shape
        if slots is None:
            slots = start + length if isinstance(start, int) else cache.max_length
        start = jnp.asarray(start, jnp.int32)
        zero = jnp.zeros((), jnp.int32)
        first = zero if first_sequence is None else jnp.int32(first_sequence)
        query_slots = start + jnp.arange(length, dtype=jnp.int32)
        slot_mask = jax.lax.dynamic_update_slice(cache.mask, mask, (first, start))
        all_keys, all_values = [], []

        def read(array, axis):
            """The batch's part of an array, and of an axis the slots that are read."""
            if first_sequence is None:
                return jax.lax.slice_in_dim(array, 0, slots, axis=axis)
            sizes = list(array.shape)
            sizes[0], sizes[axis] = batch, slots
            return jax.lax.dynamic_slice(
                array, (first, *[zero] * (array.ndim - 1)), sizes
            )

        def attend(queries, keys, values, *, layer):
            at = (first, zero, start, zero)
            keys, values = (to_cache(x, self.cache_dtype) for x in (keys, values))
            keys = jax.lax.dynamic_update_slice(cache.keys[layer], keys, at)
            values = jax.lax.dynamic_update_slice(cache.values[layer], values, at)
            # Fused with what reads them, the updates would not happen in place.
            keys, values = jax.lax.optimization_barrier((keys, values))
            if self.parallel is None:  # split by heads, XLA would gather it for that
                keys, values = row_major(keys), row_major(values)
            all_keys.append(keys)
            all_values.append(values)
            if length == 1 and first_sequence is None:
                return decode_attention(
                    queries, keys, values, mask=slot_mask, slot=start, slots=slots
                )
            return attention(
                queries,
                read(keys, 2).astype(queries.dtype),
                read(values, 2).astype(queries.dtype),
                mask=read(slot_mask, 1),
                query_slots=query_slots,
            )

        x = self._embed(token_ids, positions)
        for index, layer in enumerate(self.layers):
            x = layer(x, partial(attend, layer=index))
        if logits_index is not None:
            x = jnp.take_along_axis(x, logits_index[:, None, None], axis=1)[:, 0]
        elif last_only:
            x = x[:, -1]
        cache = KVCache(tuple(all_keys), tuple(all_values), slot_mask)
        return self._logits(self._finish(x), output_table), cache

    def float32_output_table(self) -> jax.Array | None:
        """The tied embedding in float32, for CPUs, which multiply no half precision.

        Returns:
          (vocab_size, word_embed_proj_dim) float32; None where it would be no other
          array: the model is float32 or has an output layer of its own.
        """
        if self.lm_head is not None or self.dtype == jnp.float32:
            return None
        return self.embed_tokens.embedding[...].astype(jnp.float32)

    def _embed(self, token_ids: jax.Array, positions: jax.Array) -> jax.Array:
        x = self.embed_tokens(token_ids)
        if self.project_in is not None:
            x = self.project_in(x)
        return x + self.embed_positions(positions + POSITION_OFFSET)

    def _finish(self, x: jax.Array) -> jax.Array:
        if self.final_layer_norm is not None:
            x = _normalize(self.final_layer_norm, x)
        if self.project_out is not None:
            x = self.project_out(x)
        return x

    def _logits(self, x: jax.Array, table: jax.Array | None = None) -> jax.Array:
        logits = self._output_layer(x, table)
        return logits if self.parallel is None else self.parallel.whole_logits(logits)

    def _output_layer(self, x: jax.Array, table: jax.Array | None) -> jax.Array:
        if self.lm_head is not None:
            return self.lm_head(x).astype(jnp.float32)
        if table is None:
            table = self.embed_tokens.embedding[...]
        x = x.astype(table.dtype)
        return jax.lax.dot_general(
            x,
            table,
            (((x.ndim - 1,), (1,)), ((), ())),
            precision=product_precision(x.dtype),
            preferred_element_type=jnp.float32,
        )


def check_opt(model: Any) -> None:
    """Raises TypeError unless it is an OPT."""
    if isinstance(model, OPT):
        return
    hint = ""
    if isinstance(model, tuple) and model and isinstance(model[0], OPT):
        hint = ": from_pretrained returns the model and its tokenizer"
    raise TypeError(f"expected an OPT as the model, got {type(model).__name__}{hint}")


def check_dtype(dtype: DTypeLike) -> np.dtype:
    """Returns a model's dtype as numpy's.

    Raises:
      ValueError: it is not float32, float16 or bfloat16.
    """
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found not in (jnp.float32, jnp.float16, jnp.bfloat16):
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")
    return found


def positions_from_mask(mask: ArrayLike) -> jax.Array:
    """Positions as PyTorch's OPT derives them from the attention mask.

    Args:
      mask: (batch, length) bool or integers 0 and 1.

    Returns:
      (batch, length) int32: the number of real tokens before a real token, -1 for
      padding.
    """
    mask = jnp.asarray(mask).astype(jnp.int32)
    return jnp.cumsum(mask, axis=1, dtype=jnp.int32) * mask - 1


def check_tokens(
    config: OPTConfig, token_ids: ArrayLike, attention_mask: ArrayLike | None = None
) -> tuple[jax.Array, jax.Array]:
    """Checks a batch of token ids and its mask against a configuration.

    Args:
      config: the architecture.
      token_ids: (batch, length) integers.
      attention_mask: (batch, length) bool or integers 0 and 1, or None.

    Returns:
      Token ids as int32 and the mask as bool, both (batch, length).

    Raises:
      ValueError: see ``OPT.__call__``.
    """
    if not isinstance(token_ids, jax.Array):
        token_ids = np.asarray(token_ids)
    shape = token_ids.shape
    if not jnp.issubdtype(token_ids.dtype, jnp.integer):
        raise ValueError(f"token_ids must be integers, got dtype {token_ids.dtype}")
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"token_ids must be (batch, length), neither of them 0, got shape {shape}"
        )
    if shape[1] > config.max_positions:
        raise ValueError(
            f"token_ids have length {shape[1]}, the model has "
            f"{config.max_positions} positions"
        )
    if not isinstance(token_ids, jax.core.Tracer):
        low, high = _range(token_ids)
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"token_ids must be in [0, {config.vocab_size}), got values from "
                f"{low} to {high}"
            )
    token_ids = jnp.asarray(token_ids, jnp.int32)
    if attention_mask is None:
        return token_ids, jnp.ones(shape, jnp.bool_)

    if not isinstance(attention_mask, jax.Array):
        attention_mask = np.asarray(attention_mask)
    dtype = attention_mask.dtype
    if not (dtype == jnp.bool_ or jnp.issubdtype(dtype, jnp.integer)):
        raise ValueError(f"attention_mask must be bool or integers, got dtype {dtype}")
    if attention_mask.shape != shape:
        raise ValueError(
            f"attention_mask must have the shape of token_ids, {shape}, "
            f"got {attention_mask.shape}"
        )
    if not isinstance(attention_mask, jax.core.Tracer) and dtype != jnp.bool_:
        low, high = _range(attention_mask)
        if low < 0 or high > 1:
            raise ValueError(
                f"attention_mask must hold 0 and 1, got values from {low} to {high}"
            )
    return token_ids, jnp.asarray(attention_mask).astype(jnp.bool_)


def _range(array: np.ndarray | jax.Array) -> tuple[int, int]:
    # By numpy: under jit, jnp would turn what is known into a tracer.
    values = np.asarray(array)
    return int(values.min()), int(values.max())


def _check_step(token_ids, mask, positions, cache, start, slots, sequence):
    shape = token_ids.shape
    if mask.shape != shape or positions.shape != shape:
        raise ValueError(
            f"mask and positions must have the shape of token_ids, {shape}, "
            f"got {mask.shape} and {positions.shape}"
        )
    if shape[0] != cache.batch if sequence is None else shape[0] > cache.batch:
        raise ValueError(
            f"the cache is for a batch of {cache.batch}, token_ids have {shape[0]}"
        )
    first = start if isinstance(start, int) else 0
    if first + shape[1] > cache.max_length:
        raise ValueError(
            f"{shape[1]} tokens from slot {first} do not fit a cache of "
            f"{cache.max_length} slots"
        )
    if isinstance(sequence, int) and not 0 <= sequence <= cache.batch - shape[0]:
        raise ValueError(
            f"{shape[0]} sequences from number {sequence} do not fit a cache for "
            f"{cache.batch}"
        )
    if slots is not None and not first + shape[1] <= slots <= cache.max_length:
        raise ValueError(
            f"slots must be from {first + shape[1]}, which hold the tokens, to the "
            f"cache's {cache.max_length}, got {slots}"
        )


def _normalize(norm: nnx.LayerNorm, x: jax.Array) -> jax.Array:
    return norm(x).astype(x.dtype)


def _linear(
    config, in_features, out_features, *, dtype, use_bias, rngs, **kwargs
) -> nnx.Linear:
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=dtype,
        precision=product_precision(dtype),
        kernel_init=nnx.initializers.normal(config.init_std),
        rngs=rngs,
        **kwargs,
    )


def _layer_norm(config, *, dtype, rngs) -> nnx.LayerNorm:
    affine = config.layer_norm_elementwise_affine
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=_LAYER_NORM_EPSILON,
        dtype=jnp.float32,
        param_dtype=dtype,
        use_bias=affine,
        use_scale=affine,
        use_fast_variance=False,
        rngs=rngs,
    )
