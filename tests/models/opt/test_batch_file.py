"""JSON lines in, JSON lines out."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from cli_support import byte_tokenizer
from flax import nnx
from tokenizers import Tokenizer, normalizers, processors

from flashjax import file_lock
from flashjax.models import opt
from flashjax.models.opt import batch_file

CONFIG = opt.OPTConfig(
    vocab_size=260,
    hidden_size=16,
    num_layers=1,
    ffn_size=32,
    num_heads=2,
    max_positions=32,
    init_std=0.4,
)
LINES = [
    {"id": "a", "prompt": "hello"},
    {"prompt": "a longer prompt", "max_new_tokens": 3},
    {"id": [1], "prompt": "x", "seed": 7},
    {"id": "a", "prompt": "é", "max_new_tokens": 0},
    {"id": None, "prompt": "some words here", "max_new_tokens": 6, "seed": 7},
]
OPTIONS = opt.GenerationConfig(max_new_tokens=5, temperature=1.5, seed=3)


@pytest.fixture(scope="module")
def model():
    return opt.OPT(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "in.jsonl", LINES)


def write(path, lines):
    texts = [x if isinstance(x, str) else json.dumps(x) for x in lines]
    path.write_text("\n".join(texts) + "\n\n")
    return path


def test_a_byte_order_mark_is_no_text(source, tokenizer):
    plain = batch_file.read_input(source, tokenizer, CONFIG, OPTIONS)
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes())
    marked = batch_file.read_input(source, tokenizer, CONFIG, OPTIONS)
    assert marked.jobs == plain.jobs


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_order_and_ids(model, tokenizer, source, tmp_path):
    seen = []
    target = tmp_path / "out.jsonl"
    count = opt.generate_file(
        model,
        tokenizer,
        source,
        target,
        config=OPTIONS,
        batch=2,
        logprobs=True,
        progress=lambda *args: seen.append(args),
    )
    assert count == 5
    assert seen == [(2, 5), (4, 5), (5, 5)]
    out = read(target)
    assert [line["id"] for line in out] == ["a", 2, [1], "a", None]
    assert [line["new_tokens"] for line in out][1:4:2] == [3, 0]
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]
    for line in out:
        assert len(line["token_ids"]) == len(line["logprobs"]) == line["new_tokens"]
        ended = line["token_ids"][-1:] == [2]
        assert line["finish_reason"] == ("stop" if ended else "length")
    # A line with a seed gets what its prompt gets alone.
    for index in (2, 4):
        ids = tokenizer.encode(LINES[index]["prompt"]).ids
        new = LINES[index].get("max_new_tokens", 5)
        alone = opt.generate(model, [ids], config=OPTIONS, seed=7, max_new_tokens=new)
        assert (
            alone[0, len(ids) :].tolist()[: out[index]["new_tokens"]]
            == (out[index]["token_ids"])
        )


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_batches_do_not_matter(model, tokenizer, source, tmp_path, batch):
    outs = [tmp_path / name for name in ("one", "other")]
    for target, size in zip(outs, (2, batch), strict=True):
        opt.generate_file(model, tokenizer, source, target, config=OPTIONS, batch=size)
    assert read(outs[0]) == read(outs[1])


@pytest.mark.parametrize("torn", [0, 1, 40])
def test_resume(model, tokenizer, source, tmp_path, monkeypatch, torn):
    whole, target = tmp_path / "whole", tmp_path / "out"
    opt.generate_file(model, tokenizer, source, whole, config=OPTIONS, batch=2)
    run, calls = batch_file.run_jobs, []

    def interrupted(*args):
        calls.append([job.index for job in args[3]])
        if len(calls) == 2:
            raise KeyboardInterrupt
        yield from run(*args)

    monkeypatch.setattr(batch_file, "run_jobs", interrupted)
    again = {"config": OPTIONS, "batch": 2}
    with pytest.raises(KeyboardInterrupt):
        opt.generate_file(model, tokenizer, source, target, **again)
    partial = batch_file.partial_path(target)
    assert not target.exists()
    assert len(partial.read_text().splitlines()) == 3
    os.truncate(partial, partial.stat().st_size - torn)
    with pytest.raises(ValueError, match=r"interrupted run left .*out\.partial \("):
        opt.generate_file(model, tokenizer, source, target, **again)
    changed = OPTIONS.with_options(seed=4, temperature=2.0)
    with pytest.raises(ValueError, match=r"the same options \(temperature, seed\)"):
        opt.generate_file(
            model, tokenizer, source, target, config=changed, batch=2, resume=True
        )
    other = opt.OPT(CONFIG, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="the same weights"):
        opt.generate_file(other, tokenizer, source, target, resume=True, **again)
    opt.generate_file(model, tokenizer, source, target, resume=True, **again)
    assert target.read_bytes() == whole.read_bytes()
    assert not partial.exists()
    # Batches that were done are not computed again.
    assert (calls[0] in calls[2:]) == bool(torn)


def test_two_runs_at_once(model, tokenizer, source, tmp_path):
    target = tmp_path / "out"
    arguments = (model, tokenizer, source, target)

    def again(done, total):
        before = batch_file.partial_path(target).read_bytes()
        for way in ("resume", "overwrite"):
            with pytest.raises(ValueError, match="another run is writing there"):
                opt.generate_file(*arguments, config=OPTIONS, batch=2, **{way: True})
        assert batch_file.partial_path(target).read_bytes() == before

    opt.generate_file(*arguments, config=OPTIONS, batch=2, progress=again)
    assert len(read(target)) == len(LINES)


def test_a_file_system_without_locks(model, tokenizer, source, tmp_path, monkeypatch):
    def refuse(*unused):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(file_lock.fcntl, "flock", refuse)
    arguments = (model, tokenizer, source, tmp_path / "out")
    assert opt.generate_file(*arguments, config=OPTIONS) == len(LINES)


def test_another_run_ends_meanwhile(model, tokenizer, source, tmp_path):
    target = tmp_path / "out"

    def other_run(done, total):
        target.write_text("theirs")

    with pytest.raises(ValueError, match="expected a new file, got one that exists"):
        opt.generate_file(
            model, tokenizer, source, target, config=OPTIONS, progress=other_run
        )
    assert target.read_text() == "theirs"
    # What was done is not lost.
    opt.generate_file(
        model, tokenizer, source, target, config=OPTIONS, resume=True, overwrite=True
    )
    assert len(read(target)) == len(LINES)


@pytest.mark.parametrize("logprobs", [False, True])
def test_lines_that_fail(tokenizer, tmp_path, logprobs):
    """They say so, and others in their batch get what they get without them."""
    config = dataclasses.replace(CONFIG, tie_word_embeddings=False)
    model = opt.OPT(config, rngs=nnx.Rngs(0))
    prompts = ["good", "bad~", "better"]
    source = write(tmp_path / "in", [{"prompt": prompt} for prompt in prompts])
    options = {"config": OPTIONS, "logprobs": logprobs}
    target = tmp_path / "out"
    opt.generate_file(model, tokenizer, source, target, **options)
    before = read(target)
    (bad,) = tokenizer.encode("~", add_special_tokens=False).ids
    model.embed_tokens.embedding[...] = (
        model.embed_tokens.embedding[...].at[bad].set(np.nan)
    )
    message = r"infinite in 1 of 3 lines, whose finish_reason is 'failed' .* id 2\);"
    with pytest.raises(FloatingPointError, match=message):
        opt.generate_file(model, tokenizer, source, target, overwrite=True, **options)
    after = read(target)
    assert [after[0], after[2]] == [before[0], before[2]]
    assert (
        after[1].items()
        >= {"id": 2, "text": "", "new_tokens": 0, "finish_reason": "failed"}.items()
    )
    assert after[1].keys() == before[1].keys()
    assert not batch_file.partial_path(target).exists()


def test_a_lock_on_a_file_that_is_gone(tmp_path):
    with open(tmp_path / "file", "w") as file:
        (tmp_path / "file").unlink()
        assert not file_lock.try_lock(file)


def test_existing_output(model, tokenizer, source, tmp_path):
    target = tmp_path / "out"
    target.write_text("mine")
    with pytest.raises(ValueError, match="expected a new file"):
        opt.generate_file(model, tokenizer, source, target, config=OPTIONS)
    assert target.read_text() == "mine"
    opt.generate_file(model, tokenizer, source, target, config=OPTIONS, overwrite=True)
    assert len(read(target)) == 5
    with pytest.raises(ValueError, match="in an existing folder"):
        opt.generate_file(model, tokenizer, source, tmp_path / "no" / "out")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: expected a JSON object"),
        ("[]", "expected a JSON object, got list"),
        ({"prompt": ""}, "expected a prompt with text, got ''"),
        ({"text": "x"}, "expected the keys .* got 'text'"),
        ({"prompt": "x", "temperature": 1}, "got 'temperature'"),
        ({"prompt": "x", "seed": -1}, "seed must be at least 0"),
        ({"prompt": "x", "max_new_tokens": "4"}, "must be an integer, got '4'"),
        ({"prompt": "x", "max_new_tokens": None}, "must be an integer, got None"),
        ({"prompt": "x" * 40}, "32 positions, got a prompt of 41 tokens"),
        ('{"prompt": "\\ud800"}', "whole characters"),
        ('{"prompt": "x", "id": ["\\ud800"]}', "an id that JSON can hold"),
        ('{"prompt": "x", "id": NaN}', "an id that JSON can hold"),
        ('{"prompt": "x", "id": 1e999}', "an id that JSON can hold"),
        ('{"prompt": "x", "id": ' + "[" * 100_000, "expected a JSON object, got"),
    ],
)
def test_bad_lines(model, tokenizer, tmp_path, line, message):
    source = write(tmp_path / "in", [{"prompt": "fine"}, line])
    with pytest.raises(ValueError, match=message) as error:
        opt.generate_file(model, tokenizer, source, tmp_path / "out", config=OPTIONS)
    assert "in, line 2: " in str(error.value)
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b'{"prompt": "\xff"}'])
def test_bad_files(model, tokenizer, tmp_path, content):
    source = tmp_path / "in"
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(ValueError, match="expected"):
        opt.generate_file(model, tokenizer, source, tmp_path / "out")


def test_a_prompt_without_tokens(model, tokenizer, source, tmp_path):
    """Found before anything is computed."""
    bare = Tokenizer.from_str(tokenizer.to_str())
    bare.post_processor = processors.TemplateProcessing(single="$A")
    bare.normalizer = normalizers.Strip()
    source = write(tmp_path / "in", [{"prompt": "fine"}, {"prompt": " "}])
    with pytest.raises(ValueError, match="line 2: expected a prompt with tokens"):
        opt.generate_file(model, bare, source, tmp_path / "out", config=OPTIONS)
    assert sorted(os.listdir(tmp_path)) == ["in", "in.jsonl"]


def test_an_output_behind_a_link(model, tokenizer, source, tmp_path):
    (tmp_path / "folder").mkdir()
    real, link = tmp_path / "folder" / "real", tmp_path / "out"
    link.symlink_to("folder/real")
    arguments = (model, tokenizer, source, link)
    opt.generate_file(*arguments, config=OPTIONS)
    before = real.read_bytes()
    opt.generate_file(*arguments, config=OPTIONS, overwrite=True)
    assert link.is_symlink()
    assert real.read_bytes() == before
    assert os.listdir(tmp_path / "folder") == ["real"]
    link.unlink()
    link.symlink_to("no/real")
    with pytest.raises(ValueError, match="in an existing folder"):
        opt.generate_file(*arguments, config=OPTIONS)


@pytest.mark.parametrize("changed", ["first", "last", "bias", "tokenizer"])
def test_resuming_something_else(tokenizer, source, tmp_path, monkeypatch, changed):
    if changed in ("first", "last"):  # their matrices are looked at, whatever the size
        monkeypatch.setattr(batch_file, "_SMALL_BYTES", 0)
    config = dataclasses.replace(CONFIG, num_layers=3)
    model, target = opt.OPT(config, rngs=nnx.Rngs(0)), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(batch_file, "_write", None)
        with pytest.raises(TypeError):
            opt.generate_file(model, tokenizer, source, target, config=OPTIONS)
    if changed in ("first", "last"):
        layer = model.layers[0 if changed == "first" else -1]
        kernel = layer.self_attn.q_proj.kernel
        kernel[...] = kernel[...].at[0, 0].add(1)
    elif changed == "bias":
        bias = model.layers[1].fc1.bias
        bias[...] = bias[...].at[0].add(1)
    else:
        tokenizer = Tokenizer.from_str(tokenizer.to_str())
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    expected = "same tokens" if changed == "tokenizer" else "same weights"
    with pytest.raises(ValueError, match=expected):
        opt.generate_file(model, tokenizer, source, target, config=OPTIONS, resume=True)


def test_what_is_no_partial_file(model, tokenizer, source, tmp_path):
    target = tmp_path / "out"
    for content in ("hello\n", '{"a": 1}\n', "3\n"):
        batch_file.partial_path(target).write_text(content)
        with pytest.raises(ValueError, match="what an interrupted run left"):
            opt.generate_file(
                model, tokenizer, source, target, config=OPTIONS, resume=True
            )


@pytest.mark.parametrize(
    "line", ['{"result": {}}', "[]", "5", '{"index": 0, "result": 1}']
)
def test_a_partial_file_with_a_damaged_line(
    model, tokenizer, source, tmp_path, monkeypatch, line
):
    target = tmp_path / "out"
    arguments = (model, tokenizer, source, target)
    with monkeypatch.context() as patch:
        patch.setattr(batch_file, "_write", None)
        with pytest.raises(TypeError):
            opt.generate_file(*arguments, config=OPTIONS)
    partial = batch_file.partial_path(target)
    partial.write_text(partial.read_text() + line + "\n")
    with pytest.raises(ValueError, match="what an interrupted run left"):
        opt.generate_file(*arguments, config=OPTIONS, resume=True)


def test_one_program_for_a_last_batch_that_is_small(model, tokenizer, tmp_path):
    shapes = set()
    source = write(tmp_path / "in", [{"prompt": "abc"}] * 5)
    run = batch_file.run_request

    def spy(model, request, logprobs):
        shapes.add((request.padded.shape, request.width))
        return run(model, request, logprobs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_file, "run_request", spy)
        opt.generate_file(
            model, tokenizer, source, tmp_path / "out", config=OPTIONS, batch=4
        )
    assert shapes == {((4, 4), 8)}
    assert len({line["text"] for line in read(tmp_path / "out")}) > 1


def test_kill_and_resume(tmp_path, tokenizer):
    folder = tmp_path / "model"
    model = opt.OPT(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0))
    opt.save_pretrained(model, tokenizer, folder)
    source = write(tmp_path / "in.jsonl", LINES)
    target = tmp_path / "out.jsonl"
    script = """
import sys
from flashjax.models.opt import batch_file
run, calls = batch_file.run_jobs, []
def waiting(*args):
    calls.append(0)
    if len(calls) == 3:
        print("here", flush=True)
        sys.stdin.read()
    return run(*args)
batch_file.run_jobs = waiting
from flashjax.cli import main
main()
"""
    args = ["generate", folder, "--input", source, "--output", target, "-b", "1"]
    command = [sys.executable, "-c", script, *args, "-n", "4", "--dtype", "float32"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGKILL)
    assert not target.exists()
    partial = batch_file.partial_path(target)
    assert len(partial.read_text().splitlines()) == 3
    config = opt.GenerationConfig(max_new_tokens=4)
    model, _ = opt.from_pretrained(folder, jnp.float32)
    opt.generate_file(
        model, tokenizer, source, target, config=config, batch=1, resume=True
    )
    opt.generate_file(model, tokenizer, source, tmp_path / "whole", config=config)
    assert read(target) == read(tmp_path / "whole")
    assert np.all([line["new_tokens"] <= 6 for line in read(target)])
