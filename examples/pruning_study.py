"""Measures what pruning costs: perplexity against sparsity, for every method.

    python examples/train_demo.py --no-prune --text book.txt --out dense
    python examples/pruning_study.py --model dense --text book.txt --docs docs

Prunes the model in one shot with every method, budget and pattern, fine-tunes some of
the results, and measures the perplexity of the last 5% of the texts, which neither
calibration nor fine-tuning sees (nor train_demo.py). Writes a JSON of the run, and with
--docs the tables of pruning.md and their plot. An interrupted run goes on where it
stopped.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from study.cells import Cell, cells
from study.measure import Settings, Study
from study.report import plot, update_page

from flashjax import prune
from flashjax.cli.environment import save_results
from flashjax.cli.progress import progress_bar

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TUNED_SPARSITIES = (0.6, 0.8, 0.9)


def run(study: Study, chosen: list[Cell], *, quiet: bool = False) -> dict[str, Any]:
    """Measures the cells of a study.

    Returns:
      Its settings, the model, and a row for each cell.
    """
    rows = []
    with progress_bar(disable=quiet) as advance:
        for done, cell in enumerate(chosen):
            advance(cell.name, done, len(chosen))
            rows.append(study.measure(cell))
    return {"settings": study.facts, "model": study.model, "rows": rows}


def known(study: Study, chosen: list[Cell]) -> list[Cell]:
    """Returns the cells that an earlier run has measured.

    Raises:
      ValueError: the dense model is not among them.
    """
    found = [cell for cell in chosen if study.known(cell)]
    if chosen[0] not in found:
        raise ValueError("expected a study that has measured something, got none")
    return found


def training_facts(folder: Path) -> dict[str, Any]:
    """How train_demo.py trained a model; nothing for one from elsewhere."""
    path = folder / "training.json"
    if not path.is_file():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    phases = [phase for phase in record["history"] if phase["name"] == "dense"]
    return {
        "device": record["device"],
        "training_tokens": record["training_tokens"],
        "epochs": len(phases[0]["train_loss"]),
        "parameters": record["parameters"],
        "seconds": record["seconds"]["dense"],
        "texts": sorted(record["texts"]),
    }


def main(
    model: Annotated[Path, typer.Option(help="Folder of the dense model.")],
    texts: Annotated[
        list[Path], typer.Option("--text", help="UTF-8 text file; give several.")
    ],
    docs: Annotated[
        Path | None,
        typer.Option(help="Folder whose pruning.md and images are updated."),
    ] = None,
    results: Annotated[Path, typer.Option(help="Folder of the JSON.")] = (
        ROOT / "benchmarks" / "results"
    ),
    work: Annotated[Path, typer.Option(help="Folder for what is known so far.")] = (
        ROOT / "build" / "pruning-study"
    ),
    methods: Annotated[
        list[str] | None, typer.Option("--method", help="Give several; default all.")
    ] = None,
    sparsities: Annotated[
        list[float] | None, typer.Option("--sparsity", help="Default 0.3 to 0.9.")
    ] = None,
    fine_tune_methods: Annotated[
        list[str] | None,
        typer.Option(
            "--fine-tune-method", help="Whose results are fine-tuned; default alps."
        ),
    ] = None,
    fine_tune_sparsities: Annotated[
        list[float] | None,
        typer.Option("--fine-tune-sparsity", help="Default 0.6, 0.8, 0.9."),
    ] = None,
    fine_tune_steps: Annotated[
        int, typer.Option(min=0, help="0: no fine-tuning.")
    ] = 500,
    batch: Annotated[int, typer.Option(min=1, help="Of fine-tuning.")] = Settings.batch,
    learning_rate: Annotated[float, typer.Option()] = Settings.learning_rate,
    samples: Annotated[
        int, typer.Option(min=1, help="Windows of calibration text.")
    ] = Settings.samples,
    held_out: Annotated[
        int, typer.Option(min=1000, help="Characters of held-out text.")
    ] = Settings.held_out,
    seed: Annotated[int, typer.Option(min=0)] = Settings.seed,
    report_only: Annotated[
        bool,
        typer.Option("--report-only", help="Report what is known, measure no more."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet")] = False,
) -> None:
    """Measures what pruning costs: perplexity against sparsity, for every method."""
    try:
        chosen = cells(
            methods or list(prune.METHODS),
            sparsities or SPARSITIES,
            fine_tune_methods or ["alps"],
            fine_tune_sparsities or TUNED_SPARSITIES,
            fine_tune_steps,
        )
        settings = Settings(samples, held_out, batch, learning_rate, seed)
        study = Study(model, texts, work, settings)
        training = training_facts(model)
        wanted = len(chosen)
        if report_only:
            chosen = known(study, chosen)
        record = {"training": training, "missing": wanted - len(chosen)}
        record |= run(study, chosen, quiet=quiet)
        path = save_results(results, "pruning-study", record)
        if docs is not None:
            record = json.loads(path.read_text(encoding="utf-8"))
            plot(record, docs / "images" / "pruning-study.png")
            update_page(docs / "pruning.md", record)
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)
