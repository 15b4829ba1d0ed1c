"""Result files as tables in Markdown."""

import json
import pathlib
import re
import textwrap
from collections.abc import Callable, Iterable

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
H100, H200 = "nvidia-h100-80gb-hbm3", "nvidia-h200"


def load(path: pathlib.Path) -> tuple[dict, list[dict]]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["environment"], content["results"]


def load_part(path: pathlib.Path, name: str) -> dict:
    """What a result file holds besides its results."""
    return json.loads(path.read_text(encoding="utf-8"))[name]


def newest(
    paths: Iterable[pathlib.Path],
    select: Callable[[dict, dict], tuple[tuple, dict] | None],
) -> tuple[dict, list[dict]]:
    """Results of several runs, by key; of those with one key the newest."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    runs.sort(key=lambda run: run["environment"]["date"])
    chosen: dict[tuple, tuple[dict, dict]] = {}
    for run in runs:
        for result in run["results"]:
            if found := select(run, result):
                chosen[found[0]] = found[1], run["environment"]
    used = sorted((facts for _, facts in chosen.values()), key=lambda f: f["date"])
    commits = dict.fromkeys(facts.get("commit", "unknown") for facts in used)
    facts = used[-1] | {"commit": " and ".join(commits)}
    return facts, [chosen[key][0] for key in sorted(chosen)]


def zeros(sparsity: float) -> str:
    return f"{sparsity:.0%}" if sparsity else "dense"


def table(columns: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Lines of Markdown."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns, *rows)]
    return [lines[0], "|---" * len(columns) + "|", *lines[1:]]


def captioned(caption: str, columns: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join([textwrap.fill(caption, 98), "", *table(columns, rows)])


def shape(result: dict) -> str:
    return f"{result['m']} x {result['k']}"


def origin(facts: dict) -> str:
    driver = f", driver {facts['driver']}" if "driver" in facts else ""
    date = facts["date"].split()[0]
    return f"jax {facts['jax']}{driver}, commit {facts['commit']}, {date}"


def gigabytes(count: int | None, digits: int = 1) -> str:
    return "" if count is None else f"{count / 1e9:.{digits}f}"


def replace(document: pathlib.Path, name: str, content: str) -> None:
    """Writes a section, which lies between two comments."""
    text = document.read_text(encoding="utf-8")
    pattern = rf"(<!-- {name}: begin[^\n]*-->\n).*?(<!-- {name}: end -->)"
    new, count = re.subn(
        pattern, lambda m: f"{m[1]}{content}\n{m[2]}", text, flags=re.DOTALL
    )
    if count != 1:
        raise SystemExit(
            f"expected one section {name!r} in {document.name}, found {count}"
        )
    document.write_text(new, encoding="utf-8")
