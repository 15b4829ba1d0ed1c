"""Windows of tokens on which the statistics of a model's activations are taken."""

import dataclasses
import hashlib
import os
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .config import OPTConfig
from .text_files import read_documents

DEFAULT_TEXT = Path(__file__).parent / "data" / "calibration.txt"
DEFAULT_SAMPLES = 128
_MAX_LENGTH = 2048
# Windows are drawn from so many times the tokens that are needed.
_POOL = 8
_BATCH = 256


@dataclasses.dataclass(frozen=True)
class CalibrationText:
    """Text to take windows from.

    Attributes:
      path: see read_documents(); None takes the text that comes with FlashJAX, 300 kB
        of public-domain English.
      samples: number of windows; where the text has fewer, all of them are taken.
      length: tokens of a window; None takes the model's positions, at most 2048.
      seed: of the choice.

    Raises:
      ValueError: samples or length is below 1, or seed is negative.
    """

    path: str | os.PathLike[str] | None = None
    samples: int = DEFAULT_SAMPLES
    length: int | None = None
    seed: int = 0

    def __post_init__(self):
        for name, least in (("samples", 1), ("length", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is None and name == "length":
                continue
            if type(value) is not int or value < least:
                raise ValueError(
                    f"calibration {name}: expected an integer of at least {least}, got "
                    f"{value!r}"
                )


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Tokens to calibrate on.

    Attributes:
      token_ids: (samples, length) int32.
      mask: (samples, length) bool, False for padding.

    Raises:
      ValueError: the shapes or dtypes are others, or a sample is padding alone.
    """

    token_ids: np.ndarray
    mask: np.ndarray

    def __post_init__(self):
        ids, mask = self.token_ids, self.mask
        if ids.ndim != 2 or 0 in ids.shape or ids.dtype != np.int32:
            raise ValueError(
                "calibration token_ids: expected int32 (samples, length), neither of "
                f"them 0, got {ids.dtype} {ids.shape}"
            )
        if mask.shape != ids.shape or mask.dtype != np.bool_:
            raise ValueError(
                f"calibration mask: expected bool {ids.shape}, got {mask.dtype} "
                f"{mask.shape}"
            )
        if not mask.any(axis=1).all():
            raise ValueError("calibration mask: expected a token in every sample")

    @property
    def digest(self) -> str:
        """SHA-256 of tokens and mask."""
        digest = hashlib.sha256(repr(self.token_ids.shape).encode())
        digest.update(self.token_ids.tobytes())
        digest.update(self.mask.tobytes())
        return digest.hexdigest()


def sample_windows(
    text: CalibrationText, tokenizer: Tokenizer, config: OPTConfig
) -> Calibration:
    """Draws windows from a text at random, none overlapping another.

    Documents are shuffled, joined, and cut into windows; of these some are drawn.

    Args:
      text: what to take, and how much.
      tokenizer: the model's; a document starts with what it puts in front.
      config: the model.

    Returns:
      The windows, without padding.

    Raises:
      ValueError: the text is shorter than a window, the windows are longer than the
        model's positions, or see read_documents().
      OSError: the text cannot be read.
    """
    length = text.length or min(config.max_positions, _MAX_LENGTH)
    if length > config.max_positions:
        raise ValueError(
            f"calibration length: expected at most the model's {config.max_positions} "
            f"positions, got {length}"
        )
    path = Path(text.path or DEFAULT_TEXT)
    documents = read_documents(path)
    rng = np.random.default_rng(text.seed)
    order = rng.permutation(len(documents))
    tokens = _tokenize(
        [documents[i] for i in order], tokenizer, _POOL * text.samples * length
    )
    windows = len(tokens) // length
    if not windows:
        raise ValueError(
            f"{path}: expected calibration text of at least one window of {length} "
            f"tokens, got {len(tokens)} tokens"
        )
    chosen = rng.permutation(windows)[: text.samples]
    ids = tokens[: windows * length].reshape(windows, length)[chosen]
    if ids.max() >= config.vocab_size:
        raise ValueError(
            f"the tokenizer gave token {ids.max()}, the model has {config.vocab_size}"
        )
    return Calibration(ids, np.ones_like(ids, np.bool_))


def _tokenize(documents: list[str], tokenizer: Tokenizer, enough: int) -> np.ndarray:
    """The tokens of documents one after another, until there are enough."""
    parts: list[np.ndarray] = []
    for start in range(0, len(documents), _BATCH):
        for encoding in tokenizer.encode_batch(documents[start : start + _BATCH]):
            parts.append(np.asarray(encoding.ids, np.int32))
        if sum(map(len, parts)) >= enough:
            break
    return np.concatenate(parts)
