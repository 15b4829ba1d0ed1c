"""Pruning, fine-tuning and measuring the cells of a study."""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from demo_training import text
from demo_training.text import BOS_ID
from fine_tuning import decoder_kernels, masked_step, random_batches, train

import flashjax as fj
from flashjax.models import opt
from flashjax.models.opt.calibration import CalibrationText, sample_windows
from flashjax.models.opt.evaluation import perplexity
from flashjax.models.opt.pruning import prune_pretrained

from .cells import Cell

# The splits of train_demo.py.
_VALIDATION, _HELD_OUT = 0.015, 0.05


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every cell has in common.

    Attributes:
      samples: windows of calibration text, each as long as the model has positions.
      held_out: characters of held-out text to measure on.
      batch: sequences of a step of fine-tuning.
      learning_rate: its peak.
      seed: of calibration text and batches.
    """

    samples: int = 128
    held_out: int = 200_000
    batch: int = 8
    learning_rate: float = 1e-3
    seed: int = 0


class Study:
    """Measures cells of one model, and remembers them in a folder.

    Args:
      folder: the dense model.
      texts: UTF-8 files; calibration and fine-tuning use the training part, the
        perplexity is of the held-out part at the end.
      work: folder for what is known so far and for pruned models.
      settings: see there.

    Raises:
      ValueError: an unsuitable model or text, or `work` is of another study.
      OSError: a file cannot be read or written.
    """

    def __init__(self, folder: Path, texts: list[Path], work: Path, settings: Settings):
        self.settings, self._folder, self._work = settings, folder, work
        model, self._tokenizer = _load(folder)
        if self._tokenizer is None:
            raise ValueError(f"{folder}: expected a tokenizer, got none")
        self._length = model.config.max_positions
        books = text.read_books(texts, _VALIDATION, _HELD_OUT)
        self._train = [book.train for book in books.values()]
        held_out = text.excerpt(books, settings.held_out)
        self._ids = np.asarray(self._tokenizer.encode(held_out).ids, np.int32)
        self.facts = {
            "model": _digest(folder),
            "texts": {path.name: _sha256(path.read_bytes()) for path in texts},
            **dataclasses.asdict(settings),
        }
        self._rows = self._read_rows()
        work.mkdir(parents=True, exist_ok=True)
        self._calibration = self._sample(model.config)
        self._training_ids: np.ndarray | None = None
        kernels = [k.get_value() for k in decoder_kernels(model).values()]
        self.model = {
            "layers": model.config.num_layers,
            "width": model.config.hidden_size,
            "positions": self._length,
            "vocabulary": model.config.vocab_size,
            "prunable_weights": sum(k.size for k in kernels),
            "zeros_before": sum(int(jnp.sum(k == 0)) for k in kernels),
            "held_out_tokens": len(self._ids),
            "calibration_tokens": int(self._calibration.token_ids.size),
        }

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Returns a cell's row, known from an earlier run or measured now."""
        if not self.known(cell):
            started = time.perf_counter()
            row = dataclasses.asdict(cell) | self._measure(cell)
            row["seconds"] = round(time.perf_counter() - started, 1)
            self._rows[cell.name] = row
            content = {"facts": self.facts, "rows": self._rows}
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
            os.replace(temporary, self._path)
        return self._rows[cell.name]

    def known(self, cell: Cell) -> bool:
        """Whether a cell's row is known already."""
        return cell.name in self._rows

    @property
    def _path(self) -> Path:
        return self._work / "rows.json"

    def _read_rows(self) -> dict[str, dict[str, Any]]:
        if not self._path.exists():
            return {}
        content = json.loads(self._path.read_text(encoding="utf-8"))
        old, new = content["facts"], self.facts
        other = sorted(key for key in old | new if old.get(key) != new.get(key))
        if other:
            raise ValueError(
                f"{self._work}: expected a study of the same {', '.join(other)}; "
                "delete the folder or give another --work"
            )
        return content["rows"]

    def _sample(self, config: opt.OPTConfig) -> Any:
        path = self._work / "calibration.txt"
        path.write_text("\n\n".join(self._train), encoding="utf-8")
        chosen = CalibrationText(
            path, samples=self.settings.samples, seed=self.settings.seed
        )
        return sample_windows(chosen, self._tokenizer, config)

    def _measure(self, cell: Cell) -> dict[str, Any]:
        out = self._work / "pruned"
        shutil.rmtree(out.with_name("pruned.partial"), ignore_errors=True)
        row: dict[str, Any] = {"zeros": 0.0, "error": None}
        folder = self._folder
        if cell.method != "dense":
            result = prune_pretrained(
                folder,
                out,
                sparsity=None if cell.pattern else cell.sparsity,
                method=cell.method,
                pattern=cell.pattern,
                budget=cell.budget,
                calibration=self._calibration,
                activations=jnp.float32,
                overwrite=True,
            )
            errors = [r.error for r in result.reports if r.error is not None]
            row["zeros"] = round(result.sparsity, 5)
            row["error"] = round(float(np.mean(errors)), 5) if errors else None
            folder = out
        model, _ = _load(folder)
        if cell.tuning != "none":
            model, tuned = self._tune(model, cell.tuning, cell.steps)
            row |= tuned
        return row | {"perplexity": round(perplexity(model, self._ids).perplexity, 4)}

    def _tune(
        self, model: opt.OPT, kind: str, steps: int
    ) -> tuple[opt.OPT, dict[str, Any]]:
        if self._training_ids is None:
            end = np.array([BOS_ID], np.int32)
            parts = [(text.encode(self._tokenizer, part), end) for part in self._train]
            self._training_ids = np.concatenate([ids for part in parts for ids in part])
        kernels = decoder_kernels(model)
        after = _nothing
        if kind == "sparse":
            model = fj.sparsify(
                model, lambda path, _: path in kernels, dtype=jnp.float16
            )
            model = fj.trainable(model)
        elif kind == "masked":
            after = masked_step({n: k.get_value() != 0 for n, k in kernels.items()})
        settings = self.settings
        batches = random_batches(
            self._training_ids, settings.batch, self._length, settings.seed
        )
        # optax promotes types implicitly.
        with jax.numpy_dtype_promotion("standard"):
            result = train(
                model,
                batches,
                _nothing,
                steps=steps,
                learning_rate=settings.learning_rate,
                after=after,
            )
        if kind == "sparse":
            model = fj.freeze(model)
        known = ("seconds_a_step", "optimizer_bytes")
        return model, {name: result[name] for name in known}


def _nothing(*unused: Any) -> None:
    pass


def _load(folder: Path) -> tuple[opt.OPT, Any]:
    # With the matrices that were pruned, q, k and v apart.
    return opt.from_pretrained(folder, dtype=jnp.float32, sparse=False, fuse_qkv=False)


def _digest(folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin"))
    files.append(folder / "config.json")
    return _sha256(*(path.read_bytes() for path in files))


def _sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
