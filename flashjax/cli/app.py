"""The commands and their options; what they do is in a module each."""

import enum
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from flashjax.cli.errors import reported

app = typer.Typer(
    name="flashjax",
    help="Sparse weights for JAX: generate text, prune models, look inside.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Half(enum.StrEnum):
    """Dtypes of sparse weights."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class Dtype(enum.StrEnum):
    """Dtypes of a model."""

    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


class Implementation(enum.StrEnum):
    """Implementations of the sparse product."""

    CPU = "cpu"
    CUDA = "cuda"
    XLA = "xla"


class Method(enum.StrEnum):
    """Ways to choose the weights that become zero."""

    MAGNITUDE = "magnitude"


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from flashjax import __version__

        typer.echo(f"flashjax {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    pass


@app.command()
@reported
def generate(
    model: Annotated[str, typer.Argument(help="Model folder or hub name.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="A prompt; can be given again."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", "-f", help="Text file with a prompt a line; - is stdin."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="Tokens to generate.")
    ] = 64,
    min_new_tokens: Annotated[
        int, typer.Option(help="Tokens before which no text ends.")
    ] = 0,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", help="0 is greedy.")
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from the k likeliest tokens only.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw from the likeliest tokens of this probability only."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    dtype: Annotated[
        Dtype, typer.Option(help="Dtype of the model; float32 expands it.")
    ] = Dtype.FLOAT16,
    dense: Annotated[
        bool, typer.Option("--dense", help="Expand sparse weights when loading.")
    ] = False,
    implementation: Annotated[
        Implementation | None,
        typer.Option(help="Of the sparse product.  [default: the best]"),
    ] = None,
    batch: Annotated[
        int, typer.Option("--batch", "-b", help="Prompts that are continued at once.")
    ] = 8,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Print tokens as they come.")
    ] = True,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after an end-of-text token.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print nothing but the texts.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Continue prompts with a model."""
    from flashjax.cli import generate as command

    command.run(
        model,
        prompts=prompt or [],
        file=file,
        options={
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": min_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "seed": seed,
            "eos_token_id": -1 if ignore_eos else None,
        },
        dtype=dtype.value,
        dense=dense,
        implementation=implementation.value if implementation else None,
        batch=batch,
        stream=stream,
        quiet=quiet,
    )


@app.command()
@reported
def prune(
    folder: Annotated[str, typer.Argument(help="Model folder or hub name.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    sparsity: Annotated[
        float, typer.Option("--sparsity", "-s", help="Share of zeros, 0 to 1.")
    ] = 0.6,
    method: Annotated[
        Method, typer.Option(help="How the zeros are chosen.")
    ] = Method.MAGNITUDE,
    dtype: Annotated[Half, typer.Option(help="Dtype to store.")] = Half.FLOAT16,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing model folder.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print nothing.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Prune a model's linear layers and store it sparse.

    Embeddings, norms and biases stay dense.
    """
    from flashjax.cli import prune as command

    command.run(
        folder,
        out,
        sparsity=sparsity,
        method=method.value,
        dtype=dtype.value,
        overwrite=overwrite,
        quiet=quiet,
    )


@app.command()
@reported
def info(
    folder: Annotated[
        Path | None, typer.Argument(help="Model folder; without it, the system.")
    ] = None,
    json: Json = False,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every tensor of a folder.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Show the system and its kernels, or a model folder's sparsity and bytes."""
    from flashjax.cli import info as command

    if folder is None:
        command.show_system(json)
    else:
        command.show_folder(folder, json, tensors)


def main() -> None:
    """Runs the command line."""
    # An ended process must clean up like an interrupted one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    app(prog_name="flashjax")
