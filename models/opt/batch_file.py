"""Many prompts from one file to another: JSON lines in, JSON lines out.

Lines are sorted by length and go through the model in batches, longest first, so that
little is padded and a lack of memory shows at once. What is done is kept beside the
output, in a file that ends in `.partial`; the output itself appears whole, in the order
of the input.
"""

import codecs
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from flashjax.file_lock import try_lock

from .config import OPTConfig
from .generate import run_request
from .generation_config import GenerationConfig
from .generation_request import (
    Request,
    Rows,
    check_length,
    end_ids,
    make_request,
    pad_prompts,
)
from .modeling import OPT, check_opt
from .text_stream import stream_text

_KEYS = ("id", "prompt", "max_new_tokens", "seed")
_FORMAT = "flashjax-partial/1"
_SMALL_BYTES = 1 << 20  # of arrays whose content is always looked at
FAILED = "failed"  # the finish_reason of a line that has no result


@dataclasses.dataclass(frozen=True)
class Job:
    """A line of the input.

    Attributes:
      index: the number of lines before it.
      id: its "id", of any JSON type; the line's number where it has none.
      tokens: the prompt's token ids.
      max_new_tokens: of this line.
      seed: of the draws.
      stream: which of the seed's draws it gets: its own index, but 0 if it has a seed.
    """

    index: int
    id: Any
    tokens: Sequence[int]
    max_new_tokens: int
    seed: int
    stream: int


@dataclasses.dataclass(frozen=True)
class Input:
    """A file that was read and checked.

    Attributes:
      path: the file, which may be a pipe: it is not read again.
      jobs: its lines.
      digest: SHA-256 of its bytes.
    """

    path: Path
    jobs: list[Job]
    digest: str


def generate_file(
    model: OPT,
    tokenizer: Any,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    config: GenerationConfig | None = None,
    batch: int = 8,
    logprobs: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Continues every prompt of a file.

    Each line of the input is an object with "prompt" and, if wanted, "id",
    "max_new_tokens" and "seed". Each of the output has "id", "text" (the continuation),
    "new_tokens" (their number), "finish_reason" ("stop" after an end token, "failed"
    where the model's logits are NaN or infinite, else "length") and, with `logprobs`,
    "token_ids" and "logprobs".

    A line's result depends on the line, its index and the options alone, up to the
    rounding of another batch size or length: one with a seed gets what `generate` gives
    its prompt alone with that seed.

    Args:
      model: the model.
      tokenizer: its tokenizer.
      source: the input, UTF-8; blank lines are skipped.
      target: the output.
      config: the options; None is the default `GenerationConfig`.
      batch: prompts at once. Smaller batches are filled up, so that one program serves.
      logprobs: write the tokens and their log-probabilities too.
      resume: go on with what an interrupted run left. It must have had the same options
        and the same model, loaded the same way.
      overwrite: replace an existing output, and what an interrupted run left.
      progress: called with the lines that are done, and with all.

    Returns:
      The number of lines written.

    Raises:
      ValueError: a line does not fit (the first one is named), the output or a partial
        one exists or is the input or no file, the run to resume had other input or
        options, or another run is writing there.
      TypeError: the model is no OPT.
      FloatingPointError: lines failed; the output was written.
    """
    check_opt(model)
    config = config or GenerationConfig()
    if batch < 1:
        raise ValueError(f"expected a batch of at least 1, got {batch}")
    source, target = Path(source), Path(target)
    check_target(source, target, resume=resume, overwrite=overwrite)
    return continue_input(
        model,
        tokenizer,
        read_input(source, tokenizer, model.config, config),
        target,
        config=config,
        batch=batch,
        logprobs=logprobs,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )


def continue_input(
    model: OPT,
    tokenizer: Any,
    source: Input,
    target: Path,
    *,
    config: GenerationConfig,
    batch: int,
    logprobs: bool,
    resume: bool,
    overwrite: bool,
    progress: Callable[[int, int], None] | None,
) -> int:
    """`generate_file` of what was read before the model."""
    # Again: loading a model may have taken minutes.
    check_target(source.path, target, resume=resume, overwrite=overwrite)
    jobs = source.jobs
    header = {
        "format": _FORMAT,
        "input": source.digest,
        "model": dataclasses.asdict(model.config),
        "weights": _fingerprint(model),
        "tokens": _digest_of_tokens(jobs),
        "dtype": model.dtype.name,
        "cache_dtype": model.cache_dtype.name,
        "options": dataclasses.asdict(config),
        "batch": batch,
        "logprobs": logprobs,
    }
    header = json.loads(json.dumps(header))
    partial = partial_path(target)
    with open(partial, "a", encoding="utf-8") as journal:
        if not try_lock(journal):
            raise ValueError(f"{partial}: another run is writing there")
        done = _read_partial(partial, header) if resume else {}
        try:
            if not done:
                journal.truncate(0)
                journal.write(json.dumps(header) + "\n")
            for rows in _batches(jobs, batch):
                # The whole batch again, so that a resumed run computes the same.
                if any(job.index not in done for job in rows):
                    size = min(batch, len(jobs))
                    results = run_jobs(model, tokenizer, config, rows, logprobs, size)
                    for job, result in results:
                        if job.index not in done:
                            done[job.index] = result
                            line = {"index": job.index, "result": result}
                            journal.write(_json_line(line))
                    journal.flush()
                    os.fsync(journal.fileno())
                if progress is not None:
                    progress(len(done), len(jobs))
        finally:
            if not done:  # nothing that could be resumed
                partial.unlink()
        _check_new(target, overwrite)  # another run may have ended since
        _write(target, [done[job.index] for job in jobs])
        partial.unlink()
    failed = [i for i in sorted(done) if done[i]["finish_reason"] == FAILED]
    if failed:
        raise FloatingPointError(
            f"{target}: the model's logits are NaN or infinite in {len(failed)} of "
            f"{len(jobs)} lines, whose finish_reason is {FAILED!r} (the first has id "
            f"{done[failed[0]]['id']!r}); try dtype float32 or bfloat16"
        )
    return len(jobs)


def partial_path(target: Path) -> Path:
    """Where an unfinished run keeps its results."""
    whole = _behind_links(target)
    return whole.with_name(whole.name + ".partial")


def _behind_links(target: Path) -> Path:
    """What is replaced: not a link, but the file that it names."""
    return Path(os.path.realpath(target)) if target.is_symlink() else target


def check_target(source: Path, target: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises ValueError if the output, or a part of it, is in the way."""
    partial = partial_path(target)
    if target.is_dir() or not partial.parent.is_dir():
        raise ValueError(f"{target}: expected a file in an existing folder")
    # It is replaced as a whole, so nothing may be there that is not an output.
    if target.exists() and not target.is_file():
        raise ValueError(f"{target}: expected a file, got a device or pipe")
    present = [path for path in (target, partial) if path.exists()]
    if source.exists() and any(map(source.samefile, present)):
        raise ValueError(f"{source}: expected an output other than the input")
    _check_new(target, overwrite)
    if partial.exists() and not (resume or overwrite):
        raise ValueError(
            f"{target}: an interrupted run left {partial} (resume goes on with "
            "it, overwrite starts again)"
        )


def _check_new(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise ValueError(
            f"{target}: expected a new file, got one that exists (overwrite replaces "
            "it)"
        )


def read_input(
    source: Path, tokenizer: Any, model: OPTConfig, config: GenerationConfig
) -> Input:
    """Reads and checks the whole input.

    Raises:
      ValueError: a line does not fit; the message names file and line.
    """
    try:
        content = source.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{source}: expected a file of JSON lines, got: {error.strerror}"
        ) from error
    jobs: list[Job] = []
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            jobs.append(_parse(line, number, len(jobs), tokenizer, model, config))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}, line {number}: {error}") from error
    if not jobs:
        raise ValueError(f"{source}: expected JSON lines, got no line")
    return Input(source, jobs, hashlib.sha256(content).hexdigest())


def _parse(
    line: bytes,
    number: int,
    index: int,
    tokenizer: Any,
    model: OPTConfig,
    config: GenerationConfig,
) -> Job:
    try:
        content = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"expected UTF-8 text, got {error.reason}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"expected a JSON object, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got {type(content).__name__}")
    unknown = sorted(content.keys() - set(_KEYS))
    if unknown:
        raise ValueError(f"expected the keys {', '.join(_KEYS)}, got {unknown[0]!r}")
    prompt = content.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"expected a prompt with text, got {prompt!r}")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("expected a prompt of whole characters") from None
    job_id = content.get("id", number)
    _check_id(job_id)
    own = {k: content[k] for k in ("max_new_tokens", "seed") if k in content}
    options = config.with_options(**own)
    tokens = tokenizer.encode(prompt).ids
    check_prompt(model, tokens, options.max_new_tokens)
    return Job(
        index=index,
        id=job_id,
        tokens=tokens,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        stream=0 if "seed" in own else index,
    )


def _check_id(job_id: Any) -> None:
    """Raises ValueError unless an output can hold it."""
    try:
        _json_line({"index": 0, "result": {"id": job_id}}).encode("utf-8")
    except (ValueError, RecursionError) as error:  # also of lone surrogates
        raise ValueError(f"expected an id that JSON can hold, got {error}") from error


def _json_line(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"


def check_prompt(model: OPTConfig, tokens: Sequence[int], max_new_tokens: int) -> None:
    """Raises ValueError unless the model has the tokens and positions for them."""
    if not tokens:
        raise ValueError(
            "expected a prompt with tokens, the tokenizer gave none for it"
        )
    check_length(model, len(tokens), max_new_tokens)
    largest = max(tokens)
    if largest >= model.vocab_size:
        raise ValueError(
            f"the tokenizer gave token {largest}, the model has {model.vocab_size}"
        )


def _fingerprint(model: OPT) -> str:
    """Of what is small in any layer, and of all of the first and the last one.

    All weights would take as long as reading the model again.
    """
    digest = hashlib.sha256()
    states = [nnx.state(layer) for layer in (model.layers[0], model.layers[-1])]
    ends = {id(leaf) for leaf in jax.tree.leaves(states)}
    for leaf in jax.tree.leaves(nnx.state(model)):
        if leaf.nbytes <= _SMALL_BYTES or id(leaf) in ends:
            digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _digest_of_tokens(jobs: list[Job]) -> str:
    tokens = json.dumps([list(job.tokens) for job in jobs])
    return hashlib.sha256(tokens.encode()).hexdigest()


def _batches(jobs: list[Job], batch: int) -> Iterator[list[Job]]:
    """Batches of similar lengths, longest first; the same for the same jobs."""
    longest_first = sorted(jobs, key=lambda j: (-len(j.tokens), -j.max_new_tokens))
    for start in range(0, len(jobs), batch):
        yield longest_first[start : start + batch]


def request_of(
    model: OPT, config: GenerationConfig, jobs: list[Job], size: int
) -> Request:
    """The request of some jobs, filled up to `size` rows."""
    filler = dataclasses.replace(jobs[-1], max_new_tokens=1)
    filled = [*jobs, *[filler] * (size - len(jobs))]
    token_ids, mask = pad_prompts([job.tokens for job in filled])
    rows = Rows(
        max_new_tokens=[job.max_new_tokens for job in filled],
        seeds=[job.seed for job in filled],
        streams=[job.stream for job in filled],
    )
    return make_request(model.config, token_ids, mask, config, rows)


def run_jobs(
    model: OPT,
    tokenizer: Any,
    config: GenerationConfig,
    jobs: list[Job],
    logprobs: bool,
    size: int,
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """What an output says of each job, in their order.

    Args:
      model: the model.
      tokenizer: its tokenizer.
      config: how all are continued.
      jobs: that are continued at once.
      logprobs: add the tokens and their log-probabilities.
      size: rows of the program that does it, as many as there are jobs or more.
    """
    request = request_of(model, config, jobs, size)
    tokens, scores, failed = run_request(model, request, logprobs)
    ends = end_ids(model.config, config.eos_token_id)
    for row, job in enumerate(jobs):
        new = tokens[row, : 0 if failed[row] else job.max_new_tokens]
        at = np.flatnonzero(np.isin(new, list(ends)))
        count = int(at[0]) + 1 if at.size else len(new)
        new_ids = new[:count].tolist()
        reason = FAILED if failed[row] else "stop" if at.size else "length"
        result = {
            "id": job.id,
            "text": "".join(stream_text(new_ids, tokenizer, job.tokens)),
            "new_tokens": count,
            "finish_reason": reason,
        }
        if logprobs:
            result["token_ids"] = new_ids
            result["logprobs"] = [round(float(s), 6) for s in scores[row, :count]]
        yield job, result


def _read_partial(partial: Path, header: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Results by index; cuts off a line that was not written to its end."""
    data = partial.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    try:
        found, *lines = [json.loads(line) for line in whole.splitlines()] or [None]
    except (ValueError, RecursionError):
        found, lines = None, []
    if found is None and not whole:
        return {}
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise ValueError(f"{partial}: expected what an interrupted run left")
    different = [key for key in header if found.get(key) != header[key]]
    if different:
        shown = [
            f"{key} {found.get(key)!r}, got {header[key]!r}"
            if key in ("batch", "dtype", "logprobs")
            else key
            for key in different
        ]
        if "options" in different:
            old, new = found.get("options") or {}, header["options"]
            names = [name for name in new if old.get(name) != new[name]]
            shown[different.index("options")] = f"options ({', '.join(names)})"
        raise ValueError(
            f"{partial}: a run can only be resumed as it was, expected the same "
            + "; ".join(shown)
        )
    for line in lines:
        match line:
            case {
                "index": int(),
                "result": {"id": _, "text": str(), "finish_reason": str()},
            }:
                continue
        raise ValueError(f"{partial}: expected what an interrupted run left")
    os.truncate(partial, len(whole))
    return {line["index"]: line["result"] for line in lines}


def _write(target: Path, results: list[dict[str, Any]]) -> None:
    target = _behind_links(target)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            for result in results:
                file.write(_json_line(result))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
