import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from flashjax.models import opt

END, PAD = 256, 257


def _byte_tokenizer():
    """One token a byte, so that most characters take several tokens."""
    pieces = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>", "<pad>"])
    tokenizer.encode_special_tokens = True  # in a text, "<pad>" is five characters
    return tokenizer


TOKENIZER = _byte_tokenizer()


def _word_tokenizer():
    """Words whose decoder drops the space before the first one."""
    vocabulary = {"\N{LOWER ONE EIGHTH BLOCK}a": 0, "\N{LOWER ONE EIGHTH BLOCK}b": 1}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocabulary, unk_token=None)
    )
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>", "<pad>"])
    return tokenizer


def _ids(text):
    return TOKENIZER.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "text",
    [
        "plain text",
        " leading and trailing ",
        "naïve café",
        "日本語のテキスト",
        "emoji 👍🏽 and 👨‍👩‍👧",
        "line\nbreak\ttab",
        "",
    ],
)
def test_pieces_are_whole_characters(text):
    pieces = list(opt.stream_text(_ids(text), TOKENIZER))
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    # Every character comes as soon as its last byte is there.
    assert pieces == list(text)


@given(st.text())
@example("<pad></s>")
def test_any_text(text):
    assert "".join(opt.stream_text(_ids(text), TOKENIZER)) == text


@given(st.lists(st.integers(0, 255)))
def test_any_bytes(ids):
    whole = TOKENIZER.decode(ids)
    assert "".join(opt.stream_text(ids, TOKENIZER)) == whole


def test_an_unfinished_character_comes_last():
    ids = [*_ids("ab"), *_ids("語")[:2]]
    stream = opt.TextStream(TOKENIZER)
    assert [stream.push(i) for i in ids] == ["a", "b", "", ""]
    assert stream.finish() == TOKENIZER.decode(ids)[2:]
    assert stream.finish() == ""


def test_special_tokens():
    ids = [*_ids("a"), END, PAD, PAD]
    assert list(opt.stream_text(ids, TOKENIZER)) == ["a"]
    shown = opt.stream_text(ids[:2], TOKENIZER, skip_special_tokens=False)
    assert list(shown) == ["a", "</s>"]


def test_the_prompt_is_context_only():
    pieces = opt.stream_text(_ids(" world"), TOKENIZER, _ids("hello"))
    assert "".join(pieces) == " world"
    tokenizer = _word_tokenizer()
    assert tokenizer.decode([0, 1, 1]) == "a b b"
    assert list(opt.stream_text([1, 1], tokenizer, [0])) == [" b", " b"]
    assert list(opt.stream_text([0, 1], tokenizer)) == ["a", " b"]


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
@example([0], [2, 1])
@example([2], [2, 0, 1])
def test_words_after_special_tokens(prompt, ids):
    tokenizer = _word_tokenizer()
    whole = tokenizer.decode([*prompt, *ids])
    pieces = list(opt.stream_text(ids, tokenizer, prompt))
    assert tokenizer.decode(prompt) + "".join(pieces) == whole


def test_tokens_may_be_numpy_integers():
    ids = np.array(_ids("text"), np.int32)
    assert "".join(opt.stream_text(ids, TOKENIZER)) == "text"


def test_long_streams_decode_little_at_a_time():
    lengths = []

    class Spy:
        def decode(self, ids, skip_special_tokens):
            lengths.append(len(ids))
            return TOKENIZER.decode(ids, skip_special_tokens=skip_special_tokens)

    "".join(opt.stream_text(_ids("日本語" * 50), Spy(), _ids("x" * 100)))
    assert max(lengths[12:]) <= 6
