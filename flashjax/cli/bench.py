"""``flashjax bench``: the options; what they do is in a module each."""

from pathlib import Path
from typing import Annotated

import typer

from flashjax.cli.choices import CacheDtype, Dtype
from flashjax.cli.errors import reported

bench = typer.Typer(
    help="Measure speed and memory with synthetic weights.", no_args_is_help=True
)


@bench.callback()
def _options() -> None:
    pass


@bench.command("generate")
@reported
def generate(
    model: Annotated[
        str, typer.Option(help="A size such as opt-30b, or a folder's configuration.")
    ] = "opt-125m",
    layers: Annotated[int, typer.Option(help="Fewer layers; 0: all.", min=0)] = 0,
    sparsity: Annotated[str, typer.Option(help="List; 0 is dense.")] = "0,0.6,0.8",
    batch: Annotated[str, typer.Option(help="List of prompts at once.")] = "1,8",
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1)] = 64,
    new: Annotated[int, typer.Option(help="Tokens to generate.", min=2)] = 64,
    dtype: Annotated[
        Dtype, typer.Option(help="Of the model; float32 of dense ones alone.")
    ] = Dtype.FLOAT16,
    cache_dtype: Annotated[
        CacheDtype | None,
        typer.Option(help="Of keys and values.", show_default="--dtype"),
    ] = None,
    repetitions: Annotated[int, typer.Option(help="Of every timing.", min=1)] = 5,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the results.")
    ] = Path("results"),
    name: Annotated[str, typer.Option(help="Stem of the files.")] = "generate",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.")
    ] = False,
) -> None:
    """Time generation with an OPT of random weights, dense beside sparse.

    Writes NAME-DEVICE.json and, where matplotlib is installed, NAME-DEVICE.png.
    """
    from flashjax.cli import bench_generate as command

    command.run(
        model,
        layers=layers,
        sparsities=command.numbers("--sparsity", sparsity, float),
        batches=command.numbers("--batch", batch, int),
        prompt=prompt,
        new=new,
        dtype=dtype.value,
        cache_dtype=cache_dtype.value if cache_dtype else None,
        repetitions=repetitions,
        out=out,
        name=name,
        as_json=json,
    )
