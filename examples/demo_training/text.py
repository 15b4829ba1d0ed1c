"""Plain text to token ids: clean-up, splits, tokenizer."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

# The ids that OPT gives its special tokens; `</s>` both starts and ends a text.
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
PAD_ID = 1
BOS_ID = 2

# Lines of wrapped prose have a length in this range; shorter ones are verse, and a
# text with longer ones has a line for each paragraph.
_WRAPPED_LINE = range(50, 121)


def clean(text: str) -> str:
    """Returns `text` with typographic leftovers of its source removed.

    Hard-wrapped prose becomes one line a paragraph, verse keeps its lines, blank
    lines separate paragraphs; pilcrows become paragraph breaks and underscores
    that mark italics go.

    Args:
      text: the content of a plain text book.
    """
    text = text.replace("\ufeff", "").replace("\r\n", "\n").replace("_", "")
    text = re.sub(r"[ \t]*\u00b6[ \t]*", "\n\n", text)
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        lines = [" ".join(line.split()) for line in block.split("\n")]
        lines = [line for line in lines if line]
        if not lines:
            continue
        if max(len(line) for line in lines) >= _WRAPPED_LINE.stop:
            paragraphs.extend(lines)
        elif all(len(line) in _WRAPPED_LINE for line in lines[:-1]):
            paragraphs.append(" ".join(lines))
        else:
            paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


@dataclass(frozen=True)
class Splits:
    """Three parts of one book, in its order: nothing is in two of them.

    Attributes:
      train: what the tokenizer and the model learn from.
      validation: chooses the checkpoint that is kept.
      held_out: the end of the book; used for the reported perplexities alone.
    """

    train: str
    validation: str
    held_out: str


def split(text: str, validation: float, held_out: float) -> Splits:
    """Cuts `text` at paragraph ends near the given fractions of its length.

    Args:
      text: a cleaned book.
      validation: fraction that lies before the held-out part.
      held_out: fraction at the end.

    Raises:
      ValueError: the text is too short to be cut into three parts.
    """
    first = text.find("\n\n", int(len(text) * (1 - validation - held_out)))
    second = text.find("\n\n", int(len(text) * (1 - held_out)))
    if not 0 < first < second:
        raise ValueError(
            "expected a text of paragraphs long enough to be cut into train, "
            f"validation and held-out parts, got {len(text)} characters"
        )
    return Splits(text[:first], text[first + 2 : second], text[second + 2 :])


def read_books(
    paths: Sequence[Path], validation: float, held_out: float
) -> dict[str, Splits]:
    """Reads, cleans and splits UTF-8 text files; the keys are the files' stems.

    Raises:
      ValueError: a file is not UTF-8 text, is too short, or two share a name.
      OSError: a file cannot be read.
    """
    books: dict[str, Splits] = {}
    for path in paths:
        if path.stem in books:
            raise ValueError(f"expected text files of different names, got {path} too")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected UTF-8 text, got {error}") from error
        try:
            books[path.stem] = split(clean(text), validation, held_out)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return books


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE tokenizer with OPT's special tokens.

    Args:
      texts: the training parts.
      vocab_size: number of entries, special tokens included.

    Raises:
      ValueError: the texts do not yield that many entries.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (piece for text in texts for piece in _pieces(text)), trainer
    )
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"expected text that yields {vocab_size} tokenizer entries, got "
            f"{tokenizer.get_vocab_size()}: give more text or a smaller vocabulary"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A",
        pair="</s> $A </s> $B",
        special_tokens=[("</s>", BOS_ID)],
    )
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Returns the ids of `text` without special tokens, int32 of shape (length,)."""
    batches = tokenizer.encode_batch_fast(list(_pieces(text)), add_special_tokens=False)
    return np.concatenate([np.asarray(b.ids, np.int32) for b in batches])


def excerpt(books: dict[str, Splits], size: int) -> str:
    """Joins the starts of the books' held-out parts to about `size` characters."""
    share = size // len(books)
    parts = []
    for book in books.values():
        text = book.held_out
        end = text.rfind("\n\n", 0, share) if len(text) > share else len(text)
        parts.append(text[: end if end > 0 else share])
    return "\n\n".join(parts)


def _pieces(text: str, size: int = 20_000) -> Iterator[str]:
    """Cuts `text` before paragraph breaks, so that threads can share the work.

    A break at the start of a piece is tokenized as in the middle of a text.
    """
    start = 0
    while start < len(text):
        end = text.find("\n\n", start + size)
        end = len(text) if end < 0 else end
        yield text[start:end]
        start = end
