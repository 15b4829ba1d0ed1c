import dataclasses

import numpy as np
import pytest
from cli_support import byte_tokenizer

from flashjax.models.opt import OPTConfig
from flashjax.models.opt.calibration import (
    DEFAULT_TEXT,
    Calibration,
    CalibrationText,
    sample_windows,
)

CONFIG = OPTConfig(
    vocab_size=260,
    hidden_size=8,
    num_layers=1,
    ffn_size=8,
    num_heads=1,
    max_positions=64,
)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def sample(tokenizer, config=CONFIG, **options):
    return sample_windows(CalibrationText(**options), tokenizer, config)


def test_default_text(tokenizer):
    found = sample(tokenizer)
    assert found.token_ids.shape == (128, 64)
    assert found.token_ids.dtype == np.int32
    assert found.mask.all()
    long = dataclasses.replace(CONFIG, max_positions=4096)
    assert sample(tokenizer, long, samples=2).token_ids.shape == (2, 2048)


def test_default_text_fits_its_description():
    content = DEFAULT_TEXT.read_text(encoding="utf-8")
    assert len(content.encode()) <= 300_000
    assert (DEFAULT_TEXT.parent / "README.md").is_file()
    for word in ("Elizabeth", "KING", "Moses"):
        assert word in content


def test_seed(tokenizer):
    first, again, other = (sample(tokenizer, samples=8, seed=s) for s in (1, 1, 2))
    assert first.digest == again.digest
    assert first.digest != other.digest
    assert not np.array_equal(first.token_ids, other.token_ids)


def test_windows_do_not_overlap_and_come_from_the_text(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    text = "".join(chr(33 + i % 90) for i in range(99))
    path.write_text(text)
    found = sample(tokenizer, path=path, length=10, samples=128).token_ids
    assert len(found) == 10
    stream = np.array(tokenizer.encode(text).ids)
    expected = stream.reshape(10, 10)
    assert sorted(map(tuple, found)) == sorted(map(tuple, expected))


def test_documents_start_with_their_own_first_token(tokenizer, tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text("abcdefg")
    found = sample(tokenizer, path=tmp_path, length=8, samples=4).token_ids
    assert (found[:, 0] == 2).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "calibration samples: expected an integer of at least 1"),
        ({"length": 0}, "calibration length"),
        ({"seed": -1}, "calibration seed"),
        ({"seed": 1.5}, "calibration seed"),
        ({"length": 65}, "at most the model's 64 positions, got 65"),
    ],
)
def test_bad_options(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        sample(tokenizer, **options)


def test_too_little_text(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a" * 62)
    message = "at least one window of 64 tokens, got 63 tokens"
    with pytest.raises(ValueError, match=message):
        sample(tokenizer, path=path)


def test_tokenizer_of_another_model(tokenizer):
    config = dataclasses.replace(CONFIG, vocab_size=50)
    with pytest.raises(ValueError, match="the model has 50"):
        sample(tokenizer, config)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (np.zeros(3, np.int32), np.ones(3, bool), "samples, length"),
        (np.zeros((1, 3)), np.ones((1, 3), bool), "int32"),
        (np.zeros((1, 3), np.int32), np.ones((1, 3)), "expected bool"),
        (np.zeros((1, 3), np.int32), np.zeros((1, 3), bool), "a token in every"),
    ],
)
def test_bad_tokens(ids, mask, message):
    with pytest.raises(ValueError, match=message):
        Calibration(ids, mask)
