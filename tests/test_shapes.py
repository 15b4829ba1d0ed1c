"""Shapes and dtypes of what public functions take and give, in jaxtyping's notation.

Names of axes mean the same size throughout a test. Traced arrays are checked too, which
says that shapes do not depend on values.
"""

import jax
import jax.numpy as jnp
import numpy as np
import op_cases
import pytest
from flax import nnx
from jaxtyping import Array, Bool, Float, Float16, Float32, Int32, jaxtyped

import flashjax as fj
from flashjax.models import opt

CONFIG = opt.OPTConfig(
    vocab_size=37, hidden_size=16, num_layers=2, ffn_size=24, num_heads=2
)


@pytest.fixture(autouse=True)
def axes():
    with jaxtyped("context"):
        yield


def packed(k=70, m=33):
    dense, w, _ = op_cases.packed_and_x((k, m), 0.6, 1, "float16")
    assert isinstance(jnp.asarray(dense), Float16[Array, "K M"])
    return w


def test_names_stand_for_one_size():
    packed()
    assert not isinstance(jnp.zeros((70, 32), jnp.float16), Float16[Array, "K M"])


def check_product(x, w, bias=None):
    assert isinstance(x, Float[Array, "*rows K"])
    y = fj.sparse_matmul(x, w, bias=bias)
    assert isinstance(y, Float[Array, "*rows M"])
    assert y.dtype == jnp.result_type(x.dtype, w.dtype)
    return y


@pytest.mark.parametrize("rows", [(), (3,), (2, 0), (2, 3, 4)])
@pytest.mark.parametrize("traced", [False, True])
def test_product(rows, traced):
    w, bias = packed(), jnp.zeros(33)
    assert isinstance(w.to_dense(), Float16[Array, "K M"])
    assert isinstance(w.T.to_dense(), Float16[Array, "M K"])
    assert isinstance(bias, Float32[Array, " M"])
    run = jax.jit(check_product) if traced else check_product
    run(jnp.ones((*rows, 70), jnp.float16), w, bias)


def test_gradients_have_the_shapes_of_their_arguments():
    w = packed()
    x, bias = jnp.ones((2, 3, 70)), jnp.zeros(33)
    loss = lambda x, bias: fj.sparse_matmul(x, w, bias=bias).sum()  # noqa: E731
    dx, dbias = jax.grad(loss, (0, 1))(x, bias)
    assert isinstance(dx, Float32[Array, "2 3 K"])
    assert isinstance(dbias, Float32[Array, " M"])
    t = fj.TrainableMatrix.from_sparse(w)
    assert isinstance(t.values, Float32[Array, "segments 16 32 2"])
    gradient = jax.grad(
        lambda values: fj.sparse_matmul(x, t.replace(values=values)).sum()
    )(t.values)
    assert isinstance(gradient, Float32[Array, "segments 16 32 2"])


def test_stacks():
    stack = fj.SparseMatrix.stack([packed(), packed()])
    y = fj.sparse_matmul(jnp.ones((5, 70), jnp.float16), stack, layer=1)
    assert isinstance(y, Float16[Array, "5 M"])


@pytest.mark.parametrize("traced", [False, True])
def test_layers(traced):
    layer = fj.SparseDense.from_matrix(packed(), jnp.zeros(33, jnp.float16))
    assert isinstance(layer.bias[...], Float16[Array, " M"])
    call = nnx.jit(lambda layer, x: layer(x)) if traced else lambda layer, x: layer(x)
    y = call(layer, jnp.ones((2, 3, 70), jnp.float16))
    assert isinstance(y, Float16[Array, "2 3 M"])


def test_pruning():
    dense = jnp.asarray(op_cases.random_dense(64, 24, 0, "float16"))
    x = op_cases.random_x((5, 40, 64), "float16")
    assert isinstance(dense, Float16[Array, "K M"])
    statistics = fj.prune.InputStatistics.zeros(64).update(x)
    assert isinstance(statistics.gram, Float32[Array, "K K"])
    for method in fj.prune.METHODS.values():
        given = (dense, statistics) if method.needs_statistics else (dense,)
        assert isinstance(method.function(*given, 0.5), Float16[Array, "K M"])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_opt(dtype):
    model = opt.OPT(CONFIG, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    ids, mask = map(jnp.asarray, opt.pad_prompts([[2, 5, 7], [2]]))
    assert isinstance(ids, Int32[Array, "batch length"])
    assert isinstance(mask, Bool[Array, "batch length"])
    assert isinstance(model(ids, mask), Float32[Array, "batch length 37"])
    cache = model.init_cache(2, 9)
    for part in (*cache.keys, *cache.values):
        assert isinstance(part, Float[Array, "batch 2 slots 8"])
        assert part.dtype == dtype
    assert isinstance(cache.mask, Bool[Array, "batch slots"])


@pytest.mark.parametrize("new", [0, 1, 5])
def test_generate(new):
    model = opt.OPT(CONFIG, dtype=jnp.float16, rngs=nnx.Rngs(0))
    ids, mask = opt.pad_prompts([[2, 5, 7], [2], [3, 4]])
    out, scores = opt.generate(
        model, ids, mask, max_new_tokens=new, return_logprobs=True
    )
    assert isinstance(out, Int32[Array, f"3 3+{new}"])
    assert isinstance(scores, Float32[Array, f"3 {new}"])
    stream = opt.generate_stream(model, ids, mask, max_new_tokens=new, eos_token_id=-1)
    columns = list(stream)
    assert len(columns) == new
    for tokens in columns:
        assert isinstance(tokens, Int32[np.ndarray, "3"])


def test_shards():
    mesh = jax.make_mesh((2,), ("model",))
    dense = op_cases.random_dense(64, 32, 0.6, "float16")
    for dim in ("in", "out"):
        w = fj.ShardedSparseMatrix.from_dense(dense, mesh, "model", dim=dim)
        assert isinstance(w.to_dense(), Float16[Array, "K M"])
        y = fj.sparse_matmul(jnp.ones((3, 64), jnp.float16), w)
        assert isinstance(y, Float16[Array, "3 M"])
