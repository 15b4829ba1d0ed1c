"""``flashjax generate``."""

import dataclasses
import json
import re
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console
from rich.markup import escape

from flashjax import nn
from flashjax.cli import report
from flashjax.cli.errors import UsageError
from flashjax.cli.progress import progress_bar, reading_weights
from flashjax.models import opt
from flashjax.models.opt.batch_file import (
    FAILED,
    Job,
    check_prompt,
    check_target,
    continue_input,
    partial_path,
    read_input,
    request_of,
    run_jobs,
)
from flashjax.models.opt.generate import check_logits, compile_request
from flashjax.models.opt.generation_request import Request, end_ids, make_request
from flashjax.models.opt.hf_folder import local_folder
from flashjax.models.opt.tokenizer import require_tokenizer


@dataclasses.dataclass
class _Speed:
    """Tokens and seconds of the batches so far; compilation is apart."""

    batch: int
    tokens: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def line(self) -> str:
        return (
            f"{self.rate:.1f} tokens/s ({self.tokens} tokens in {self.seconds:.2f} s "
            f"at a batch of {self.batch}, prefill included; before it "
            f"{self.compile_seconds:.1f} s of compilation)"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "tokens_per_s": round(self.rate, 1),
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "compile_seconds": round(self.compile_seconds, 2),
            "batch": self.batch,
        }


def check_options(options: dict[str, Any]) -> None:
    """Raises UsageError if an option is out of range, whatever the model is."""
    most = {"max_new_tokens": sys.maxsize}  # until the model's file is read
    try:
        opt.GenerationConfig(**most | options)
    except ValueError as error:
        raise UsageError(str(error)) from error


def run(
    name: str,
    *,
    prompts: list[str],
    file: Path | None,
    options: dict[str, Any],
    dtype: str,
    cache_dtype: str | None,
    dense: bool,
    implementation: str | None,
    batch: int,
    stream: bool,
    logprobs: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Continues prompts and prints the texts.

    Args:
      name: model folder or hub name.
      prompts: prompts given one by one.
      file: a text file with a prompt a line, "-" for stdin, or None.
      options: of opt.generate(); they go before the model's generation_config.json.
      dtype: of the model.
      cache_dtype: of keys and values; None is the model's.
      dense: expand sparse weights.
      implementation: of the sparse product, None for the best.
      batch: number of prompts that are continued at once.
      stream: print tokens as they come.
      logprobs: add the tokens and their log-probabilities to the JSON.
      as_json: print JSON.
      quiet: print the texts alone.

    Raises:
      ValueError: something does not fit.
    """
    prompts = [*prompts, *read_prompts(file)]
    _check_prompts(prompts)
    folder, config = _read_config(name, options)
    # Before the weights are read, which may take minutes.
    model_config, tokenizer = opt.OPTConfig.from_hf(folder), require_tokenizer(folder)
    encoded = [tokenizer.encode(prompt).ids for prompt in prompts]
    for number, ids in enumerate(encoded, 1):
        try:
            check_prompt(model_config, ids, config.max_new_tokens)
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from error
    model = load(folder, dtype, cache_dtype, dense, implementation, quiet)

    speed = _Speed(batch=min(batch, len(prompts)))
    if as_json:
        with progress_bar(disable=quiet) as advance:
            results = []
            for result in _results(
                model, tokenizer, prompts, encoded, config, speed, logprobs
            ):
                results.append(result)
                advance("prompts", len(results), len(prompts))
        content = {
            "model": name,
            "dtype": dtype,
            "results": results,
            "device": report.device_line(model),
            "speed": speed.to_json(),
            "weights": report.measure(model).to_json(),
        }
        print(json.dumps(content, indent=2))
        return

    console = Console(highlight=False, soft_wrap=True)
    for start in range(0, len(prompts), batch):
        rows = slice(start, start + batch)
        printer = _Printer(console, tokenizer, prompts, start, headers=not quiet)
        _run_batch(
            model, encoded[rows], config, printer, speed, stream=stream, warm=not quiet
        )
    if not quiet:
        lines = [
            ("device", report.device_line(model)),
            ("speed", speed.line()),
            *report.weight_lines(report.measure(model)),
        ]
        console.print()
        for title, text in lines:
            console.print(f"[dim]{title + ':':<15}[/dim]{escape(text)}")


def run_file(
    name: str,
    *,
    source: Path,
    target: Path,
    options: dict[str, Any],
    dtype: str,
    cache_dtype: str | None,
    dense: bool,
    implementation: str | None,
    batch: int,
    logprobs: bool,
    resume: bool,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Continues the prompts of a JSON lines file; see opt.generate_file().

    The other arguments are those of run().
    """
    check_target(source, target, resume=resume, overwrite=overwrite)
    folder, config = _read_config(name, options)
    # Before the weights are read, which may take minutes.
    tokenizer = require_tokenizer(folder)
    read = read_input(source, tokenizer, opt.OPTConfig.from_hf(folder), config)
    model = load(folder, dtype, cache_dtype, dense, implementation, quiet)
    done = 0
    began = time.perf_counter()
    try:
        with progress_bar(disable=quiet) as advance:

            def progress(count: int, total: int) -> None:
                nonlocal done
                done = count
                advance("lines", count, total)

            lines = continue_input(
                model,
                tokenizer,
                read,
                target,
                config=config,
                batch=batch,
                logprobs=logprobs,
                resume=resume,
                overwrite=overwrite,
                progress=progress,
            )
    except KeyboardInterrupt:
        partial = partial_path(target)
        if partial.exists():
            typer.echo(
                f"flashjax: {done} lines are done and kept in {partial}; "
                "--resume goes on with the others",
                err=True,
            )
        raise
    if not quiet:
        seconds = time.perf_counter() - began
        typer.echo(f"{target}: {lines} lines in {seconds:.1f} s")


def load(
    folder: str | Path,
    dtype: str,
    cache_dtype: str | None,
    dense: bool,
    implementation: str | None,
    quiet: bool,
) -> opt.OPT:
    """Loads a model as the options of the command say.

    Raises:
      ValueError: there is no layer for the implementation.
    """
    with reading_weights(disable=quiet) as progress:
        model, _ = opt.from_pretrained(
            folder,
            dtype=jnp.dtype(dtype),
            sparse=False if dense else "auto",
            cache_dtype=cache_dtype,
            progress=progress,
        )
    layers = [layer for _, layer in nn.sparse_layers(model)]
    if implementation is not None and not layers:
        raise ValueError(
            f"--implementation {implementation}: expected a model with sparse layers, "
            f"got none in {folder} as {dtype}"
        )
    for layer in layers:
        layer.implementation = implementation
    return model


def _read_config(
    name: str, options: dict[str, Any]
) -> tuple[Path, opt.GenerationConfig]:
    """The model's folder, and its generation_config.json under the options given."""
    folder = local_folder(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = opt.GenerationConfig.from_pretrained(folder, **options)
    for warning in caught:
        typer.echo(f"flashjax: warning: {warning.message}", err=True)
    for name in ("top_k", "top_p"):
        if name in options and not config.temperature:
            flag = "--" + name.replace("_", "-")
            typer.echo(
                f"flashjax: warning: {flag}: no effect at temperature 0", err=True
            )
    return folder, config


def _check_prompts(prompts: list[str]) -> None:
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise ValueError(f"expected prompts with text, got an empty one: {number}")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:  # bytes of the command line that are no UTF-8
            raise ValueError(f"expected UTF-8 text in prompt {number}") from None


def read_prompts(file: Path | None) -> list[str]:
    """Reads the prompts of a file: one a line, blank lines left out.

    Raises:
      ValueError: the file cannot be read as UTF-8 text or holds no prompt.
    """
    if file is None:
        return []
    name = "stdin" if str(file) == "-" else str(file)
    if name == "stdin" and sys.stdin is None:
        raise ValueError("--file: expected an open standard input, got a closed one")
    try:
        data = sys.stdin.buffer.read() if name == "stdin" else file.read_bytes()
        text = data.decode("utf-8").removeprefix("\ufeff")  # a byte order mark
    except OSError as error:
        raise ValueError(
            f"--file: expected a text file of prompts, got {name}: {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--file: expected UTF-8 text in {name}, got byte "
            f"{data[error.start]:#04x} at offset {error.start}"
        ) from error
    # Not splitlines(), which also splits at separators that a prompt may hold.
    lines = re.split(r"\r\n?|\n", text)
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--file: expected a prompt a line in {name}, got no text")
    return prompts


class _Printer:
    """Prints a batch: the first row as it comes, the others when they are complete."""

    def __init__(
        self,
        console: Console,
        tokenizer: Any,
        prompts: list[str],
        start: int,
        *,
        headers: bool,
    ):
        self._console = console
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._start = start
        self._headers = headers and len(prompts) > 1

    def open(self, row: int) -> None:
        index = self._start + row
        if self._headers:
            if index:
                self._console.print()
            self._console.print(f"[dim]\\[{index + 1}/{len(self._prompts)}][/dim]")
        # Not console.print(), which interprets markup, tabs and emoji codes.
        typer.secho(self._prompts[index], bold=True, nl=False)

    def row(self, row: int, prompt_ids: list[int], tokens: Iterable[int]) -> None:
        self.open(row)
        try:
            for piece in opt.stream_text(tokens, self._tokenizer, prompt_ids):
                typer.echo(piece, nl=False)
        finally:  # an error begins a line of its own
            self._console.print()


def _run_batch(
    model: Any,
    encoded: list[list[int]],
    config: opt.GenerationConfig,
    printer: _Printer,
    speed: _Speed,
    *,
    stream: bool,
    warm: bool,
) -> None:
    token_ids, mask = opt.pad_prompts(encoded)
    if warm:
        request = make_request(model.config, token_ids, mask, config)
        speed.compile_seconds += _compile(model, request)
    ends = end_ids(model.config, config.eos_token_id)
    began = time.perf_counter()
    if stream:
        columns: list[np.ndarray] = []

        def collected() -> Iterator[np.ndarray]:
            for column in opt.generate_stream(model, token_ids, mask, config=config):
                columns.append(column)
                yield column

        steps = collected()
        printer.row(0, encoded[0], until_end((int(c[0]) for c in steps), ends))
        for _ in steps:  # the first row may end before others
            pass
        speed.seconds += time.perf_counter() - began
        rows = np.stack(columns, axis=1) if columns else np.zeros((len(encoded), 0))
    else:
        out = np.asarray(opt.generate(model, token_ids, mask, config=config))
        speed.seconds += time.perf_counter() - began
        rows = out[:, token_ids.shape[1] :]
    new_tokens = [list(until_end(map(int, row), ends)) for row in rows]
    speed.tokens += sum(map(len, new_tokens))
    for i in range(1 if stream else 0, len(encoded)):
        printer.row(i, encoded[i], new_tokens[i])


def _results(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    encoded: list[list[int]],
    config: opt.GenerationConfig,
    speed: _Speed,
    logprobs: bool,
) -> Iterator[dict[str, Any]]:
    """What --output says of each prompt, and the prompt; the draws are run()'s."""
    for start in range(0, len(prompts), speed.batch):
        rows = range(start, min(start + speed.batch, len(prompts)))
        jobs = [
            Job(i, None, encoded[i], config.max_new_tokens, config.seed, i - start)
            for i in rows
        ]
        request = request_of(model, config, jobs, speed.batch)
        speed.compile_seconds += _compile(model, request, logprobs)
        began = time.perf_counter()
        done = list(run_jobs(model, tokenizer, config, jobs, logprobs, speed.batch))
        speed.seconds += time.perf_counter() - began
        check_logits([result["finish_reason"] == FAILED for _, result in done])
        for job, result in done:
            del result["id"]
            speed.tokens += result["new_tokens"]
            yield {"prompt": prompts[job.index], **result}


def until_end(tokens: Iterable[int], ends: set[int]) -> Iterator[int]:
    """The tokens up to and with the first end token."""
    for token in tokens:
        yield token
        if token in ends:
            return


def _compile(model: Any, request: Request, logprobs: bool = False) -> float:
    """Compiles what is timed later; the seconds that it took."""
    began = time.perf_counter()
    compile_request(model, request, logprobs)
    return time.perf_counter() - began
