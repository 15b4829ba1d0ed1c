"""OPT's tokenizer: GPT-2's byte-level BPE with the BOS token in front."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import Sequence as ProcessorSequence
from tokenizers.processors import TemplateProcessing

from flashjax.checkpoint import CheckpointError, read_json
from flashjax.rust_panic import is_panic

from .config import OPTConfig

# The names of OPT's special tokens, for folders that do not name them.
_SPECIAL_TOKENS = {
    "bos_token": "</s>",
    "eos_token": "</s>",
    "unk_token": "</s>",
    "pad_token": "<pad>",
}


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """Loads tokenizer.json, or OPT's original vocab.json and merges.txt.

    Args:
      folder: in the Hugging Face layout.

    Returns:
      A tokenizer that puts the BOS token in front of a text where the model's own does,
      or None if the folder has no tokenizer.

    Raises:
      CheckpointError: the files are damaged.
    """
    settings = _read_settings(folder)
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the only type that tokenizers raises
            raise CheckpointError(
                f"{path}: expected a tokenizer, got {error}"
            ) from error
        # What the file was trained with; prompts must never be cut or padded by it.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _check_post_processor(tokenizer, path)
        # The file of a fast GPT-2 tokenizer knows nothing of OPT's BOS token.
        if settings.get("add_bos_token") is True:
            _add_bos(tokenizer, _token(settings, "bos_token"))
        return tokenizer

    paths = folder / "vocab.json", folder / "merges.txt"
    if not all(path.is_file() for path in paths):
        return None
    try:
        tokenizer = Tokenizer(models.BPE.from_file(*map(str, paths)))
    except Exception as error:
        raise CheckpointError(
            f"{folder}: expected a vocabulary and merges in vocab.json and merges.txt, "
            f"got {error}"
        ) from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=settings.get("add_prefix_space") is True
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = dict.fromkeys(_token(settings, key) for key in _SPECIAL_TOKENS)
    # Others would get ids of their own, for which the model has no embedding.
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token in special
            if tokenizer.token_to_id(token) is not None
        ]
    )
    if settings.get("add_bos_token", True):
        _add_bos(tokenizer, _token(settings, "bos_token"))
    return tokenizer


def require_tokenizer(folder: Path) -> Tokenizer:
    """Loads a folder's tokenizer, as load_tokenizer() does.

    Raises:
      CheckpointError: there is none, or the files are damaged.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise CheckpointError(
            f"{folder}: expected a tokenizer.json, or vocab.json and merges.txt, got "
            "neither"
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, config: OPTConfig, folder: Path) -> None:
    """Writes tokenizer.json and the tokenizer_config.json that transformers needs."""
    # Not by its own save(), whose errors do not tell a full disk.
    content = tokenizer.to_str(pretty=True)
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    ids = {
        "bos_token": config.bos_token_id,
        "eos_token": config.eos_token_id,
        "pad_token": config.pad_token_id,
    }
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for key, token_id in ids.items():
        token_id = token_id[0] if isinstance(token_id, tuple) else token_id
        token = None if token_id is None else tokenizer.id_to_token(token_id)
        if token is not None:
            settings[key] = token
    content = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(content, encoding="utf-8")


def _read_settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings |= read_json(folder / name)
    return settings


def _check_post_processor(tokenizer: Tokenizer, path: Path) -> None:
    """Encodes an empty text: loading checks no tokens that every text gets."""
    try:
        tokenizer.encode("")
    except BaseException as error:
        # Signals of the command line are no Exceptions either.
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise CheckpointError(
            f"{path}: expected a tokenizer that encodes texts, got one that fails "
            f"({error}): its post_processor may name a token that it does not define"
        ) from error


def _token(settings: dict[str, Any], key: str) -> str:
    token = settings.get(key)
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else _SPECIAL_TOKENS[key]


def _add_bos(tokenizer: Tokenizer, bos: str) -> None:
    bos_id = tokenizer.token_to_id(bos)
    if bos_id is None or tokenizer.encode("a").ids[:1] == [bos_id]:
        return
    template = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
    )
    before = tokenizer.post_processor
    tokenizer.post_processor = (
        template if before is None else ProcessorSequence([before, template])
    )
