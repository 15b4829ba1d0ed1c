"""``flashjax generate``."""

import io
import json
import os
import shutil
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from cli_support import assert_error, run_process
from opt_folders import edit_config

from flashjax.cli import generate as command
from flashjax.models import opt
from flashjax.models.opt import batch_file

PROMPTS = ["hello", "a longer prompt", "x"]


def expected_texts(folder, prompts, *, dtype=jnp.float16, **options):
    model, tokenizer = opt.from_pretrained(folder, dtype=dtype)
    options = {"max_new_tokens": 8, "eos_token_id": -1} | options
    texts = []
    for prompt in prompts:
        ids = np.asarray([tokenizer.encode(prompt).ids])
        out = np.asarray(opt.generate(model, ids, **options))[0, ids.shape[1] :]
        texts.append(prompt + tokenizer.decode(out.tolist()))
    return texts


def generate(cli, folder, *args):
    return cli("generate", folder, "-n", 8, "--ignore-eos", *args)


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_prompt(cli, sparse_folder, stream):
    result = generate(cli, sparse_folder, "-p", "hello", "--quiet", stream)
    assert (result.code, result.err) == (0, "")
    assert result.out == expected_texts(sparse_folder, ["hello"])[0] + "\n"


def test_cache_dtype(cli, sparse_folder):
    cache = ("--cache-dtype", "float8_e4m3fn")
    result = generate(cli, sparse_folder, "-p", "hello", "--quiet", *cache)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("hello")
    wrong = generate(cli, sparse_folder, "-p", "hello", "--cache-dtype", "int8")
    assert wrong.code == 2
    assert "float8_e4m3fn" in wrong.err


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_several_prompts(cli, sparse_folder, stream, batch):
    args = [a for p in PROMPTS for a in ("--prompt", p)]
    result = generate(cli, sparse_folder, *args, "-q", stream, "--batch", batch)
    texts = expected_texts(sparse_folder, PROMPTS)
    assert result.out == "".join(f"{text}\n" for text in texts)
    result = generate(cli, sparse_folder, *args, stream, "--batch", batch)
    blocks = [f"[{i}/3]\n{text}\n" for i, text in enumerate(texts, 1)]
    assert result.out.startswith("\n".join(blocks) + "\ndevice:")


def test_report(cli, sparse_folder):
    result = generate(cli, sparse_folder, "-p", "hello")
    assert result.code == 0
    assert "implementation cpu" in result.out
    assert "tokens/s (8 tokens in" in result.out
    assert "8 layers, 70.0% zeros" in result.out  # q, k and v are one
    assert "131.07 kB dense" in result.out


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--dense"], "no sparse layers"),
        (["--dtype", "float32"], "no sparse layers"),
        (["--dtype", "bfloat16"], "70.0% zeros"),
        (["--implementation", "xla"], "implementation xla"),
        (["--implementation", "cpu"], "implementation cpu"),
    ],
)
def test_variants(cli, sparse_folder, options, line):
    result = generate(cli, sparse_folder, "-p", "hello", *options)
    assert result.code == 0, result.err
    assert line in result.out


def test_sampling_options(cli, sparse_folder):
    args = ("-p", "hello", "-q", "-t", 0.9, "--top-k", 20, "--top-p", 0.9)
    result = generate(cli, sparse_folder, *args, "--seed", 5)
    options = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 5}
    expected = expected_texts(sparse_folder, ["hello"], **options)
    assert result.out == expected[0] + "\n"
    other = generate(cli, sparse_folder, *args, "--seed", 6)
    assert other.out != result.out


def test_stops_at_the_end_token():
    assert list(command.until_end([5, 6, 2, 7], {2})) == [5, 6, 2]
    assert list(command.until_end([5, 6], set())) == [5, 6]


def test_file(cli, sparse_folder, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("hello\n\n  a longer prompt  \r\nx")
    result = generate(cli, sparse_folder, "--file", path, "-q")
    for text in expected_texts(sparse_folder, PROMPTS):
        assert text in result.out


def test_a_prompt_may_hold_other_separators(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a\N{LINE SEPARATOR}b\N{NEXT LINE}c\x0cd\ne\r\nf\rg", newline="")
    prompts = command.read_prompts(path)
    assert prompts == ["a\N{LINE SEPARATOR}b\N{NEXT LINE}c\x0cd", "e", "f", "g"]


def test_stdin(cli, sparse_folder, monkeypatch):
    stdin = SimpleNamespace(buffer=io.BytesIO(b"hello\n"))
    monkeypatch.setattr(sys, "stdin", stdin)
    result = generate(cli, sparse_folder, "--file", "-", "-q")
    assert result.out == expected_texts(sparse_folder, ["hello"])[0] + "\n"


def test_markup_is_not_interpreted(cli, sparse_folder):
    prompt = "[bold]x[/]\t:smile:"
    result = generate(cli, sparse_folder, "-p", prompt, "-q")
    assert result.out == expected_texts(sparse_folder, [prompt])[0] + "\n"


def test_bad_folders(cli, bad_folder):
    folder, message = bad_folder
    assert_error(generate(cli, folder, "-p", "hello"), message)


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["-p", ""], ["expected prompts with text, got an empty one"]),
        (["-p", "x", "-p", "\udcff"], ["expected UTF-8 text in prompt 2"]),
        (["-p", "x" * 70], ["64 positions", "71 tokens"]),
        (["-p", "x", "-n", "1000"], ["64 positions", "max_new_tokens=1000"]),
        (["-p", "x", "-n", "8", "--implementation", "cuda"], ["'cuda' cannot run"]),
    ],
)
def test_bad_options(cli, sparse_folder, options, messages):
    assert_error(cli("generate", sparse_folder, *options), *messages)


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["-n", "-1"], ["max_new_tokens", "got -1"]),
        (["--min-new-tokens", "-1"], ["min_new_tokens", "got -1"]),
        (["-n", "2", "--min-new-tokens", "3"], ["max_new_tokens=2, got 3"]),
        (["-t", "-1"], ["temperature", "-1"]),
        (["-t", "nan"], ["temperature", "nan"]),
        (["-t", "1", "--top-p", "1.5"], ["top_p", "1.5"]),
        (["--top-p", "2"], ["top_p", "2"]),
        (["-t", "1", "--top-k", "0"], ["top_k", "0"]),
        (["--repetition-penalty", "0"], ["repetition_penalty", "got 0"]),
        (["--seed", "-1"], ["seed", "-1"]),
    ],
)
@pytest.mark.parametrize("source", [["-p", "x"], ["-i", "in", "-o", "out"]])
def test_values_out_of_range(cli, options, messages, source):
    result = cli("generate", "model", *source, *options)
    assert_error(result, *messages, code=2)


def test_an_implementation_without_sparse_layers(cli, dense_folder):
    result = generate(cli, dense_folder, "-p", "x", "--implementation", "cpu")
    assert_error(result, "sparse layers, got none")


FILES = ("-i", "in", "-o", "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected --prompt, --file or --input, got none"),
        (["-i", "in"], "expected both, got one"),
        ([*FILES, "-p", "x"], "no --prompt or --file beside it"),
        (["-p", "x", "--resume"], "expected --input and --output"),
        (["-i", "-", "-o", "out"], "--input: expected a file, as /dev/stdin, got -"),
        (["-i", "in", "-o", "-"], "--output: expected a file, got - (--json"),
        (["-p", "x", "--logprobs"], "expected --json, or --input and --output"),
        (["-p", "x", "--json", "--stream"], "--json: expected no --stream"),
        ([*FILES, "--json"], "--json: expected no --stream, --input"),
        (["-p", "x", "--dense", "--implementation", "cpu"], "expected no --dense"),
        (
            ["-p", "x", "--dtype", "float32", "--implementation", "cpu"],
            "--dtype float32 beside it",
        ),
    ],
)
def test_options_that_do_not_go_together(cli, options, message):
    assert_error(cli("generate", "model", *options), message, code=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "got no text"),
        (b" \n\n", "got no text"),
        (b"ok\xff", "expected UTF-8 text"),
    ],
)
def test_bad_files(cli, sparse_folder, tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    assert_error(generate(cli, sparse_folder, "-f", path), "--file", message)


def test_file_is_a_folder(cli, sparse_folder, tmp_path):
    assert_error(generate(cli, sparse_folder, "-f", tmp_path), "Is a directory")


@pytest.fixture
def no_weights_read(monkeypatch):
    """Reading them takes minutes for a large model: errors of the input come first."""
    monkeypatch.setattr(opt, "from_pretrained", None)


@pytest.mark.usefixtures("no_weights_read")
def test_no_tokenizer(cli, sparse_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(sparse_folder, folder)
    (folder / "tokenizer.json").unlink()
    (tmp_path / "in").write_text('{"prompt": "x"}')
    files = ("-i", tmp_path / "in", "-o", tmp_path / "out")
    for args in (("-p", "x"), files):
        result = generate(cli, folder, *args)
        assert_error(result, "expected a tokenizer.json, or vocab.json and merges.txt")


@pytest.mark.parametrize("options", [["--stream"], ["--no-stream"], ["--json"], ["-i"]])
def test_logits_that_are_nan(cli, sparse_folder, tmp_path, options):
    model, tokenizer = opt.from_pretrained(sparse_folder)
    bias = model.layers[0].fc1.bias
    bias[...] = bias[...] * np.nan
    opt.save_pretrained(model, tokenizer, tmp_path / "model")
    if options == ["-i"]:
        (tmp_path / "in").write_text('{"prompt": "x"}')
        options = ["-i", tmp_path / "in", "-o", tmp_path / "out"]
    else:
        options = [*options, "-p", "x"]
    result = generate(cli, tmp_path / "model", "-q", *options)
    assert_error(result, "the model's logits are NaN or infinite", "try dtype float32")
    assert result.out == ("x\n" if options[0] == "--stream" else "")
    # Of a file all lines that could be continued are written.
    assert (tmp_path / "out").exists() == (options[0] == "-i")


def test_interrupted(cli, sparse_folder, monkeypatch):
    def interrupt(*unused, **unused_too):
        raise KeyboardInterrupt

    monkeypatch.setattr(opt, "generate_stream", interrupt)
    result = generate(cli, sparse_folder, "-p", "hello")
    assert result.code == 130
    assert result.out == "hello\n"
    assert result.err.strip() == "flashjax: interrupted"


def test_generation_config_file(cli, sparse_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(sparse_folder, folder)
    content = {"max_new_tokens": 3, "repetition_penalty": 1.5, "num_beams": 4}
    (folder / "generation_config.json").write_text(json.dumps(content))
    for args, options in (
        ([], {"max_new_tokens": 3, "repetition_penalty": 1.5}),
        (
            ["-n", 5, "--repetition-penalty", 1],
            {"max_new_tokens": 5, "repetition_penalty": 1.0},
        ),
    ):
        result = cli("generate", folder, "-p", "hello", "-q", "--ignore-eos", *args)
        assert result.out == expected_texts(folder, ["hello"], **options)[0] + "\n"
        assert "ignored, not supported: num_beams=4" in result.err


@pytest.mark.parametrize("flag", ["--top-k", "--top-p"])
def test_filters_without_effect(cli, sparse_folder, flag):
    result = generate(cli, sparse_folder, "-p", "hello", "-q", flag, 1)
    assert result.code == 0
    assert result.err == f"flashjax: warning: {flag}: no effect at temperature 0\n"
    drawn = generate(cli, sparse_folder, "-p", "hello", "-q", flag, 1, "-t", 1)
    assert (drawn.code, drawn.err) == (0, "")


@pytest.mark.usefixtures("no_weights_read")
def test_a_token_that_the_model_lacks_is_found_first(cli, sparse_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(sparse_folder, folder)
    edit_config(folder, vocab_size=50)
    (tmp_path / "in").write_text('{"prompt": "x"}')
    files = ("-i", tmp_path / "in", "-o", tmp_path / "out")
    for args in (("-p", "x"), files):
        result = generate(cli, folder, *args)
        assert_error(result, "the tokenizer gave token 91, the model has 50")


@pytest.mark.usefixtures("no_weights_read")
def test_a_late_prompt_that_is_too_long_is_found_first(cli, sparse_folder):
    args = [a for p in ("x", "y", "z" * 70) for a in ("--prompt", p)]
    result = generate(cli, sparse_folder, *args, "-q", "--batch", 1)
    assert_error(result, "64 positions", "71 tokens")
    assert result.out == ""


@pytest.mark.usefixtures("no_weights_read")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": 3}', "line 2: expected a prompt with text, got 3"),
        (json.dumps({"prompt": "z" * 70}), "64 positions"),
    ],
)
def test_what_is_wrong_with_an_input_is_found_first(
    cli, sparse_folder, tmp_path, line, message
):
    (tmp_path / "in").write_text('{"prompt": "x"}\n' + line)
    files = ("-i", tmp_path / "in", "-o", tmp_path / "out")
    assert_error(generate(cli, sparse_folder, *files), message)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_input_that_is_a_pipe(cli, sparse_folder, tmp_path):
    content = b'{"prompt": "hello"}'
    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    target = tmp_path / "out"
    try:
        files = ("-i", f"/dev/fd/{reading}", "-o", target)
        result = generate(cli, sparse_folder, *files, "-n", 2)
    finally:
        os.close(reading)
    assert result.code == 0
    assert len(target.read_text().splitlines()) == 1


class TestFiles:
    """JSON lines in, JSON lines out."""

    def test_lines(self, cli, sparse_folder, tmp_path):
        source, target = tmp_path / "in", tmp_path / "out"
        source.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
        files = ("--input", source, "--output", target)
        result = generate(cli, sparse_folder, *files, "-b", 2)
        assert (result.code, result.err) == (0, "")
        assert result.out.startswith(f"{target}: 3 lines in ")
        out = [json.loads(line) for line in target.read_text().splitlines()]
        texts = [p + line["text"] for p, line in zip(PROMPTS, out, strict=True)]
        assert texts == expected_texts(sparse_folder, PROMPTS)
        again = generate(cli, sparse_folder, *files)
        assert_error(again, "got one that exists (--overwrite replaces it)")
        again = generate(cli, sparse_folder, *files, "--overwrite", "-q", "--logprobs")
        assert (again.code, again.out, again.err) == (0, "", "")
        assert len(json.loads(target.read_text().split("\n")[0])["logprobs"]) == 8

    def test_interrupted(self, cli, sparse_folder, tmp_path, monkeypatch):
        source, target = tmp_path / "in", tmp_path / "out"
        source.write_text('{"prompt": "x"}\n' * 3)

        def interrupt(*unused):
            raise KeyboardInterrupt

        run = batch_file.run_jobs

        def run_once(*args):
            monkeypatch.setattr(batch_file, "run_jobs", interrupt)
            return run(*args)

        monkeypatch.setattr(batch_file, "run_jobs", run_once)
        result = generate(cli, sparse_folder, "-i", source, "-o", target, "-b", 1)
        assert result.code == 130
        assert "1 lines are done and kept in" in result.err
        assert "Traceback" not in result.err
        assert sorted(os.listdir(tmp_path)) == ["in", "out.partial"]

    def test_interrupted_before_a_line_is_done(
        self, cli, sparse_folder, tmp_path, monkeypatch
    ):
        source, target = tmp_path / "in", tmp_path / "out"
        source.write_text('{"prompt": "x"}\n')

        def interrupt(*unused):
            raise KeyboardInterrupt

        monkeypatch.setattr(batch_file, "run_jobs", interrupt)
        result = generate(cli, sparse_folder, "-i", source, "-o", target)
        assert (result.code, result.err) == (130, "flashjax: interrupted\n")
        assert os.listdir(tmp_path) == ["in"]

    def test_the_input_is_never_replaced(self, cli, sparse_folder, tmp_path):
        source = tmp_path / "in"
        source.write_text('{"prompt": "x"}\n')
        link = tmp_path / "link"
        link.symlink_to(source)
        for target in (source, link, tmp_path / "." / "in"):
            files = ("-i", source, "-o", target, "--overwrite")
            result = generate(cli, sparse_folder, *files)
            assert_error(result, "expected an output other than the input")
        assert source.read_text() == '{"prompt": "x"}\n'

    def test_a_device_is_never_replaced(self, cli, sparse_folder, tmp_path):
        source, target = tmp_path / "in", tmp_path / "out"
        source.write_text('{"prompt": "x"}\n')
        os.mkfifo(target)
        files = ("-i", source, "-o", target, "--overwrite")
        assert_error(generate(cli, sparse_folder, *files), "got a device or pipe")
        assert target.is_fifo()

    def test_no_input(self, cli, sparse_folder, tmp_path):
        files = ("-i", tmp_path / "in", "-o", tmp_path / "out")
        result = cli("generate", sparse_folder, *files)
        assert_error(result, "expected a file of JSON lines")


class TestJson:
    """One document on standard output."""

    PROMPTS = (*PROMPTS, "caf\u00e9 \U0001f600\n")

    def args(self):
        return [a for p in self.PROMPTS for a in ("-p", p)]

    @pytest.mark.parametrize("batch", [1, 3, 8])
    def test_results(self, cli, sparse_folder, batch):
        result = generate(cli, sparse_folder, *self.args(), "--json", "-b", batch)
        assert (result.code, result.err) == (0, "")
        content = json.loads(result.out)
        texts = [r["prompt"] + r["text"] for r in content["results"]]
        assert texts == expected_texts(sparse_folder, self.PROMPTS)
        for r in content["results"]:
            assert list(r) == ["prompt", "text", "new_tokens", "finish_reason"]
            assert (r["new_tokens"], r["finish_reason"]) == (8, "length")
        speed, weights = content["speed"], content["weights"]
        assert (speed["tokens"], speed["batch"]) == (32, min(batch, 4))
        assert min(speed["tokens_per_s"], speed["seconds"]) > 0
        assert weights["sparse_layers"] == 8
        assert weights["sparsity"] == pytest.approx(0.7, abs=0.01)
        assert weights["sparse_bytes"] < weights["sparse_bytes_if_dense"] == 131072

    def test_results_are_those_of_a_file(self, cli, sparse_folder, tmp_path):
        lines = [json.dumps({"prompt": p}) + "\n" for p in self.PROMPTS]
        (tmp_path / "in").write_text("".join(lines))
        files = ("-i", tmp_path / "in", "-o", tmp_path / "out")
        options = ("-n", 20, "-t", 1, "--seed", 3, "--logprobs")
        assert cli("generate", sparse_folder, *files, *options).code == 0
        expected = (tmp_path / "out").read_text().splitlines()
        result = cli("generate", sparse_folder, *self.args(), "--json", *options)
        results = json.loads(result.out)["results"]
        for prompt, line, found in zip(self.PROMPTS, expected, results, strict=True):
            want = json.loads(line)
            del want["id"]
            logprobs = want.pop("logprobs")
            assert found.pop("prompt") == prompt
            assert found.pop("logprobs") == pytest.approx(logprobs, abs=2e-3)
            assert found == want

    def test_draws_are_those_of_the_texts(self, cli, sparse_folder):
        options = ("-t", 1, "--seed", 3, "-b", 2)
        texts = generate(cli, sparse_folder, *self.args(), "-q", *options).out
        result = generate(cli, sparse_folder, *self.args(), "--json", *options)
        results = json.loads(result.out)["results"]
        assert texts == "".join(f"{r['prompt']}{r['text']}\n" for r in results)

    def test_piped(self, sparse_folder):
        args = (*self.args(), "-n", 4, "--no-stream", "--json")
        done = run_process("generate", sparse_folder, *args)
        assert (done.returncode, done.stderr) == (0, "")
        results = json.loads(done.stdout)["results"]
        assert [r["prompt"] for r in results] == list(self.PROMPTS)

    def test_no_tokens(self, cli, sparse_folder):
        result = cli("generate", sparse_folder, "-p", "x", "-n", 0, "--json")
        content = json.loads(result.out)
        assert content["results"][0]["text"] == ""
        assert content["speed"]["tokens_per_s"] == 0

    def test_dense(self, cli, dense_folder):
        result = generate(cli, dense_folder, "-p", "x", "--json")
        weights = json.loads(result.out)["weights"]
        assert (weights["sparse_layers"], weights["sparsity"]) == (0, None)
        assert weights["other_bytes"] > 0


def test_tokenizer_that_panics(sparse_folder, tmp_path):
    folder = shutil.copytree(sparse_folder, tmp_path / "model")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["post_processor"]["special_tokens"] = {}
    path.write_text(json.dumps(content))
    done = run_process("generate", folder, "-p", "x", "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]  # Rust's own note comes first
    assert last.startswith(f"flashjax: error: {path}: expected a tokenizer that")
