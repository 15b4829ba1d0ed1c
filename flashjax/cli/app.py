"""The commands and their options; what they do is in a module each."""

import contextlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from flashjax.cli.bench import bench
from flashjax.cli.choices import CacheDtype, Dtype, Format, Implementation, Method
from flashjax.cli.errors import (
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    UsageError,
    reported,
)
from flashjax.cli.signals import ending_signals
from flashjax.user_files import user_cache

app = typer.Typer(
    name="flashjax",
    help="Sparse weights for JAX: generate text, prune models, look inside.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench, name="bench")

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
# Of options whose value may also come from the model's generation_config.json.
_FILE = "the model's, or "
Cache = Annotated[
    CacheDtype | None,
    typer.Option(
        help="Of keys and values, in half the memory.", show_default="--dtype"
    ),
]
# Options of info.
_OF_CONFIG = (
    "sparsity",
    "batch",
    "length",
    "prompt",
    "dtype",
    "cache_dtype",
    "devices",
    "memory",
)
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
    no_cache: Annotated[
        bool,
        typer.Option("--no-cache", help="Keep no compiled programs for later runs."),
    ] = False,
) -> None:
    # Errors of XLA, not its warnings: of timings while it tunes, say, which tell a user
    # nothing. JAX reads it when it is imported.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if no_cache:
        os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    else:
        _keep_compiled()


def _keep_compiled() -> None:
    """Lets JAX keep compiled programs, unless it was told where or not to."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = str(user_cache() / "jax")
    with contextlib.suppress(OSError):  # a home that cannot be written to
        os.makedirs(folder, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ["JAX_COMPILATION_CACHE_DIR"] = folder


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
    input: Annotated[
        Path | None,
        typer.Option(
            "--input",
            "-i",
            help='JSON lines {"prompt": ...}, with "id", "max_new_tokens" and "seed" '
            "if wanted; needs --output.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="JSON lines, in the order of --input."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted --output.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing --output.")
    ] = False,
    logprobs: Annotated[
        bool,
        typer.Option(
            "--logprobs", help="Log-probabilities, too, in --output or --json."
        ),
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            "-n",
            help="Tokens to generate.",
            show_default=f"{_FILE}64",
        ),
    ] = None,
    min_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens before which no text ends.", show_default=f"{_FILE}0"
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature", "-t", help="0 is greedy.", show_default=f"{_FILE}0"
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from the k likeliest tokens only.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw from the likeliest tokens of this probability only."),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            help="Above 1, tokens that were there get rarer.", show_default=f"{_FILE}1"
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws.")] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Dtype of the model; float32 expands it.")
    ] = Dtype.FLOAT16,
    cache_dtype: Cache = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Expand sparse weights when loading.")
    ] = False,
    implementation: Annotated[
        Implementation | None,
        typer.Option(help="Of the sparse product.", show_default="the best"),
    ] = None,
    batch: Annotated[
        int,
        typer.Option(
            "--batch", "-b", help="Prompts that are continued at once.", min=1
        ),
    ] = 8,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Print tokens as they come.",
            show_default="stream",
        ),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on after an end-of-text token.")
    ] = False,
    json: Json = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print nothing but the texts.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Continue prompts with a model.

    Options that are not given are those of the model's generation_config.json.
    """
    from flashjax.cli import generate as command

    options = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "eos_token_id": -1 if ignore_eos else None,
    }
    given = {name: v for name, v in options.items() if v is not None}
    common: dict[str, Any] = {
        "options": given,
        "dtype": dtype.value,
        "cache_dtype": cache_dtype.value if cache_dtype else None,
        "dense": dense,
        "implementation": implementation.value if implementation else None,
        "batch": batch,
        "quiet": quiet,
    }
    if implementation and (dense or dtype is Dtype.FLOAT32):
        raise UsageError(
            "--implementation: expected no --dense or --dtype float32 beside it, which "
            "leave no sparse layers"
        )
    if json and (stream or input or output):
        raise UsageError("--json: expected no --stream, --input or --output beside it")
    if str(input) == "-":
        raise UsageError("--input: expected a file, as /dev/stdin, got -")
    if str(output) == "-":
        raise UsageError(
            "--output: expected a file, got - (--json prints the results of --prompt "
            "and --file)"
        )
    if (input is None) != (output is None):
        raise UsageError("--input and --output: expected both, got one")
    if input is None or output is None:
        if resume or overwrite:
            raise UsageError("--resume, --overwrite: expected --input and --output")
        if logprobs and not json:
            raise UsageError("--logprobs: expected --json, or --input and --output")
        if not prompt and file is None:
            raise UsageError("expected --prompt, --file or --input, got none")
        command.check_options(given)
        command.run(
            model,
            prompts=prompt or [],
            file=file,
            stream=stream is not False,
            logprobs=logprobs,
            as_json=json,
            **common,
        )
        return
    if prompt or file:
        raise UsageError("--input: expected no --prompt or --file beside it")
    command.check_options(given)
    command.run_file(
        model,
        source=input,
        target=output,
        logprobs=logprobs,
        resume=resume,
        overwrite=overwrite,
        **common,
    )


@app.command()
@reported
def prune(
    folder: Annotated[str, typer.Argument(help="Model folder or hub name.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    sparsity: Annotated[
        float | None,
        typer.Option(
            "--sparsity", "-s", help="Share of zeros, 0 to 1.", show_default="0.6"
        ),
    ] = None,
    method: Annotated[
        Method, typer.Option(help="How the zeros are chosen.")
    ] = Method.MAGNITUDE,
    pattern: Annotated[
        str | None, typer.Option(help="n:m, as 2:4: keep n of m consecutive inputs.")
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            help="uniform, owl, or a JSON file of sparsities by name, as "
            '{"layers.0.fc1": 0.7}; others take --sparsity.'
        ),
    ] = "uniform",
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Text file, or folder of txt, jsonl, parquet, arrow files.",
            show_default="comes with FlashJAX",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of calibration text.")] = 128,
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a window.", show_default="the model's, at most 2048"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of windows.")] = 0,
    damping: Annotated[
        float | None, typer.Option(help="Of sparsegpt and alps.", show_default="theirs")
    ] = None,
    format: Annotated[
        Format, typer.Option(help="Sparse, or plain Hugging Face with zeros in place.")
    ] = Format.FLASHJAX,
    dtype: Annotated[
        Dtype, typer.Option(help="Dtype to store; float32 with --format hf.")
    ] = Dtype.FLOAT16,
    activations: Annotated[
        Dtype | None,
        typer.Option(help="Dtype of computation, or float32.", show_default="--dtype"),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="JSON file to write, of every matrix' error."),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace an existing model folder, and --report."
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run.")
    ] = False,
    json: Json = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print nothing.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Prune a model's linear layers, one layer after another.

    Embeddings, norms and biases stay dense. An interrupted run leaves OUT.partial.
    """
    from flashjax.cli import prune as command

    command.run(
        folder,
        out,
        options={
            "sparsity": 0.6 if sparsity is None and pattern is None else sparsity,
            "method": method.value,
            "pattern": pattern,
            "damping": damping,
            "format": format.value,
            "dtype": dtype.value,
            "activations": activations.value if activations else None,
            "overwrite": overwrite,
            "resume": resume,
        },
        budget=budget,
        calibration={
            "path": calibration,
            "samples": samples,
            "length": length,
            "seed": seed,
        },
        report=report,
        as_json=json,
        quiet=quiet,
    )


@app.command("eval")
@reported
def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder or hub name.")],
    text: Annotated[
        Path,
        typer.Option("--text", help="Text file, or folder of txt, jsonl, parquet..."),
    ],
    window: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a window.", show_default="the model's, at most 2048", min=2
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Tokens between windows' starts.", show_default="the window", min=1
        ),
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Dtype of the model; float32 expands it.")
    ] = Dtype.FLOAT16,
    json: Json = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print the perplexity alone.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Measure a model's perplexity on a text."""
    from flashjax.cli import eval as command

    command.run(
        model,
        text=text,
        window=window,
        stride=stride,
        dtype=dtype.value,
        json_output=json,
        quiet=quiet,
    )


@app.command()
@reported
def info(
    context: typer.Context,
    folder: Annotated[
        Path | None, typer.Argument(help="Model folder; without it, the system.")
    ] = None,
    json: Json = False,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every tensor of a folder.")
    ] = False,
    config: Annotated[
        str | None,
        typer.Option(help="Size (opt-66b) or folder whose memory is predicted."),
    ] = None,
    sparsity: Annotated[
        float,
        typer.Option("--sparsity", "-s", help="Of --config; 0 is dense.", min=0, max=1),
    ] = 0.0,
    batch: Annotated[
        int, typer.Option("--batch", "-b", help="Texts at once, of --config.", min=1)
    ] = 1,
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a text, prompt and new ones.",
            show_default="all positions",
            min=1,
        ),
    ] = None,
    prompt: Annotated[
        int | None,
        typer.Option(help="Tokens of a prompt.", show_default="--length", min=1),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of --config.")] = Dtype.FLOAT16,
    cache_dtype: Cache = None,
    devices: Annotated[
        int, typer.Option(help="Devices that share the model of --config.", min=1)
    ] = 1,
    memory: Annotated[
        float | None, typer.Option(help="GB of a device.", show_default="this one's")
    ] = None,
    debug: Debug = False,
) -> None:
    """Show the system and its kernels, or a model folder's sparsity and bytes.

    With --config, predict whether a model fits a GPU, before anything is loaded.
    """
    if config is not None:
        if folder is not None or tensors:
            raise UsageError("--config: expected no folder or --tensors beside it")
        from flashjax.cli import predict

        predict.run(
            config,
            sparsity=sparsity,
            batch=batch,
            length=length,
            prompt=prompt,
            dtype=dtype.value,
            cache_dtype=cache_dtype.value if cache_dtype else None,
            devices=devices,
            gigabytes=memory,
            as_json=json,
        )
        return
    _check_given(context, _OF_CONFIG, "--config")
    if folder is None:
        _check_given(context, ("tensors",), "a folder")
    from flashjax.cli import info as command

    if folder is None:
        command.show_system(json)
    else:
        command.show_folder(folder, json, tensors)


def _check_given(context: typer.Context, names: Iterable[str], needed: str) -> None:
    """Raises UsageError if an option was given that needs something beside it."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag}: expected {needed} beside it")


def main() -> None:
    """Runs the command line in a process that may go on afterwards.

    Raises:
      SystemExit: always, with the exit code.
    """
    with ending_signals():
        app(prog_name="flashjax")


def entry_point() -> None:
    """Runs the command line as all that its process does.

    Raises:
      SystemExit: always, but after a signal: the process has ended then.
    """
    try:
        main()
    except SystemExit as ended:
        if ended.code in (EXIT_INTERRUPTED, EXIT_TERMINATED):
            _leave(ended.code)
        raise


def _leave(code: int) -> NoReturn:
    """Ends the process at once.

    XLA may still compile in a thread of its own, which an orderly exit takes the memory
    from: a segmentation fault.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or no reader
            stream.flush()
    os._exit(code)
