"""Pruning methods as their papers define them: NumPy, float64, slow and plain."""

import numpy as np


def correlated_layer(seed, K=96, M=48, samples=512):
    """Returns X (samples, K) with correlated inputs of unlike scale, and W (K, M)."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((K, K)) * np.linspace(1.5, 0.05, K)[:, None]
    scale = np.exp(rng.standard_normal(K))
    X = (rng.standard_normal((samples, K)) @ mixing) * scale
    return X.astype(np.float32), rng.standard_normal((K, M)).astype(np.float32)


def zero_smallest(dense, importance, count, axis):
    """Zeroes the `count` least important along an axis, of equals the first."""
    order = np.argsort(importance, axis, kind="stable")
    pruned = dense.copy()
    np.put_along_axis(pruned, np.take(order, np.arange(count), axis), 0, axis)
    return pruned


def zero_smallest_of_groups(dense, importance, keep, group):
    """Keeps the `keep` most important of each `group` of inputs of an output."""
    pruned = dense.copy()
    for start in range(0, len(dense), group):
        part = slice(start, min(start + group, len(dense)))
        count = max(0, part.stop - start - keep)
        pruned[part] = zero_smallest(dense[part], importance[part], count, axis=0)
    return pruned


def wanda_importance(dense, X):
    """Sun et al. (2023): |W| * ||X||_2."""
    norms = np.sqrt((X.astype(np.float64) ** 2).sum(0))
    return np.abs(dense.astype(np.float64)) * norms[:, None]


def reconstruction_error(dense, pruned, X):
    """||X (W - W')||_F^2 / ||X W||_F^2."""
    X, dense, pruned = (a.astype(np.float64) for a in (X, dense, pruned))
    return ((X @ (dense - pruned)) ** 2).sum() / ((X @ dense) ** 2).sum()


def sparsegpt(dense, X, sparsity, keep=0, group=0, block=128, damping=0.01):
    """Frantar & Alistarh (2023), algorithm 1; n:m masks as in its section 3.3."""
    W = dense.astype(np.float64).T.copy()
    M, K = W.shape
    H = X.astype(np.float64).T @ X.astype(np.float64)
    H += damping * np.diag(H).mean() * np.eye(K)
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    mask = np.zeros((M, K), bool)
    done = 0
    for start in range(0, K, block):
        end = min(start + block, K)
        costs = (W / np.diag(U)) ** 2
        if not group:
            count = int(round(sparsity * M * K) * end / K) - done
            done += count
            flat = np.argsort(costs[:, start:end].T.ravel(), kind="stable")[:count]
            mask[:, start:end].T[np.unravel_index(flat, (end - start, M))] = True
        for j in range(start, end):
            if group and j % group == 0:
                part = slice(j, min(j + group, K))
                costs = (W[:, part] / np.diag(U)[part]) ** 2
                count = max(0, part.stop - j - keep)
                order = np.argsort(costs, axis=1, kind="stable")[:, :count]
                np.put_along_axis(mask[:, part], order, True, axis=1)
            error = np.where(mask[:, j], W[:, j], 0) / U[j, j]
            W[:, j:] -= error[:, None] * U[j, j:][None, :]
    return np.where(mask, 0, W).T
