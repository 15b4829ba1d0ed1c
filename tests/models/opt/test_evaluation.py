import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashjax.models import opt
from flashjax.models.opt import evaluation
from flashjax.models.opt.evaluation import perplexity

HERE = Path(__file__).parent
DEMO = HERE.parents[2] / "examples" / "demo-opt"
REFERENCE = json.loads((HERE / "perplexity_reference.json").read_text())


@pytest.fixture(scope="module")
def model():
    return opt.from_pretrained(HERE / "data" / "pre_norm", dtype=jnp.float32)[0]


@pytest.mark.parametrize("name", REFERENCE["models"])
def test_equals_pytorch(name):
    reference = REFERENCE["models"][name]
    model, _ = opt.from_pretrained(HERE / "data" / name, dtype=jnp.float32)
    for window, stride, expected in reference["cases"]:
        found = perplexity(model, reference["token_ids"], window=window, stride=stride)
        assert found.perplexity == pytest.approx(expected, rel=1e-4)


def test_half_precision_is_near_pytorch():
    reference = REFERENCE["models"]["pre_norm"]
    window, stride, expected = reference["cases"][0]
    for dtype, tolerance in ((jnp.float16, 1e-3), (jnp.bfloat16, 3e-2)):
        model, _ = opt.from_pretrained(HERE / "data" / "pre_norm", dtype=dtype)
        found = perplexity(model, reference["token_ids"], window=window, stride=stride)
        assert found.perplexity == pytest.approx(expected, rel=tolerance)


@pytest.mark.slow
def test_demo_model_equals_pytorch():
    reference = REFERENCE["demo"]
    model, tokenizer = opt.from_pretrained(DEMO, dtype=jnp.float16)
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text[: reference["characters"]]).ids
    assert len(ids) == reference["tokens"]
    for window, stride, expected in reference["cases"]:
        found = perplexity(model, ids, window=window, stride=stride)
        assert found.perplexity == pytest.approx(expected, rel=1e-3)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_token_is_predicted_once(data):
    tokens = data.draw(st.integers(2, 200))
    width = data.draw(st.integers(2, tokens))
    stride = data.draw(st.integers(1, width))
    found = list(evaluation._windows(tokens, width, stride))
    predicted = [i for w in found for i in range(w.first, w.end)]
    starts = {w.start for w in found}
    assert predicted == sorted(set(predicted))
    # Only tokens with nothing before them are left out.
    assert set(range(tokens)) - set(predicted) <= starts | {0, tokens - 1}
    if stride < width:
        assert predicted == list(range(1, tokens))
    assert all(w.end - w.start <= width and w.first > w.start for w in found)


def test_batches_do_not_matter(model, monkeypatch):
    ids = np.arange(3, 40)
    whole = perplexity(model, ids, window=8, stride=3)
    monkeypatch.setattr(evaluation, "_BATCH_TOKENS", 24)
    parts = perplexity(model, ids, window=8, stride=3)
    assert parts.nll == pytest.approx(whole.nll, rel=1e-6)
    assert (parts.windows, parts.predicted) == (whole.windows, 36)
    assert perplexity(model, ids, window=8, stride=3) == parts


def test_short_text(model):
    found = perplexity(model, [4, 5])
    assert (found.predicted, found.windows, found.window) == (1, 1, 32)
    logits = model(np.array([[4, 5]]))[0, 0]
    assert found.nll == pytest.approx(float(jnp.log(jnp.exp(logits).sum()) - logits[5]))


def test_progress(model):
    seen = []
    perplexity(
        model, np.full(40, 7), window=4, progress=lambda *call: seen.append(call)
    )
    assert seen == [(0, 10), (10, 10)]


def test_very_unlikely_text(model, monkeypatch):
    monkeypatch.setattr(evaluation, "_nll", lambda *_: np.full(1, 1e6))
    assert perplexity(model, [4, 5, 6]).perplexity == math.inf


def test_nan_is_an_error(model, monkeypatch):
    monkeypatch.setattr(evaluation, "_nll", lambda *_: np.full(1, np.nan))
    with pytest.raises(FloatingPointError, match="NaN in windows 0 to 0"):
        perplexity(model, [4, 5, 6])


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([4], {}, "at least two tokens"),
        ([[4, 5]], {}, "rank 1"),
        ([4, 48], {}, r"\[0, 48\), got values from 4 to 48"),
        ([4, -1], {}, "got values from -1"),
        ([4.0, 5.0], {}, "integers"),
        ([4, 5], {"window": 33}, "2 to the model's 32 positions, got 33"),
        ([4, 5], {"window": 1}, "got 1"),
        ([4, 5], {"stride": 0}, "1 to the window's 32, got 0"),
        ([4, 5], {"window": 8, "stride": 9}, "got 9"),
    ],
)
def test_bad_arguments(model, ids, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(model, ids, **options)
