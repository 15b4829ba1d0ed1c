"""Repetition penalty, log-probabilities, rows of their own, and GenerationConfig."""

import dataclasses
import json
import warnings
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from generate_support import count_compilations, generate_module, logits_of

from flashjax.checkpoint import CheckpointError
from flashjax.models import opt
from flashjax.models.opt.evaluation import perplexity
from flashjax.models.opt.generation_config import FILE_NAME
from flashjax.models.opt.generation_request import Rows, make_request

CONFIG = opt.OPTConfig(
    vocab_size=29,
    hidden_size=16,
    num_layers=1,
    ffn_size=32,
    num_heads=2,
    max_positions=24,
    init_std=0.4,
)
PROMPTS = [[5, 9, 21], [7, 8, 9, 10, 11, 12], [20]]
NEW = 8


@pytest.fixture(scope="module")
def model():
    return opt.OPT(CONFIG, rngs=nnx.Rngs(0))


def _next_logits(model, tokens):
    """(vocab_size,) logits after the tokens, one shape for all lengths."""
    ids = np.zeros((1, CONFIG.max_positions), np.int32)
    ids[0, : len(tokens)] = tokens
    return np.asarray(logits_of(model, jnp.asarray(ids)))[0, len(tokens) - 1]


def _plain(model, prompt, *, penalty=1.0, ends=(), least=0, new=NEW):
    """Greedy tokens and log-probabilities by the definitions, in NumPy."""
    tokens, logprobs = list(prompt), []
    for step in range(new):
        logits = _next_logits(model, tokens).astype(np.float64)
        scores = logits.copy()
        seen = sorted(set(tokens))
        scores[seen] = np.where(
            scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty
        )
        if step < least:
            scores[list(ends)] = -np.inf
        token = int(scores.argmax())
        tokens.append(token)
        logprobs.append(logits[token] - np.log(np.exp(logits).sum()))
        if token in ends:
            break
    return tokens[len(prompt) :], logprobs


@pytest.mark.parametrize("penalty", [1.3, 5.0, 0.5])
def test_penalty_and_logprobs_by_their_definitions(model, penalty):
    ids, mask = opt.pad_prompts(PROMPTS, 3)  # a padding id that the model may choose
    options = {"max_new_tokens": NEW, "eos_token_id": -1}
    tokens, logprobs = opt.generate(
        model, ids, mask, repetition_penalty=penalty, return_logprobs=True, **options
    )
    assert logprobs.shape == (3, NEW)
    assert logprobs.dtype == jnp.float32
    for row, prompt in enumerate(PROMPTS):
        expected, expected_logprobs = _plain(model, prompt, penalty=penalty)
        assert tokens[row, 6:].tolist() == expected
        np.testing.assert_allclose(logprobs[row], expected_logprobs, atol=1e-5)
    streamed = opt.generate_stream(
        model, ids, mask, repetition_penalty=penalty, **options
    )
    np.testing.assert_array_equal(np.stack(list(streamed), axis=1), tokens[:, 6:])
    with count_compilations() as events:
        opt.generate(
            model, ids, mask, repetition_penalty=2.5, return_logprobs=True, **options
        )
    assert not events


def test_a_high_penalty_repeats_nothing(model):
    out = opt.generate(
        model,
        [PROMPTS[1]],
        max_new_tokens=NEW,
        repetition_penalty=1e9,
        eos_token_id=-1,
    )
    # Every negative logit is hugely negative and every positive one nearly zero.
    new = _plain(model, PROMPTS[1], penalty=1e9)[0]
    assert out[0, 6:].tolist() == new


def test_logprobs_after_the_end_and_with_a_minimum(model):
    end = _plain(model, PROMPTS[0])[0][2]
    for least in (0, 5):
        tokens, logprobs = opt.generate(
            model,
            [PROMPTS[0]],
            max_new_tokens=NEW,
            min_new_tokens=least,
            eos_token_id=end,
            return_logprobs=True,
        )
        expected, expected_logprobs = _plain(model, PROMPTS[0], ends=[end], least=least)
        count = len(expected)
        assert count >= least
        assert tokens[0, 3 : 3 + count].tolist() == expected
        assert (tokens[0, 3 + count :] == CONFIG.pad_token_id).all()
        np.testing.assert_allclose(logprobs[0, :count], expected_logprobs, atol=1e-5)
        assert not np.asarray(logprobs)[0, count:].any()


def test_no_logprobs_of_nothing(model):
    tokens, logprobs = opt.generate(
        model, [[3, 4]], max_new_tokens=0, return_logprobs=True
    )
    assert (tokens.shape, logprobs.shape) == ((1, 2), (1, 0))


def test_rows_of_their_own(model):
    # What a row gets is what it would get alone, whatever is beside it.
    config = opt.GenerationConfig(temperature=1.5, eos_token_id=-1)
    ids, mask = opt.pad_prompts(PROMPTS)
    rows = Rows(max_new_tokens=[2, 8, 5], seeds=[4, 4, 9], streams=[0, 7, 0])
    request = make_request(CONFIG, ids, mask, config, rows)
    tokens, *_ = generate_module.run_request(model, request)
    for row, new in ((0, 2), (2, 5)):
        alone = opt.generate(
            model,
            [PROMPTS[row]],
            config=config,
            seed=rows.seeds[row],
            max_new_tokens=new,
        )
        assert alone[0, len(PROMPTS[row]) :].tolist() == tokens[row, :new].tolist()
        assert (tokens[row, new:] == CONFIG.pad_token_id).all()


def test_pad_token(model):
    end = _plain(model, PROMPTS[0])[0][0]
    out = opt.generate(
        model, [PROMPTS[0]], max_new_tokens=4, eos_token_id=end, pad_token_id=17
    )
    assert out[0, 3:].tolist() == [end, 17, 17, 17]
    with pytest.raises(ValueError, match=r"pad_token_id must be .* got 29"):
        opt.generate(model, [PROMPTS[0]], max_new_tokens=1, pad_token_id=29)


def test_pad_prompts():
    ids, mask = opt.pad_prompts([[4, 5, 6], (7,)], 9)
    assert ids.tolist() == [[4, 5, 6], [9, 9, 7]]
    assert mask.tolist() == [[True] * 3, [False, False, True]]
    assert opt.pad_prompts([])[0].shape == (0, 0)
    with pytest.raises(ValueError, match="at least one token, got none in prompt 1"):
        opt.pad_prompts([[4], []])
    with pytest.raises(ValueError, match=r"got -1 to 4 in prompt 0"):
        opt.pad_prompts([[4, -1]])
    with pytest.raises(ValueError, match=r"int32 holds, got 1 to 4294967296 in"):
        opt.pad_prompts([[1, 2**32]])
    for large in ([2**64], [2**63, 1], [-1, 2**63]):
        with pytest.raises(ValueError, match=r"int32 holds, got .* in prompt 1"):
            opt.pad_prompts([[1], large])


@pytest.mark.parametrize(
    ("prompts", "got"),
    [
        (["abc"], "got text as prompt 0: encode it"),
        ("abc", "expected a sequence of prompts, got str"),
        (None, "expected a sequence of prompts, got NoneType"),
        ([[1], [2, 3.5]], r"got float64 of shape \(2,\) as prompt 1"),
        ([1, 2], r"got int as prompt 0: for one prompt pass \[prompt\]"),
        ([[1], [[1], [1, 2]]], "got other sequences as prompt 1"),
        ([[[1, 2]]], r"got int64 of shape \(1, 2\) as prompt 0"),
        ({"input_ids": [[1]]}, "sequence of prompts, got dict: pass its input_ids"),
        ([SimpleNamespace(ids=[1])], "got SimpleNamespace as prompt 0: pass its ids"),
        ([[True]], "got bool"),
    ],
)
def test_prompts_are_sequences_of_token_ids(prompts, got):
    with pytest.raises(TypeError, match=got):
        opt.pad_prompts(prompts)


def test_expects_an_opt(model):
    with pytest.raises(TypeError, match="an OPT as the model, got NoneType"):
        opt.generate(None, [[1]])
    with pytest.raises(TypeError, match=r"got tuple: from_pretrained returns the mod"):
        opt.generate_stream((model, None), [[1]])
    with pytest.raises(TypeError, match="an OPT as the model, got str"):
        perplexity("opt-125m", [1, 2, 3])
    with pytest.raises(TypeError, match="an OPT as the model, got NoneType"):
        opt.generate_file(None, None, "in.jsonl", "out.jsonl")


def test_options_go_before_the_config(model):
    config = opt.GenerationConfig(max_new_tokens=3, eos_token_id=-1)
    assert opt.generate(model, [[3]], config=config).shape == (1, 4)
    assert opt.generate(model, [[3]], config=config, max_new_tokens=5).shape == (1, 6)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_beams": 4}, TypeError, "num_beams .there is no beam search."),
        ({"top": 4, "beam": 1}, TypeError, "expected options .* got beam, top"),
        ({"config": {}}, TypeError, "config must be a GenerationConfig, got dict"),
        ({"repetition_penalty": 0}, ValueError, "greater than 0, got 0"),
        ({"repetition_penalty": float("inf")}, ValueError, "finite .* got inf"),
        ({"repetition_penalty": "2"}, TypeError, "must be a real number, got '2'"),
        ({"pad_token_id": 1.0}, TypeError, "pad_token_id must be an integer"),
    ],
)
def test_bad_options(model, options, error, message):
    with pytest.raises(error, match=message):
        opt.generate(model, [[3]], **options)


class TestFile:
    """generation_config.json."""

    def _write(self, folder, **content):
        (folder / "generation_config.json").write_text(json.dumps(content))
        return opt.GenerationConfig.from_pretrained(folder)

    def test_no_file(self, tmp_path):
        default = opt.GenerationConfig()
        assert opt.GenerationConfig.from_pretrained(tmp_path) == default

    def test_of_a_published_opt(self, tmp_path):
        config = self._write(
            tmp_path,
            _from_model_config=True,
            bos_token_id=2,
            eos_token_id=2,
            pad_token_id=1,
            transformers_version="4.27.0.dev0",
        )
        assert config == opt.GenerationConfig(eos_token_id=2, pad_token_id=1)

    def test_greedy_ignores_what_is_for_sampling(self, tmp_path):
        config = self._write(tmp_path, temperature=0.7, top_k=5, top_p=0.5)
        assert config == opt.GenerationConfig()

    def test_sampling(self, tmp_path):
        config = self._write(tmp_path, do_sample=True)
        assert (config.temperature, config.top_k, config.top_p) == (1.0, 50, None)
        config = self._write(
            tmp_path,
            do_sample=True,
            temperature=0.7,
            top_k=0,
            top_p=0.9,
            max_new_tokens=7,
            min_new_tokens=2,
            repetition_penalty=1.2,
            eos_token_id=[2, 5],
        )
        assert config == opt.GenerationConfig(
            7, 2, 0.7, None, 0.9, 1.2, eos_token_id=(2, 5)
        )

    def test_what_is_not_supported_is_named(self, tmp_path):
        content = {"num_beams": 4, "no_repeat_ngram_size": 3, "made_up": "x"}
        with pytest.warns(UserWarning, match="num_beams=4.*size=3.*made_up='x'"):
            self._write(tmp_path, temperature=1.0, **content)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self._write(tmp_path, num_beams=1, early_stopping=False, max_length=20)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ({"do_sample": "yes"}, "do_sample must be true or false, got 'yes'"),
            ({"max_new_tokens": -1}, "max_new_tokens must be at least 0"),
            ({"repetition_penalty": "x"}, "must be a real number"),
            ({"do_sample": True, "top_p": 2}, "top_p must be"),
        ],
    )
    def test_bad_values(self, tmp_path, content, message):
        with pytest.raises(CheckpointError, match=message) as error:
            self._write(tmp_path, **content)
        assert "generation_config.json" in str(error.value)

    def test_options_go_before_the_file(self, tmp_path):
        """Together they fit, the file alone does not."""
        with pytest.raises(CheckpointError, match="max_new_tokens=64, got 100"):
            self._write(tmp_path, min_new_tokens=100)
        config = opt.GenerationConfig.from_pretrained(
            tmp_path, max_new_tokens=120, seed=3
        )
        assert config == opt.GenerationConfig(120, 100, seed=3)
        # What is wrong with an option is not the file's fault.
        for options, error in [({"seed": -1}, ValueError), ({"beams": 2}, TypeError)]:
            with pytest.raises(error) as raised:
                opt.GenerationConfig.from_pretrained(tmp_path, **options)
            assert FILE_NAME not in str(raised.value)

    def test_bad_files(self, tmp_path):
        (tmp_path / "generation_config.json").write_text("{")
        for folder in (tmp_path, tmp_path / "nothing"):
            with pytest.raises(CheckpointError):
                opt.GenerationConfig.from_pretrained(folder)


def test_config_is_frozen_and_hashable():
    config = opt.GenerationConfig(top_k=np.int64(3), eos_token_id=np.array([2, 3]))
    assert config == opt.GenerationConfig(top_k=3, eos_token_id=(2, 3))
    assert hash(config) == hash(opt.GenerationConfig(top_k=3, eos_token_id=(2, 3)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 4
