"""The sparse product and its dense twin, which transformations must treat alike."""

import cuda_stand_in
import jax.numpy as jnp
import op_cases
import pytest

import flashjax as fj

K, M = 40, 24


@pytest.fixture(params=op_cases.IMPLEMENTATIONS)
def product(request):
    """sparse_matmul with an implementation, on the platform that it runs on."""
    with op_cases.multiplying(*request.param) as multiply:
        yield multiply


@pytest.fixture
def cuda_module():
    """Stands in for the CUDA module where it was not built."""
    with cuda_stand_in.cuda_module():
        yield


@pytest.fixture(scope="session")
def dense():
    return op_cases.random_dense(K, M, 0.6, "float16")


@pytest.fixture(scope="session")
def w(dense):
    return fj.SparseMatrix.from_dense(dense)


@pytest.fixture(scope="session")
def x():
    return op_cases.random_x((4, 3, K), "float32")


@pytest.fixture(scope="session")
def bias():
    return op_cases.random_x((M,), "float32", seed=3)


@pytest.fixture(scope="session")
def dense_product(dense):
    """What jnp.dot makes of the same matrix."""

    def multiply(x, bias=None):
        y = jnp.dot(x, jnp.asarray(dense, jnp.float32), precision="highest")
        return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))

    return multiply
