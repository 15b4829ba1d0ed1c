"""What the documentation holds: pages, their fenced blocks, the models they name."""

import dataclasses
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

from cli_support import byte_tokenizer
from flax import nnx

from flashjax.models import opt

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "models" / "opt" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
NOT_RUN = "<!-- not run: "


@dataclasses.dataclass
class Block:
    """A fenced block.

    Attributes:
      language: the word behind the fence.
      line: of the first line of its text, from 1.
      text: what is between the fences.
      not_run: whether a comment in front of it says that it cannot be run.
    """

    language: str
    line: int
    text: str
    not_run: bool


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a page in some languages."""
    found, opened, before = [], None, ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            if opened is None:
                language = line.strip().removeprefix("```")
                opened = Block(language, number + 1, "", NOT_RUN in before)
            else:
                found.append(opened)
                opened = None
        elif opened is not None:
            opened.text += line + "\n"
        if line.strip():
            before = line
    assert opened is None, f"{name(page)}:{opened and opened.line}: not closed"
    return [block for block in found if block.language in languages]


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command of a page."""
    for block in blocks(page, "console", "sh"):
        text = block.text.replace("\\\n", " ")
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                del words[0]  # a variable of the environment
            if words:
                yield words


def save_models(root: Path, names: Iterable[str]) -> None:
    """Stores a tiny OPT with a tokenizer under every name that pages use."""
    config = opt.OPTConfig(
        vocab_size=260,
        hidden_size=32,
        num_layers=1,
        ffn_size=64,
        num_heads=4,
        max_positions=512,
    )
    model = opt.OPT(config, rngs=nnx.Rngs(0))
    for name in names:
        opt.save_pretrained(model, byte_tokenizer(), root / name)
