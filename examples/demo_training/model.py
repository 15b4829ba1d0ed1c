"""The library's OPT as a function of its parameters, with dropout for training."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from flashjax.models import opt

from .text import BOS_ID, PAD_ID

Params = dict[str, jax.Array]

# Rows of the position table before position 0.
_POSITION_OFFSET = 2


class ModelFunctions:
    """Creates parameters of an OPT and runs it on them.

    Parameters are a flat dictionary such as `{"layers.0.fc1.kernel": array}`.

    Args:
      config: a pre-norm OPT with ReLU and tied embeddings.
      batch_size: of the training steps.

    Attributes:
      config: as given.
      attention: what computes attention in training, "cudnn" or "xla".
    """

    def __init__(self, config: opt.OPTConfig, batch_size: int):
        if not (
            config.do_layer_norm_before
            and config.tie_word_embeddings
            and config.activation == "relu"
            and not config.has_projections
        ):
            raise ValueError("expected a pre-norm OPT with ReLU and tied embeddings")
        self.config = config
        self.attention = _choose_attention(config, batch_size)
        self._attention = functools.partial(
            _causal_attention, implementation=self.attention
        )
        self._names: list[str] = []
        self._graphs = {}
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
            abstract = nnx.eval_shape(lambda d=dtype: _create(config, 0, d))
            graph, state = nnx.split(abstract, nnx.Param)
            leaves, structure = jax.tree_util.tree_flatten_with_path(state)
            self._names = [_name(path) for path, _ in leaves]
            self._graphs[jnp.dtype(dtype)] = graph, structure

    def init(self, seed: int) -> Params:
        """Returns random float32 parameters.

        The layers that write to the residual stream start smaller, so that its size
        does not grow with depth (as in GPT-2).
        """
        params = self.parameters(_create(self.config, seed, jnp.float32))
        scale = jnp.float32((2 * self.config.num_layers) ** -0.5)
        for name in params:
            if name.endswith(("out_proj.kernel", "fc2.kernel")):
                params[name] = params[name] * scale
        return params

    def parameters(self, model: opt.OPT) -> Params:
        """Returns the parameters of a model of this architecture."""
        leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
        return dict(zip(self._names, leaves, strict=True))

    def prunable(self) -> list[str]:
        """Returns the names of the matrices that are pruned: all but embeddings."""
        return [name for name in self._names if name.endswith(".kernel")]

    def build(self, params: Mapping[str, jax.Array], dtype: DTypeLike) -> opt.OPT:
        """Returns the model of `params`, cast to `dtype`."""
        graph, structure = self._graphs[jnp.dtype(dtype)]
        leaves = [params[name].astype(dtype) for name in self._names]
        return nnx.merge(graph, jax.tree.unflatten(structure, leaves))

    def training_logits(
        self,
        params: Params,
        token_ids: jax.Array,
        dtype: DTypeLike,
        dropout: ArrayLike,
        key: jax.Array,
    ) -> jax.Array:
        """Returns the logits of the model with dropout at rate `dropout`.

        Dropout acts on the embeddings and on what each layer adds to the residual
        stream. At rate 0 the result is that of the model itself.

        Args:
          params: float32.
          token_ids: (batch, length) int32.
          dtype: of the computation.
          dropout: float32 scalar in [0, 1).
          key: of the dropped elements.

        Returns:
          (batch, length, vocab_size) float32.
        """
        model = self.build(params, dtype)
        keys = iter(jax.random.split(key, 1 + 2 * self.config.num_layers))
        keep = 1 - jnp.float32(dropout)

        def drop(x: jax.Array) -> jax.Array:
            kept = jax.random.bernoulli(next(keys), keep, x.shape)
            return jnp.where(kept, x / keep.astype(x.dtype), 0)

        positions = jnp.arange(token_ids.shape[1], dtype=jnp.int32) + _POSITION_OFFSET
        x = model.embed_tokens(token_ids) + model.embed_positions(positions)[None]
        x = drop(x)
        for layer in model.layers:
            h = layer.self_attn_layer_norm(x).astype(x.dtype)
            h = self._attention(*layer.self_attn.project(h))
            x = x + drop(layer.self_attn.output(h))
            h = layer.final_layer_norm(x).astype(x.dtype)
            x = x + drop(layer.fc2(jax.nn.relu(layer.fc1(h))))
        x = model.final_layer_norm(x).astype(x.dtype)
        return jnp.einsum(
            "btd,vd->btv",
            x,
            model.embed_tokens.embedding[...],
            preferred_element_type=jnp.float32,
        )


def windows(token_ids: jax.Array, starts: jax.Array, length: int):
    """Cuts training sequences out of a text.

    Args:
      token_ids: (tokens,) int32.
      starts: (batch,) int32, at most `tokens - length`.
      length: of the sequences.

    Returns:
      Inputs and targets, both (batch, length) int32; an input is `</s>` and the
      targets before the last.
    """
    slots = jnp.arange(length, dtype=jnp.int32)
    targets = token_ids[starts[:, None] + slots[None]]
    bos = jnp.full((starts.shape[0], 1), BOS_ID, jnp.int32)
    return jnp.concatenate([bos, targets[:, :-1]], axis=1), targets


def negative_log_likelihood(
    functions: ModelFunctions,
    params: Params,
    token_ids: jax.Array,
    dtype: DTypeLike,
    batch_size: int = 16,
) -> jax.Array:
    """Returns the mean over a text of -log p(token | tokens before it), in nats.

    The text is cut into pieces as long as the model has positions, each after a
    `</s>`; every token is predicted once, from the tokens of its piece before it.

    Args:
      functions: the model.
      params: its parameters.
      token_ids: (tokens,) int32, without special tokens.
      dtype: of the computation.
      batch_size: pieces that are computed together.
    """
    length = functions.config.max_positions
    tokens = token_ids.shape[0]
    batches = -(-tokens // (length * batch_size))
    padded = jnp.pad(
        token_ids, (0, batches * batch_size * length - tokens), constant_values=PAD_ID
    )
    model = functions.build(params, dtype)
    graph, state = nnx.split(model)

    def one_batch(start: jax.Array) -> jax.Array:
        starts = start + length * jnp.arange(batch_size, dtype=jnp.int32)
        inputs, targets = windows(padded, starts, length)
        logits = nnx.merge(graph, state)(inputs)
        log_probs = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
        slots = starts[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
        return -jnp.sum(jnp.where(slots < tokens, chosen, 0))

    starts = jnp.arange(batches, dtype=jnp.int32) * (length * batch_size)
    return jnp.sum(jax.lax.map(one_batch, starts)) / tokens


def _create(config: opt.OPTConfig, seed: int, dtype: DTypeLike) -> opt.OPT:
    return opt.OPT(config, dtype=dtype, rngs=nnx.Rngs(seed))


def _name(path: tuple) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return name.removesuffix(".value")


def _causal_attention(queries, keys, values, implementation):
    # (batch, heads, length, head_dim), the queries being scaled already.
    queries, keys, values = (jnp.swapaxes(x, 1, 2) for x in (queries, keys, values))
    # JAX's own function promotes bfloat16 implicitly.
    with jax.numpy_dtype_promotion("standard"):
        heads = jax.nn.dot_product_attention(
            queries,
            keys,
            values,
            is_causal=True,
            scale=1.0,
            implementation=implementation,
        )
    return jnp.swapaxes(heads, 1, 2)


def _choose_attention(config: opt.OPTConfig, batch: int) -> str:
    """Returns "cudnn" where cuDNN has a fused attention for these shapes, or "xla"."""
    if jax.default_backend() != "gpu":
        return "xla"
    shape = (3, batch, config.num_heads, config.max_positions, config.head_dim)
    qkv = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)

    def gradient(qkv, implementation):
        out = _causal_attention(*qkv, implementation).astype(jnp.float32)
        return jnp.mean(jnp.sin(out))

    try:
        fused, plain = (
            jax.jit(jax.value_and_grad(gradient), static_argnums=1)(qkv, name)
            for name in ("cudnn", "xla")
        )
    except (RuntimeError, ValueError, NotImplementedError):
        return "xla"
    scale = float(jnp.max(jnp.abs(plain[1])))
    error = float(jnp.max(jnp.abs(fused[1] - plain[1])))
    return "cudnn" if error < 0.05 * scale else "xla"
