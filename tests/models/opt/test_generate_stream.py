"""Tokens one by one."""

import numpy as np
import pytest
from generate_support import NEW, batch

from flashjax.models import opt

SAMPLING = [
    {},
    {"temperature": 1.0},
    {"temperature": 1.5, "top_k": 7, "top_p": 0.9, "seed": 3},
]


@pytest.mark.parametrize("options", SAMPLING, ids=str)
def test_stream_yields_what_generate_returns(model, options):
    ids, mask = batch()
    options = {"max_new_tokens": NEW, "eos_token_id": -1, **options}
    out = opt.generate(model, ids, mask, **options)
    streamed = list(opt.generate_stream(model, ids, mask, **options))
    assert all(type(t) is np.ndarray and t.dtype == np.int32 for t in streamed)
    np.testing.assert_array_equal(np.stack(streamed, axis=1), out[:, 8:])


def test_stream_keeps_what_it_has_yielded(model):
    # A token array must not be a view of a buffer that the next step reuses.
    ids, mask = batch()
    kept, copies = [], []
    for tokens in opt.generate_stream(model, ids, mask, max_new_tokens=NEW):
        kept.append(tokens)
        copies.append(tokens.copy())
    np.testing.assert_array_equal(kept, copies)


def test_streams_do_not_disturb_each_other(model):
    ids, mask = batch()
    options = {"max_new_tokens": NEW, "temperature": 1.0, "eos_token_id": -1}
    alone = [
        list(opt.generate_stream(model, ids, mask, seed=seed, **options))
        for seed in (0, 1)
    ]
    pairs = zip(
        *(
            opt.generate_stream(model, ids, mask, seed=seed, **options)
            for seed in (0, 1)
        ),
        strict=True,
    )
    for together, one in zip(zip(*pairs, strict=True), alone, strict=True):
        np.testing.assert_array_equal(together, one)


def test_an_abandoned_stream(model):
    ids, mask = batch()
    stream = opt.generate_stream(model, ids, mask, max_new_tokens=NEW)
    next(stream)
    stream.close()
    assert not list(stream)
