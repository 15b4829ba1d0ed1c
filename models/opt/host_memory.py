"""What the host holds while a model is loaded."""

import collections
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flashjax.packing import default_device

# On its way to a GPU JAX copies an array once more on the host, all of it.
_PIECE_BYTES = 1 << 26


def read_ahead(
    read: Callable[[str], Any],
    sizes: dict[str, int],
    take: Callable[[int, bool], bool],
    readers: int,
    in_order: bool,
) -> Iterator[tuple[str, Any]]:
    """(name, what was read) while others are being read, as it comes or in order.

    Args:
      read: reads what has a name, in one of several threads.
      sizes: in bytes, of all in the order in which to read.
      take: takes so many bytes to be held if there is room, and says whether. With
        True, when nothing is being read, it makes room or does without.
      readers: how many are read at a time at most.
      in_order: what was read comes in the order of `sizes`.
    """
    following = collections.deque(sizes)
    pending: dict[Future[Any], str] = {}
    with ThreadPoolExecutor(readers) as pool:
        try:
            while pending or following:
                while following and len(pending) < readers:
                    if not take(sizes[following[0]], not pending):
                        break
                    name = following.popleft()
                    pending[pool.submit(read, name)] = name
                done = next(iter(pending))
                if not in_order:
                    done = next(iter(wait(pending, return_when=FIRST_COMPLETED).done))
                name, finished = pending.pop(done), [done]
                del done
                # Nothing here holds what was read once it is yielded.
                yield name, finished.pop().result()
        finally:
            for future in pending:
                future.cancel()


def put_without_copy(array: np.ndarray) -> jax.Array:
    """Puts an array on JAX's default device; the host holds no second one meanwhile."""
    # A CPU's JAX takes the array itself.
    if array.nbytes <= _PIECE_BYTES or default_device().platform == "cpu":
        return jnp.asarray(array)
    return put_in_pieces(array, max(1, _PIECE_BYTES * len(array) // array.nbytes))


def put_in_pieces(array: np.ndarray, rows: int) -> jax.Array:
    """The same, so many of an array's rows at a time."""
    placed = jnp.zeros(array.shape, array.dtype)
    for start in range(0, len(array), rows):
        # The last one is as long as the others: all are written by one program.
        start = max(0, min(start, len(array) - rows))
        piece = jnp.asarray(array[start : start + rows])
        placed = jax.block_until_ready(_write_rows(placed, piece, start))
    return placed


@functools.partial(jax.jit, donate_argnums=0)
def _write_rows(array: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(array, rows, start, 0)
