"""``flashjax eval``."""

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape

from flashjax.cli.progress import progress_bar, reading_weights
from flashjax.cli.report import device_line
from flashjax.models import opt
from flashjax.models.opt.evaluation import perplexity
from flashjax.models.opt.hf_folder import local_folder
from flashjax.models.opt.text_files import read_documents
from flashjax.models.opt.tokenizer import require_tokenizer


def run(
    folder: str,
    *,
    text: Path,
    window: int | None,
    stride: int | None,
    dtype: str,
    json_output: bool,
    quiet: bool,
) -> None:
    """Prints a model's perplexity on a text."""
    document = "\n\n".join(read_documents(text))
    local = local_folder(folder)
    opt.OPTConfig.from_hf(local)
    # Before the weights are read, which may take minutes.
    ids = np.asarray(require_tokenizer(local).encode(document).ids, np.int32)
    with reading_weights(disable=quiet) as progress:
        model, _ = opt.from_pretrained(local, dtype=dtype, progress=progress)
    started = time.perf_counter()
    with progress_bar(disable=quiet) as advance:
        found = perplexity(
            model,
            ids,
            window=window,
            stride=stride,
            progress=lambda done, total: advance("windows", done, total),
        )
    seconds = time.perf_counter() - started
    if json_output:
        content = {"model": folder, "text": str(text), "dtype": dtype}
        content |= dataclasses.asdict(found) | {"seconds": round(seconds, 3)}
        print(json.dumps(content, indent=2))
        return
    if quiet:  # for scripts: the number alone
        print(f"{found.perplexity:.4f}")
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"perplexity {found.perplexity:.4f}")
    console.print(
        f"{found.predicted} of {found.tokens} tokens of {escape(str(text))} in "
        f"{found.windows} windows of {found.window}, stride {found.stride}, "
        f"{dtype}, {seconds:.1f} s on {escape(device_line(model))}"
    )
