"""The options of generation, and Hugging Face's generation_config.json."""

import dataclasses
import operator
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypedDict

import numpy as np

from flashjax.checkpoint import CheckpointError, read_json

from .sampling import as_float, as_int, check_filters, key_data

FILE_NAME = "generation_config.json"

# transformers draws from this many tokens where a file only says do_sample.
_HF_TOP_K = 50

# Keys of a file that say nothing about how tokens are chosen.
_IRRELEVANT = {
    "_from_model_config",
    "bos_token_id",
    "cache_implementation",
    "decoder_start_token_id",
    "disable_compile",
    "is_assistant",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "return_dict_in_generate",
    "return_legacy_cache",
    "transformers_version",
    "use_cache",
}

# What transformers takes for "not used", by key; None always is.
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "encoder_repetition_penalty": 1.0,
    "typical_p": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "max_length": 20,
    "min_length": 0,
    "top_h": None,
}


class GenerationOptions(TypedDict, total=False):
    """The fields of `GenerationConfig` as keywords of `generate`."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    repetition_penalty: float
    seed: int
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How tokens are chosen and when a row ends.

    Attributes:
      max_new_tokens: number of tokens to generate; 0 returns the prompts.
      min_new_tokens: number of tokens before which no row may finish: end tokens get
        no probability until then.
      temperature: divisor of the logits. 0 is greedy: the highest logit wins, of equal
        ones the lowest id.
      top_k: draw from the ``top_k`` highest logits only; None: from all.
      top_p: draw only from the most probable tokens that together reach this
        probability, after temperature and ``top_k``; None: from all.
      repetition_penalty: logits of tokens that the prompt or the continuation holds
        are divided by it where they are positive and multiplied where negative
        (Keskar et al., "CTRL", arXiv:1909.05858), before everything else. 1 changes
        nothing. Padding does not count as a token.
      seed: seed of the draws, 0 to 2**64 - 1. A row's draws depend on the seed and the
        row's index in the batch, not on the other rows.
      eos_token_id: id, or ids, that finish a row. None takes the model's
        (``model.config.eos_token_id``); -1 never stops.
      pad_token_id: what a row is filled with after its end. None takes the model's, or
        an end token where that is not in the vocabulary.

    Raises:
      TypeError: a field is no number of the right kind.
      ValueError: a field is out of range.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        new, least = (
            as_int(name, getattr(self, name))
            for name in ("max_new_tokens", "min_new_tokens")
        )
        if new < 0:
            raise ValueError(f"max_new_tokens must be at least 0, got {new}")
        if not 0 <= least <= new:
            raise ValueError(
                f"min_new_tokens must be from 0 to max_new_tokens={new}, got {least}"
            )
        temperature, top_k, top_p = check_filters(
            self.temperature, self.top_k, self.top_p
        )
        penalty = as_float("repetition_penalty", self.repetition_penalty)
        if not 0 < penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty must be finite and greater than 0, got {penalty}"
            )
        key_data(self.seed)
        pad = self.pad_token_id
        values = {
            "max_new_tokens": new,
            "min_new_tokens": least,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "repetition_penalty": penalty,
            "seed": operator.index(self.seed),
            "eos_token_id": _ids(self.eos_token_id),
            "pad_token_id": None if pad is None else as_int("pad_token_id", pad),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def with_options(self, **options: Any) -> Self:
        """This configuration with other values of some fields.

        Raises:
          TypeError, ValueError: an unknown field, or as the class.
        """
        _check_names(options)
        return dataclasses.replace(self, **options)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **options: Any) -> Self:
        """Reads the generation_config.json of a model folder.

        As in transformers, a file without ``do_sample`` is greedy, and one with it
        draws from 50 tokens where it does not say otherwise.

        Args:
          folder: a model folder in the Hugging Face layout, or the file itself.
          **options: fields that have these values, whatever the file says.

        Returns:
          The configuration; the default one where the folder has no such file.

        Warns:
          UserWarning: the file asks for what there is not, such as beam search; all
            such fields are named. They are ignored.

        Raises:
          CheckpointError: (a ValueError) there is no such folder, or the file is
            damaged or has wrong values, or ones that do not go with the options.
          TypeError, ValueError: an option is unknown or wrong whatever the file says.
        """
        _check_names(options)
        cls(**{"max_new_tokens": sys.maxsize} | options)
        path = Path(folder)
        if path.is_dir():
            path = path / FILE_NAME
            if not path.is_file():
                return cls().with_options(**options)
        if not path.is_file():
            raise CheckpointError(f"{folder}: expected a model folder, got nothing")
        try:
            config, ignored = cls.from_hf(read_json(path), **options)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from error
        if ignored:
            listed = ", ".join(f"{key}={value!r}" for key, value in ignored.items())
            warnings.warn(f"{path}: ignored, not supported: {listed}", stacklevel=2)
        return config

    @classmethod
    def from_hf(
        cls, content: dict[str, Any], **options: Any
    ) -> tuple[Self, dict[str, Any]]:
        """Translates the content of a generation_config.json.

        Args:
          content: of the file.
          **options: fields that go before it.

        Returns:
          The configuration, and the fields that ask for what there is not.
        """
        given = {k: v for k, v in content.items() if v is not None}
        fields = {f.name for f in dataclasses.fields(cls)} - {"seed"}
        sampling = {"temperature", "top_k", "top_p"}
        read = {k: v for k, v in given.items() if k in fields - sampling}
        do_sample = given.get("do_sample", False)
        if not isinstance(do_sample, bool):
            raise ValueError(f"do_sample must be true or false, got {do_sample!r}")
        if do_sample:
            read["temperature"] = given.get("temperature", 1.0)
            # 0 is how transformers spells "all".
            read["top_k"] = given.get("top_k", _HF_TOP_K) or None
            read["top_p"] = given.get("top_p")
        known = fields | _IRRELEVANT | {"do_sample"}
        ignored = {
            k: v
            for k, v in given.items()
            if k not in known and v is not False and v != _NEUTRAL.get(k)
        }
        return cls(**read | options), ignored


def _check_names(options: dict[str, Any]) -> None:
    """Raises TypeError unless all are fields of a configuration."""
    names = [field.name for field in dataclasses.fields(GenerationConfig)]
    unknown = sorted(options.keys() - set(names))
    if unknown:
        beams = " (there is no beam search)" if "num_beams" in unknown else ""
        raise TypeError(
            f"expected options of generation ({', '.join(names)}), got "
            f"{', '.join(unknown)}{beams}"
        )


def _ids(value: int | Sequence[int] | None) -> int | tuple[int, ...] | None:
    if value is None:
        return None
    if np.ndim(value) == 0:
        return as_int("eos_token_id", value)
    return tuple(as_int("eos_token_id", i) for i in value)  # type: ignore[union-attr]
