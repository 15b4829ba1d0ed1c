"""Trains a small OPT on books, prunes it and saves it as a model folder.

    python examples/train_demo.py --text austen.txt --text shakespeare.txt

Writes the folder, and the figures and the loss curve of the run into docs/.
Everything is set in demo_training/settings.py; the options change single values.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from demo_training import pruning, report, text
from demo_training.model import ModelFunctions, Params, negative_log_likelihood
from demo_training.progress import phase_progress
from demo_training.settings import Settings, settings
from demo_training.training import Corpus, Phase, Result, dispatches, run_phase
from rich.console import Console
from tokenizers import Tokenizer

from flashjax.atomic_folder import atomic_folder
from flashjax.models import opt

HERE = Path(__file__).resolve().parent
PROMPTS = (
    "It is a truth universally acknowledged, that",
    "Emma had never been more",
    "ROMEO.\nO,",
    "And the LORD said unto",
)
EXCERPT = "heldout.txt"
_VERSIONS = ("jax", "flax", "optax", "tokenizers", "numpy")


class Run:
    """One run: reads the text, trains both phases, measures and saves.

    Args:
      settings: what to do.
      texts: UTF-8 files, one a book or collection.
      console: where progress goes.

    Raises:
      ValueError: a text is unsuitable or too short for the settings.
      OSError: a text cannot be read.
    """

    def __init__(self, settings: Settings, texts: list[Path], console: Console):
        self.settings = settings
        self.console = console
        self.seconds: dict[str, float] = {}
        self.history: list[dict[str, Any]] = []
        self.digests = {
            path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in texts
        }
        started = time.perf_counter()
        self.books = text.read_books(texts, settings.validation, settings.held_out)
        parts = [book.train for book in self.books.values()]
        self.tokenizer = text.train_tokenizer(parts, settings.vocab_size)
        self.excerpt = text.excerpt(self.books, settings.excerpt_size)
        self.corpus = Corpus.create(
            self._join([book.train for book in self.books.values()]),
            self._join([book.validation for book in self.books.values()]),
            newline=self.tokenizer.token_to_id("\u010a"),
        )
        self.seconds["text"] = time.perf_counter() - started
        self.functions = ModelFunctions(settings.model_config(), settings.batch_size)
        count, chunk = dispatches(
            self.corpus, settings.max_positions, settings.batch_size, settings.chunk
        )
        self.steps_per_epoch = count * chunk
        on_gpu = jax.default_backend() == "gpu"
        self.dtype = jnp.bfloat16 if on_gpu else jnp.float32

    def _join(self, parts: list[str]) -> np.ndarray:
        """Token ids of texts one after the other, each ended by `</s>`."""
        end = np.array([text.BOS_ID], np.int32)
        ids = [piece for p in parts for piece in (text.encode(self.tokenizer, p), end)]
        return np.concatenate(ids)

    def train_dense(self) -> Params:
        """Trains with every dropout rate; validation text picks the result."""
        s = self.settings
        started = time.perf_counter()
        results = []
        for rate in s.dropout:
            phase = Phase("dense", s.epochs, s.learning_rate, s.weight_decay, rate)
            name = f"dense, dropout {rate:g}"
            results.append(self._run(name, phase, self.functions.init(s.seed)))
        best = min(range(len(results)), key=lambda i: results[i].validation_loss)
        for index, phase in enumerate(self.history):
            phase["kept"] = index == best
        self.seconds["dense"] = time.perf_counter() - started
        return results[best].params

    def prune(self, dense: Params) -> Params:
        """Prunes gradually, then trains what is left."""
        s = self.settings
        started = time.perf_counter()
        phase = Phase(
            "pruned",
            s.prune_epochs + s.recover_epochs,
            s.prune_learning_rate,
            s.weight_decay,
            s.prune_dropout,
            prune_epochs=s.prune_epochs,
            sparsity=s.sparsity,
            distill=s.distill,
        )
        result = self._run("pruned", phase, dense, teacher=dense)
        self.seconds["pruned"] = time.perf_counter() - started
        return result.params

    def _run(
        self, name: str, phase: Phase, params: Params, teacher: Params | None = None
    ) -> Result:
        s = self.settings
        started = time.perf_counter()
        steps = self.steps_per_epoch * phase.epochs
        with phase_progress(self.console, name, steps, phase.epochs) as callbacks:
            advance, show = callbacks
            result = run_phase(
                self.functions,
                self.corpus,
                phase,
                params,
                batch_size=s.batch_size,
                chunk=s.chunk,
                dtype=self.dtype,
                seed=s.seed + 1,
                teacher=teacher,
                report=show,
                advance=advance,
            )
        seconds = time.perf_counter() - started
        self.console.print(
            f"{name}: {steps} steps in {seconds:.1f} s, {1e3 * seconds / steps:.1f} ms "
            "a step; best perplexity on validation text "
            f"{math.exp(result.validation_loss):.2f}",
            highlight=False,
        )
        records = result.records
        self.history.append(
            {
                "name": phase.name,
                "dropout": phase.dropout,
                "kept": True,
                "train_loss": [round(r.train_loss, 4) for r in records],
                "validation_loss": [round(r.validation_loss, 4) for r in records],
                "sparsity": [round(r.sparsity, 4) for r in records],
            }
        )
        return result

    def save(self, params: Params, folder: Path) -> None:
        """Saves parameters as float16 in the Hugging Face layout."""
        model = self.functions.build(params, jnp.float16)
        opt.save_pretrained(model, self.tokenizer, folder, overwrite=True)

    def measure(self, dense: Params, pruned: Params | None) -> dict[str, Any]:
        """Returns the record of the run, without samples.

        Args:
          dense: parameters as they would be read from a folder.
          pruned: likewise; None if the model stays dense.
        """
        models = (
            {"dense": dense} if pruned is None else {"dense": dense, "pruned": pruned}
        )
        final = models.get("pruned", dense)
        names = self.functions.prunable()
        nll = jax.jit(
            lambda params, ids: negative_log_likelihood(
                self.functions, params, ids, jnp.float32
            )
        )
        parts = {name: book.held_out for name, book in self.books.items()}
        ids = {name: text.encode(self.tokenizer, part) for name, part in parts.items()}
        sizes = {name: len(part) for name, part in ids.items()}
        tokens = sum(sizes.values())
        record: dict[str, Any] = {
            "held_out": {
                "description": f"the last {self.settings.held_out:.0%} of every text; "
                "neither the model nor the tokenizer has seen it.",
                "tokens": tokens,
                "books": {name: {"tokens": size} for name, size in sizes.items()},
                "excerpt": {"file": EXCERPT},
            }
        }
        held_out = record["held_out"]
        excerpt_ids = text.encode(self.tokenizer, self.excerpt)
        held_out["excerpt"]["tokens"] = len(excerpt_ids)
        size = sum(len(part.encode()) for part in parts.values())
        for kind, params in models.items():
            losses = {name: float(nll(params, part)) for name, part in ids.items()}
            total = sum(losses[name] * sizes[name] for name in ids)
            record[f"{kind}_perplexity"] = math.exp(total / tokens)
            held_out[f"{kind}_bits_per_byte"] = total / size / math.log(2)
            for name, loss in losses.items():
                held_out["books"][name][f"{kind}_perplexity"] = math.exp(loss)
            loss = float(nll(params, excerpt_ids))
            held_out["excerpt"][f"{kind}_perplexity"] = math.exp(loss)
        return record | {
            "sparsity": pruning.sparsity(final, names),
            "parameters": sum(p.size for p in final.values()),
            "nonzero_parameters": sum(
                int(np.count_nonzero(np.asarray(p))) for p in final.values()
            ),
            "training_tokens": len(self.corpus.train),
            "settings": dataclasses.asdict(self.settings),
            "texts": self.digests,
            "device": jax.devices()[0].device_kind,
            "versions": {name: importlib.metadata.version(name) for name in _VERSIONS},
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
            "history": self.history,
        }


def write_samples(
    model: opt.OPT, tokenizer: Tokenizer, new_tokens: int, seed: int
) -> list[dict[str, str]]:
    """Continues the prompts (temperature 0.8, the 40 likeliest tokens)."""
    samples = []
    for prompt in PROMPTS:
        ids = np.asarray([tokenizer.encode(prompt).ids], np.int32)
        new = min(new_tokens, model.config.max_positions - ids.shape[1])
        if new < 1:
            continue
        out = opt.generate(
            model, ids, max_new_tokens=new, temperature=0.8, top_k=40, seed=seed
        )
        samples.append({"prompt": prompt, "text": tokenizer.decode(out[0].tolist())})
    return samples


def main(
    texts: Annotated[
        list[Path], typer.Option("--text", help="UTF-8 text file; give several.")
    ],
    out: Annotated[Path, typer.Option(help="Model folder to write.")] = (
        HERE / "demo-opt"
    ),
    docs: Annotated[
        Path | None,
        typer.Option(help="Folder whose demo-model.md and images are updated."),
    ] = None,
    dense_out: Annotated[
        Path | None, typer.Option(help="Also save the dense model, here.")
    ] = None,
    no_prune: Annotated[
        bool, typer.Option("--no-prune", help="Write the dense model to --out.")
    ] = False,
    preset: Annotated[str, typer.Option(help="demo, small or tiny.")] = "demo",
    dropout: Annotated[
        list[float] | None,
        typer.Option(help="Several: the best on the validation text is kept."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Dense epochs.")] = None,
    prune_epochs: Annotated[int | None, typer.Option()] = None,
    recover_epochs: Annotated[int | None, typer.Option()] = None,
    learning_rate: Annotated[float | None, typer.Option()] = None,
    prune_learning_rate: Annotated[float | None, typer.Option()] = None,
    weight_decay: Annotated[float | None, typer.Option()] = None,
    prune_dropout: Annotated[float | None, typer.Option()] = None,
    distill: Annotated[float | None, typer.Option()] = None,
    sparsity: Annotated[float | None, typer.Option()] = None,
    batch_size: Annotated[int | None, typer.Option()] = None,
    hidden: Annotated[int | None, typer.Option()] = None,
    layers: Annotated[int | None, typer.Option()] = None,
    ffn: Annotated[int | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option()] = None,
) -> None:
    """Trains a small OPT on books, prunes it and saves it as a model folder."""
    console = Console(soft_wrap=True)
    try:
        chosen = settings(
            preset,
            dropout=tuple(dropout) if dropout else None,
            epochs=epochs,
            prune_epochs=prune_epochs,
            recover_epochs=recover_epochs,
            learning_rate=learning_rate,
            prune_learning_rate=prune_learning_rate,
            weight_decay=weight_decay,
            prune_dropout=prune_dropout,
            distill=distill,
            sparsity=sparsity,
            batch_size=batch_size,
            hidden_size=hidden,
            num_layers=layers,
            ffn_size=ffn,
            seed=seed,
        )
        if no_prune and (docs is not None or dense_out is not None):
            raise ValueError("--no-prune goes with neither --docs nor --dense-out")
        record = train(chosen, texts, out, dense_out, console, prune=not no_prune)
        if docs is not None:
            report.plot(record, docs / "images" / "demo-loss.png")
            report.update_page(docs / "demo-model.md", record)
    except (ValueError, OSError, FloatingPointError) as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False)
        raise typer.Exit(1) from None


def train(
    settings: Settings,
    texts: list[Path],
    out: Path,
    dense_out: Path | None,
    console: Console,
    *,
    prune: bool = True,
) -> dict[str, Any]:
    """Does a whole run; `out` appears at its end or not at all.

    Args:
      settings: of the run.
      texts: UTF-8 files.
      out: folder of the pruned model.
      dense_out: folder of the dense model too, or None.
      console: where progress goes.
      prune: whether to prune; otherwise `out` is the dense model's.

    Returns:
      The record that was saved as `training.json`.

    Raises:
      ValueError: unsuitable text, or a folder that may not be replaced.
      OSError: a text cannot be read or a folder not be written.
      FloatingPointError: the training diverged.
    """

    def say(message: str) -> None:
        console.print(message, highlight=False, markup=False)

    say(json.dumps(dataclasses.asdict(settings)))
    with atomic_folder(out, overwrite=True) as temporary:
        run = Run(settings, texts, console)
        say(
            f"{len(run.corpus.train):,} tokens to train on, tokenized in "
            f"{run.seconds['text']:.0f} s; {jax.devices()[0].device_kind}, "
            f"{jnp.dtype(run.dtype).name}, attention by {run.functions.attention}"
        )
        dense = run.train_dense()
        if dense_out is not None:
            run.save(dense, dense_out)
        run.save(run.prune(dense) if prune else dense, temporary)
        # Measured is what the folders hold: weights rounded to float16.
        dense = {n: p.astype(jnp.float16).astype(jnp.float32) for n, p in dense.items()}
        # Their names are those of the trained parameters, q, k and v apart.
        model, _ = opt.from_pretrained(
            temporary, dtype=jnp.float32, sparse=False, fuse_qkv=False
        )
        saved = run.functions.parameters(model)
        record = run.measure(dense, saved if prune else None)
        record["samples"] = write_samples(model, run.tokenizer, 100, settings.seed)
        (temporary / EXCERPT).write_text(run.excerpt, encoding="utf-8")
        content = json.dumps(record, indent=1, ensure_ascii=False)
        (temporary / "training.json").write_text(content + "\n", encoding="utf-8")
    for sample in record["samples"]:
        say(f"\n{sample['text']}")
    change = ""
    if prune:
        ratio = record["pruned_perplexity"] / record["dense_perplexity"]
        change = f", pruned {record['pruned_perplexity']:.2f} ({ratio - 1:+.1%})"
    say(
        f"\n{out}: {record['parameters']:,} parameters, {record['sparsity']:.1%} zeros "
        "in the matrices that are pruned; held-out perplexity dense "
        f"{record['dense_perplexity']:.2f}{change}; seconds {record['seconds']}"
    )
    return record


if __name__ == "__main__":
    typer.run(main)
