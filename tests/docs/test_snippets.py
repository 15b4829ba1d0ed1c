"""The Python of the pages runs, each page as one program."""

import json

import doc_pages as pages
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flashjax as fj
from flashjax.models import opt

# The folders and files that pages name.
FOLDERS = ("examples/demo-opt", "my-opt", "path/to/opt-125m", "opt")
TEXT = "my-text.jsonl"


class Model(nnx.Module):
    """Stands for a reader's own."""

    def __init__(self):
        self.mlp = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(64, 64, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.head(nnx.relu(self.mlp(x)))


def dense():
    return fj.prune.magnitude(
        jax.random.normal(jax.random.key(0), (64, 64), jnp.float16), 0.6
    )


def readme():
    return {"linear": nnx.Linear(64, 64, rngs=nnx.Rngs(0)), "model": Model()}


def fine_tuning():
    return {
        "model": Model(),
        "loss_fn": lambda model, x, y: jnp.mean((model(x) - y) ** 2),
        "batches": [(jnp.ones((2, 64)), jnp.zeros((2, 64)))] * 2,
        "w": fj.SparseMatrix.from_dense(dense()),
        "x": jnp.ones((2, 64), jnp.float16),
    }


def pruning():
    inputs = jax.random.normal(jax.random.key(1), (256, 64), jnp.float16)
    return {"dense": dense(), "batches": [inputs]}


def transformations():
    w = fj.SparseMatrix.from_dense(dense())
    bias = jnp.zeros(64, jnp.float16)
    layers = [fj.SparseDense.from_matrix(w, bias) for _ in range(2)]
    return {
        "w": w,
        "bias": bias,
        "layers": layers,
        **{"jax": jax, "jnp": jnp, "fj": fj},
    }


def multi_gpu():
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices: run without FLASHJAX_TEST_PLATFORM")
    return {
        "dense": dense(),
        "matrix": fj.SparseMatrix.from_dense(dense()),
        "x": jnp.ones((2, 64), jnp.float16),
        "ids": np.array([[2, 5, 9]]),
        **{"jax": jax, "fj": fj, "opt": opt},
    }


# What a page's text says that the reader has.
GIVEN = {
    "README.md": readme,
    "docs/fine-tuning.md": fine_tuning,
    "docs/pruning.md": pruning,
    "docs/transformations.md": transformations,
    "docs/multi-gpu.md": multi_gpu,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny pruned OPT under every name that pages use."""
    root = tmp_path_factory.mktemp("reader")
    pages.save_models(root, FOLDERS)
    line = json.dumps({"text": "It was the best of times. " * 20})
    (root / TEXT).write_text(f"{line}\n" * 4)
    return root


@pytest.mark.parametrize(
    "page", [p for p in pages.PAGES if pages.blocks(p, "python")], ids=pages.name
)
def test_python(page, folders, monkeypatch):
    monkeypatch.chdir(folders)
    names = GIVEN.get(pages.name(page), dict)()
    # As users have it, not as strict as the tests are.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in pages.blocks(page, "python"):
            code = compile(
                "\n" * (block.line - 1) + block.text, pages.name(page), "exec"
            )
            if not block.not_run:
                exec(code, names)
