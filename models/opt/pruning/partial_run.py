"""What an unfinished run leaves, so that another one can go on with it.

Beside the folder OUT to be written lies OUT.partial::

    run.json                 the arguments; another run must have the same
    budgets.json             sparsities by name, once they are known
    layer-00000.json         what was done to a layer
    model/                   what becomes OUT; each finished part is a file of its own
"""

import contextlib
import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from safetensors import SafetensorError

from flashjax.atomic_folder import (
    check_target,
    disk_full_reason,
    replace_folder,
    sync_files,
)
from flashjax.checkpoint import (
    INDEX_NAME,
    WEIGHTS_NAME,
    CheckpointError,
    read_json,
)
from flashjax.checkpoint_files import merge_files, read_file, write_file
from flashjax.file_lock import try_lock
from flashjax.user_files import write_json

from .result import CannotPruneError

# Weights up to this size end up in one file.
_MERGED_BYTES = 256 << 20
_UNFINISHED = "unfinished.safetensors"


@dataclasses.dataclass
class PartialRun:
    """The folder of an unfinished run.

    Attributes:
      folder: OUT.partial.
      parts: number of files that the weights are written to: the layers in their order,
        and last the rest.
    """

    folder: Path
    parts: int

    @property
    def model(self) -> Path:
        """The folder that becomes the output."""
        return self.folder / "model"

    @property
    def finished_parts(self) -> int:
        """How many parts are finished; they are written in order."""
        if (self.model / WEIGHTS_NAME).exists():
            return self.parts
        there = [(self.model / self._part(i)).exists() for i in range(self.parts)]
        return [*there, False].index(False)

    def read_part(self, index: int) -> dict[str, np.ndarray]:
        """The tensors of a finished part by name, dense."""
        return read_file(self.model / self._part(index))

    def write_part(
        self,
        index: int,
        dense: Mapping[str, np.ndarray],
        sparse: Mapping[str, np.ndarray],
        record: Mapping[str, Any],
    ) -> None:
        """Writes a part, as a whole or not at all.

        Args:
          index: of the part.
          dense: tensors to store as they are.
          sparse: weights to store in the sparse form.
          record: JSON to keep beside it.
        """
        temporary = self.folder / _UNFINISHED
        stored_bytes, names = write_file(temporary, dense, sparse)
        content = {"bytes": stored_bytes, "tensors": names, **record}
        self.write_json(f"layer-{index:05}.json", content)
        temporary.replace(self.model / self._part(index))

    def record(self, index: int) -> dict[str, Any]:
        """The JSON kept beside a part."""
        return read_json(self.folder / f"layer-{index:05}.json")

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file, as a whole or not at all."""
        write_json(self.folder / name, content)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Reads a JSON file that may not be there yet."""
        return read_json(self.folder / name) if (self.folder / name).exists() else None

    def finish(self, out: Path, files: Mapping[str, bytes], overwrite: bool) -> int:
        """Makes the folder to be written of the finished parts.

        Args:
          out: that folder.
          files: what it holds beside the weights, by name.
          overwrite: replace an existing model folder.

        Returns:
          Bytes of all tensors as stored.
        """
        records = [self.record(i) for i in range(self.parts)]
        stored_bytes = sum(record["bytes"] for record in records)
        paths = [self.model / self._part(i) for i in range(self.parts)]
        whole = self.model / WEIGHTS_NAME
        if whole.exists() or stored_bytes <= _MERGED_BYTES:
            if not whole.exists():
                temporary = self.folder / _UNFINISHED
                merge_files(paths, temporary)
                temporary.replace(whole)
            for path in paths:
                path.unlink(missing_ok=True)
        else:
            weight_map = {
                name: path.name
                for path, record in zip(paths, records, strict=True)
                for name in record["tensors"]
            }
            index = {
                "metadata": {"total_size": stored_bytes},
                "weight_map": dict(sorted(weight_map.items())),
            }
            content = json.dumps(index, indent=2) + "\n"
            (self.model / INDEX_NAME).write_text(content, encoding="utf-8")
        for name, data in files.items():
            (self.model / name).write_bytes(data)
        sync_files(self.model)
        check_target(out, overwrite)
        replace_folder(self.model, out)
        shutil.rmtree(self.folder, ignore_errors=True)
        return stored_bytes

    def _part(self, index: int) -> str:
        return f"model-{index + 1:05}-of-{self.parts:05}.safetensors"


@contextlib.contextmanager
def partial_run(
    out: Path,
    arguments: Mapping[str, Any],
    parts: int,
    *,
    resume: bool,
    overwrite: bool,
) -> Iterator[PartialRun]:
    """Starts a run, or goes on with one.

    When the block fails, the finished parts stay for `resume`, unless the same
    arguments would fail again (CannotPruneError).

    Args:
      out: the folder to be written.
      arguments: all that the result depends on, as JSON.
      parts: see PartialRun.
      resume: go on with an unfinished run, if there is one.
      overwrite: out may be an existing model folder.

    Yields:
      The run.

    Raises:
      CheckpointError: out exists or cannot be made; there is an unfinished run but
        resume is False, or it had other arguments, or it is still running; the disk is
        full.
    """
    check_target(out, overwrite)
    run = PartialRun(out.with_name(f"{out.name}.partial"), parts)
    found = os.path.lexists(run.folder)
    with _open_lock(run) if found else _make(run, out, arguments) as lock:
        if found:
            # First, as what a run is writing is not unfinished.
            if not try_lock(lock):
                raise CheckpointError(f"{run.folder}: another run is writing there")
            _check_unfinished(run, arguments, resume)
        try:
            yield run
        except BaseException as error:
            _give_up(run, out, error)
            raise


def _open_lock(run: PartialRun) -> TextIO:
    try:
        return open(run.folder / "run.json", "r+", encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{run.folder}: expected nothing or an unfinished run, got something else"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{run.folder}: {error.strerror}") from error


def _check_unfinished(
    run: PartialRun, arguments: Mapping[str, Any], resume: bool
) -> None:
    if not resume:
        layers = min(run.finished_parts, run.parts - 1)
        raise CheckpointError(
            f"{run.folder} holds an unfinished run ({layers} of {run.parts - 1} layers "
            "done): go on with it by resume, or delete that folder to start anew"
        )
    try:
        before = read_json(run.folder / "run.json")
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):
            raise
        raise CheckpointError(
            f"{error}; this run cannot be resumed: delete {run.folder} to start anew"
        ) from error
    # As JSON gives it back.
    now = json.loads(json.dumps(dict(arguments)))
    different = [
        f"{name} was {before.get(name)!r:.80}, is {now.get(name)!r:.80}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if different:
        raise CheckpointError(
            f"{run.folder}: expected the arguments of the unfinished run, but "
            f"{'; '.join(different)}"
        )


def _make(run: PartialRun, out: Path, arguments: Mapping[str, Any]) -> TextIO:
    """Makes the folder of a run, and locks it before others see it."""
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        (temporary / "model").mkdir(parents=True)
        content = json.dumps(dict(arguments), indent=1) + "\n"
        (temporary / "run.json").write_text(content, encoding="utf-8")
        lock = (temporary / "run.json").open("r+", encoding="utf-8")
        try_lock(lock)
        temporary.rename(run.folder)
        return lock
    except OSError as error:
        raise CheckpointError(
            f"{out}: expected a folder that can be made, got: {error.strerror}"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _give_up(run: PartialRun, out: Path, error: BaseException) -> None:
    """Removes what is of no use any more, and says what is left on a full disk."""
    full = None
    if isinstance(error, OSError | SafetensorError):
        full = disk_full_reason(error, out)
    done = run.finished_parts
    if not done or (isinstance(error, CannotPruneError) and done < run.parts):
        shutil.rmtree(run.folder, ignore_errors=True)
    if full is None:
        return
    left = "nothing was left behind"
    if done:
        left = (
            f"{done} of {run.parts} parts are in {run.folder}; make room and go on by "
            "resume"
        )
    raise CheckpointError(f"{out}: not saved, {left}: {full}") from error
