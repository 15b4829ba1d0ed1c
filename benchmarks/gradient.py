"""Times the gradient with respect to x on a GPU: dx = dy @ w.T.

    python benchmarks/gradient.py [--layers opt-30b.fc1] [--rows 8,64] ...

Ways take turns in one process: "second_packing" runs the forward kernel on a packing of
the transpose (`w.with_transpose()`), "expand" is what `jax.grad` does without one, and
"dense" is cuBLAS. "value_and_grad" of a step (product, bias, their gradients) is timed
with the second packing and dense. `temporary_bytes` of the compiled gradient show that
no dense copy is made. Times are of the device, as in `matmul.py`.

Writes `benchmarks/results/gradient-DEVICE.json`.
"""

from typing import Annotated

import device_time
import jax
import jax.numpy as jnp
import report
import typer
from matmul import SHAPES, cold_copies

import flashjax as fj
from flashjax.testing import random_sparse_matrix


def gradient(product):
    def pull_back(dy, w, bias):
        del bias
        x = jnp.zeros((dy.shape[0], w.shape[0]), dy.dtype)  # a linear map: any will do
        return jax.vjp(lambda x: product(x, w, None), x)[1](dy)[0]

    return pull_back


def value_and_grad(product):
    def step(x, w, bias):
        def loss(x, bias):
            return jnp.sum(jnp.square(product(x, w, bias).astype(jnp.float32)))

        return jax.value_and_grad(loss, argnums=(0, 1))(x, bias)

    return step


def sparse(x, w, bias):
    return fj.sparse_matmul(x, w, bias=bias)


def dense(x, w, bias):
    y = jnp.dot(x, w)
    return y if bias is None else y + jnp.broadcast_to(bias, y.shape)


def time_function(function, operand: jax.Array, bias, copies: list) -> tuple:
    """Device microseconds of one call, and the temporary bytes of all calls."""
    operands = [operand + jnp.asarray(i, operand.dtype) for i in range(len(copies))]

    @jax.jit
    def program(operands, copies, bias):
        pairs = zip(operands, copies, strict=True)
        return [function(operand, copy, bias) for operand, copy in pairs]

    compiled = program.lower(operands, copies, bias).compile()
    us = device_time.microseconds(compiled, operands, copies, bias) / len(copies)
    return us, compiled.memory_analysis().temp_size_in_bytes


def time_layer(name: str, sparsity: float, rows: list[int]) -> list[dict]:
    m, k = SHAPES[name]
    w = random_sparse_matrix(jax.random.key(0), (k, m), sparsity)
    both = w.with_transpose()
    weights = {
        "second_packing": (sparse, cold_copies(both, w.nbytes)),
        "expand": (sparse, cold_copies(w, w.nbytes)),
        "dense": (dense, cold_copies(w.to_dense(), 2 * m * k)),
    }
    results = []
    for n in rows:
        dy = jax.random.normal(jax.random.key(n), (n, m), jnp.float16)
        x = jax.random.normal(jax.random.key(n), (n, k), jnp.float16)
        bias = jnp.zeros(m, jnp.float16)
        result = {"layer": name, "m": m, "k": k, "rows": n, "sparsity": sparsity}
        for way, (product, copies) in weights.items():
            us, temporary = time_function(gradient(product), dy, bias, copies)
            result[f"{way}_us"] = round(us, 2)
            result[f"{way}_temporary_bytes"] = temporary
            us, _ = time_function(value_and_grad(product), x, bias, copies)
            result[f"{way}_value_and_grad_us"] = round(us, 2)
        result["speedup"] = round(result["dense_us"] / result["second_packing_us"], 3)
        results.append(result)
        print(result, flush=True)
    return results


def main(
    layers: Annotated[
        str, typer.Option(help="Names of matmul.py, comma-separated.")
    ] = "opt-30b.attention,opt-30b.fc1,opt-30b.fc2",
    sparsity: Annotated[str, typer.Option()] = "0.6,0.8",
    rows: Annotated[str, typer.Option(help="Rows of dy.")] = "1,8,64,512",
    name: Annotated[str, typer.Option(help="Stem of the result file.")] = "gradient",
) -> None:
    """Times the gradient with respect to x beside the dense one."""
    reason = fj.cuda_unavailable_reason()
    if reason:
        raise SystemExit(f"benchmarks/gradient.py needs a GPU: {reason}")
    unknown = set(layers.split(",")) - set(SHAPES)
    if unknown:
        raise SystemExit(f"expected layers from {list(SHAPES)}, got {sorted(unknown)}")
    results = []
    for layer in layers.split(","):
        for s in map(float, sparsity.split(",")):
            results += time_layer(layer, s, [int(n) for n in rows.split(",")])
            path = report.save(name, {"results": results})
    print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
