"""From a stored model to a pruned one, and what is asked and checked on the way."""

import hashlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

import flashjax
from flashjax.checkpoint import CheckpointError, read_json

from ..calibration import Calibration, CalibrationText, sample_windows
from ..hf_folder import StoredOPT, open_opt
from ..modeling import check_dtype
from ..tokenizer import load_tokenizer
from .budgets import Budget
from .partial_run import partial_run
from .result import PruneResult
from .settings import Format, Settings
from .work import Progress, Work

# What a model folder holds beside its weights and config.json.
COPIED = (
    "added_tokens.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.md",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
_HASHED_BYTES = 1 << 20


def prune_pretrained(
    folder_or_hub_name: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    sparsity: float | None = None,
    method: str = "magnitude",
    pattern: str | None = None,
    budget: Budget = "uniform",
    calibration: CalibrationText | Calibration | None = None,
    damping: float | None = None,
    format: Format = "flashjax",
    dtype: DTypeLike = jnp.float16,
    activations: DTypeLike | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> PruneResult:
    """Prunes the linear layers of a stored OPT's decoder, one layer after another.

    Embeddings, projections, norms and biases stay dense. Where the method needs
    statistics, calibration text streams through the model once: the queries', keys' and
    values' matrices are pruned, then each next matrix on inputs that went through the
    pruned ones before it (as in SparseGPT, arXiv:2301.00774), and the layer's outputs
    are the next layer's inputs. Only one layer is on the device; the host holds one
    layer and its inputs for all of the text.

    An interrupted run leaves its finished layers in OUT.partial, for `resume`.

    Args:
      folder_or_hub_name: a model, as for from_pretrained().
      out: the folder to write; it appears whole or not at all.
      sparsity: share of zeros, 0 to 1; None where a pattern says it.
      method: a name of flashjax.prune.METHODS.
      pattern: n:m as "2:4".
      budget: "uniform"; "owl" (arXiv:2310.05175), which leaves more in layers with
        outliers, with `sparsity` on average; or sparsities by the matrix' name, as
        {"layers.0.fc1": 0.7}, where the others take `sparsity`.
      calibration: text, or tokens; None takes the text that comes with FlashJAX.
      damping: of the methods that have one.
      format: "flashjax" stores sparse weights; "hf" a plain Hugging Face folder with
        zeros in place.
      dtype: to store, float16 or bfloat16, or float32 with format "hf".
      activations: dtype of computation, like dtype or float32; None is dtype.
      overwrite: replace an existing model folder.
      resume: go on with what an interrupted run of the same arguments left, if
        anything; the result is the same.
      progress: called with what is being done, elements done and all, again and again.

    Returns:
      What was written.

    Raises:
      ValueError: an argument is out of range, or there is too little text.
      CheckpointError: (a ValueError) the model is none; out exists, cannot be written
        or has an unfinished run of other arguments; or a layer cannot be pruned: its
        name and what to do are in the message.
    """
    started = time.perf_counter()
    out = Path(out).resolve()
    dtype = check_dtype(dtype)
    compute = dtype if activations is None else check_dtype(activations)
    settings = Settings(
        sparsity, method, pattern, budget, damping, format, dtype, compute
    )
    with open_opt(folder_or_hub_name) as stored:
        settings.check_for(stored.config)
        if out == stored.folder.resolve():
            raise CheckpointError(
                f"{out}: expected a folder other than the model to prune, got the same"
            )
        tokens = None
        if settings.needs_calibration:
            tokens = _tokens(stored, calibration or CalibrationText())
        arguments = settings.arguments() | _circumstances(stored, tokens)
        parts = stored.config.num_layers + 1
        with partial_run(
            out, arguments, parts, resume=resume, overwrite=overwrite
        ) as run:
            resumed = min(run.finished_parts, parts - 1)
            work = Work(stored, settings, tokens, run, progress)
            work.do()
            work.advance("", 0)
            files = _side_files(stored, settings.dtype)
            stored_bytes, reports = run.finish(out, files, overwrite), work.reports
        total = sum(np.prod(t.shape, dtype=int) for t in stored.targets.values())
    return PruneResult(
        reports=tuple(reports),
        dense_bytes=int(total) * settings.dtype.itemsize,
        stored_bytes=stored_bytes,
        samples=len(tokens.token_ids) if tokens else 0,
        length=tokens.token_ids.shape[1] if tokens else 0,
        resumed_layers=resumed,
        seconds=time.perf_counter() - started,
        host_peak_bytes=_host_peak_bytes(),
        device_peak_bytes=(jax.devices()[0].memory_stats() or {}).get(
            "peak_bytes_in_use"
        ),
    )


def _tokens(stored: StoredOPT, given: CalibrationText | Calibration) -> Calibration:
    if isinstance(given, CalibrationText):
        tokenizer = load_tokenizer(stored.folder)
        if tokenizer is None:
            raise CheckpointError(
                f"{stored.folder}: calibration text needs a tokenizer.json, or "
                "vocab.json and merges.txt, got neither"
            )
        return sample_windows(given, tokenizer, stored.config)
    config, ids = stored.config, given.token_ids
    if ids.shape[1] > config.max_positions:
        raise ValueError(
            f"calibration: expected at most the model's {config.max_positions} "
            f"positions, got {ids.shape[1]}"
        )
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(
            f"calibration: expected token ids in [0, {config.vocab_size}), got values "
            f"from {ids.min()} to {ids.max()}"
        )
    return given


def _circumstances(stored: StoredOPT, tokens: Calibration | None) -> dict[str, Any]:
    """What the result depends on beside the settings."""
    device = jax.devices()[0]
    return {
        "model": _fingerprint(stored.folder),
        "calibration": tokens.digest if tokens else None,
        "flashjax": flashjax.__version__,
        "jax": jax.__version__,
        "device": f"{device.platform} {device.device_kind}",
    }


def _fingerprint(folder: Path) -> str:
    """A digest of config.json and of the sizes, starts and ends of the weights."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".bin") and path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with open(path, "rb") as file:
                digest.update(file.read(_HASHED_BYTES))
                file.seek(max(0, size - _HASHED_BYTES))
                digest.update(file.read(_HASHED_BYTES))
    return digest.hexdigest()


def _side_files(stored: StoredOPT, dtype: np.dtype) -> dict[str, bytes]:
    """What a model folder holds beside the weights."""
    folder = stored.folder
    found = {n: (folder / n).read_bytes() for n in COPIED if (folder / n).is_file()}
    # The rest of the file stays as it was, for whoever else reads it.
    content = read_json(folder / "config.json")
    content.pop("dtype", None)  # another name of torch_dtype
    content |= {
        "architectures": ["OPTForCausalLM"],
        "torch_dtype": dtype.name,
        "tie_word_embeddings": stored.config.tie_word_embeddings,
    }
    found["config.json"] = (json.dumps(content, indent=2) + "\n").encode()
    return found


def _host_peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
