import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from flashjax.checkpoint import CheckpointError
from flashjax.models.opt import OPTConfig
from flashjax.models.opt.tokenizer import (
    _check_post_processor,
    load_tokenizer,
    save_tokenizer,
)

DATA = Path(__file__).parent / "data"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(DATA / "tokenizer", tmp_path / "tokenizer"))


def stored_texts():
    with np.load(DATA / "tokenizer.npz") as stored:
        texts = [str(text) for text in stored["texts"]]
        return [(text, stored[f"ids_{i}"].tolist()) for i, text in enumerate(texts)]


def test_original_files_encode_as_transformers(folder):
    tokenizer = load_tokenizer(folder)
    for text, ids in stored_texts():
        assert tokenizer.encode(text).ids == ids


def test_decoding_drops_special_tokens(folder):
    tokenizer = load_tokenizer(folder)
    text = "the cat sat, \u00e9\n on"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_saved_tokenizer_is_the_same(folder, tmp_path):
    save_tokenizer(load_tokenizer(folder), OPTConfig(), tmp_path)
    loaded = load_tokenizer(tmp_path)
    for text, ids in stored_texts():
        assert loaded.encode(text).ids == ids
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["bos_token"] == settings["eos_token"] == "</s>"
    assert settings["pad_token"] == "<pad>"


def test_stored_truncation_and_padding_are_ignored(folder):
    tokenizer = load_tokenizer(folder)
    expected = tokenizer.encode("the cat sat").ids
    for length in 2, 20:
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(length=length)
        tokenizer.save(str(folder / "tokenizer.json"))
        assert load_tokenizer(folder).encode("the cat sat").ids == expected


def test_bos_is_added_to_a_fast_tokenizer_that_should_have_it(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).encode("the").ids[0] != 2
    settings = {"add_bos_token": True, "bos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(folder).encode("the cat").ids == [
        2,
        *tokenizer.encode("the cat").ids,
    ]


def test_bos_can_be_turned_off(folder):
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert load_tokenizer(folder).encode("the").ids[0] != 2


def test_no_unknown_special_token_is_added(folder):
    before = load_tokenizer(folder).get_vocab_size()
    settings = {"pad_token": "[NEW]", "unk_token": {"content": "<unk>"}}
    (folder / "special_tokens_map.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.token_to_id("[NEW]") is None
    assert tokenizer.get_vocab_size() == before


def test_folder_without_tokenizer(tmp_path):
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "vocab.json").write_text("{}")
    assert load_tokenizer(tmp_path) is None


def test_damaged_files(folder):
    (folder / "merges.txt").write_text("#version: 0.2\nx y\n")
    with pytest.raises(CheckpointError, match=r"vocab\.json and merges\.txt"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: expected a tokenizer"):
        load_tokenizer(folder)


def test_post_processor_with_a_token_that_is_not_defined(folder):
    tokenizer = load_tokenizer(folder)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    content = json.loads(path.read_text())
    content["post_processor"]["special_tokens"] = {}
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: expected a tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_process_goes_through(kind):
    class Ending:
        def encode(self, text):
            raise kind

    with pytest.raises(kind):
        _check_post_processor(Ending(), Path("tokenizer.json"))


def test_result_is_a_plain_tokenizer(folder):
    assert isinstance(load_tokenizer(folder), Tokenizer)
