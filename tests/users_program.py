"""A user's program, which `make lint` checks with mypy --strict; it is not run.

What the public surface gives must have the types that it says, and not be Any.
"""

from pathlib import Path
from typing import assert_type

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

import flashjax as fj
from flashjax.checkpoint import CheckpointReader
from flashjax.models import opt
from flashjax.models.opt.calibration import CalibrationText
from flashjax.models.opt.evaluation import Perplexity, perplexity
from flashjax.models.opt.memory import MemoryPrediction, predict
from flashjax.models.opt.pruning import PruneResult, prune_pretrained


class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(64, 256, rngs=rngs)
        self.down = fj.SparseDense(256, 64, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.relu(self.up(x)))


def matrices(dense: jax.Array, x: jax.Array) -> None:
    pruned = fj.prune.magnitude(dense, 0.6)
    assert_type(pruned, jax.Array)
    assert_type(fj.prune.magnitude(np.asarray(dense), 0.6), np.ndarray)
    w = fj.SparseMatrix.from_dense(pruned)
    assert_type(w, fj.SparseMatrix)
    assert_type(fj.sparse_matmul(x, w, bias=jnp.zeros(4)), jax.Array)
    assert_type(w.shape, tuple[int, int])
    assert_type(w.nnz, int)
    assert_type(w.sparsity, float)
    assert_type(w.nbytes, int)
    assert_type(w.to_dense(), jax.Array)
    assert_type(w.T, fj.SparseMatrix)
    assert_type(fj.SparseMatrix.stack([w, w]), fj.SparseMatrix)
    trainable = fj.TrainableMatrix.from_sparse(w)
    assert_type(trainable, fj.TrainableMatrix)
    assert_type(trainable.to_sparse(), fj.SparseMatrix)
    mesh = jax.make_mesh((1,), ("model",))
    split = fj.ShardedSparseMatrix.from_dense(dense, mesh, "model", dim="out")
    assert_type(split, fj.ShardedSparseMatrix)
    assert_type(fj.sparse_matmul(x, split), jax.Array)
    statistics = fj.prune.InputStatistics.zeros(64).update(x)
    assert_type(fj.prune.sparsegpt(dense, statistics, 0.6), jax.Array)


def layers(linear: nnx.Linear, x: jax.Array) -> None:
    layer = fj.SparseDense.from_linear(linear)
    assert_type(layer, fj.SparseDense)
    assert_type(layer(x), jax.Array)
    model = fj.sparsify(MLP(nnx.Rngs(0)), lambda path, layer: "up" in path)
    assert_type(model, MLP)
    assert_type(fj.trainable(model), MLP)
    assert_type(fj.freeze(model), MLP)


def language_models(folder: Path) -> None:
    model, tokenizer = opt.from_pretrained(folder, dtype=jnp.float16)
    assert_type(model, opt.OPT)
    assert_type(tokenizer, Tokenizer | None)
    ids, mask = opt.pad_prompts([[2, 5], [2]])
    assert_type(opt.generate(model, ids, mask, max_new_tokens=4), jax.Array)
    for tokens in opt.generate_stream(model, ids, mask):
        assert_type(tokens, np.ndarray)
    assert_type(model(jnp.asarray(ids)), jax.Array)
    assert_type(perplexity(model, ids[0]), Perplexity)
    config = opt.OPTConfig.opt_66b()
    assert_type(config, opt.OPTConfig)
    assert_type(predict(config, sparsity=0.8, batch=8, length=64), MemoryPrediction)
    text = CalibrationText("text.txt", samples=4)
    assert_type(prune_pretrained(folder, "out", calibration=text), PruneResult)
    opt.save_pretrained(model, tokenizer, folder / "copy")
    try:
        with CheckpointReader(folder) as reader:
            assert_type(reader.names(), list[str])
    except fj.CheckpointError as error:
        raise SystemExit(str(error)) from error
