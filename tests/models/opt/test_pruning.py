import json
import os
import shutil
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from flashjax.checkpoint import CheckpointError, CheckpointReader
from flashjax.models import opt
from flashjax.models.opt import pruning
from flashjax.models.opt.calibration import Calibration
from flashjax.models.opt.pruning import layers, partial_run
from flashjax.models.opt.pruning.layers import STAGES

DATA = Path(__file__).parent / "data"
MATRICES = [name for stage in STAGES for name in stage]


@pytest.fixture(scope="module")
def tokens():
    """Twelve samples; some start or end with padding."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 48, (12, 16)).astype(np.int32)
    mask = np.ones(ids.shape, bool)
    mask[3, :5] = mask[7, 10:] = False
    return Calibration(ids, mask)


def run(model, out, tokens, **options):
    options = {"sparsity": 0.5, "method": "wanda", "calibration": tokens} | options
    return pruning.prune_pretrained(DATA / model, out, **options)


def stored(folder):
    with CheckpointReader(folder) as reader:
        return {name: reader.load(name) for name in reader.names()}


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def inputs_of(model, index, module, tokens):
    """The inputs of a linear layer, by running the whole model."""
    seen = []
    layer = model.layers[index]
    owner = layer.self_attn if module.startswith("self_attn") else layer
    name = module.split(".")[-1]
    linear = getattr(owner, name)
    setattr(owner, name, layers._Tap(linear, seen.append))
    model(tokens.token_ids, tokens.mask)
    setattr(owner, name, linear)
    return np.asarray(seen[0], np.float64)[tokens.mask]


@pytest.mark.parametrize("name", ["pre_norm", "post_norm_projected"])
def test_inputs_go_through_the_pruned_parts(name, tokens, tmp_path):
    """Against the whole model in plain order, Wanda in NumPy, all in float32."""
    result = run(name, tmp_path / "out", tokens, format="hf", dtype=jnp.float32)
    found = stored(tmp_path / "out")
    model, _ = opt.from_pretrained(
        DATA / name, dtype=jnp.float32, sparse=False, fuse_qkv=False
    )
    errors = {}
    for index in range(2):
        for stage in STAGES:
            x = inputs_of(model, index, stage[0], tokens)
            for module in stage:
                owner = model.layers[index]
                for part in module.split("."):
                    owner = getattr(owner, part)
                dense = np.asarray(owner.kernel[...])
                importance = np.abs(dense) * np.linalg.norm(x, axis=0)[:, None]
                order = np.argsort(importance, axis=0)
                pruned = dense.copy()
                zeros = order[: round(0.5 * len(dense))]
                np.put_along_axis(pruned, zeros, 0, axis=0)
                full = f"layers.{index}.{module}"
                ours = found[f"model.decoder.{full}.weight"].T
                np.testing.assert_array_equal(ours, pruned, err_msg=full)
                owner.kernel.set_value(jnp.asarray(pruned))
                change = np.linalg.norm(x @ (dense - pruned)) ** 2
                errors[full] = change / np.linalg.norm(x @ dense) ** 2
    assert [r.name for r in result.reports] == list(errors)
    for report in result.reports:
        assert report.error == pytest.approx(errors[report.name], rel=1e-3)


@pytest.mark.parametrize(
    "name", sorted(path.parent.name for path in DATA.glob("*/config.json"))
)
def test_every_variant(name, tokens, tmp_path):
    result = run(name, tmp_path / "out", tokens)
    assert result.matrices == 12
    assert result.sparsity == pytest.approx(0.5, abs=0.02)
    assert os.listdir(tmp_path) == ["out"]
    model, _ = opt.from_pretrained(tmp_path / "out")
    assert np.isfinite(np.asarray(model(tokens.token_ids, tokens.mask))).all()
    before, after = stored(DATA / name), stored(tmp_path / "out")
    for tensor in before.keys() - {
        f"model.decoder.{r.name}.weight" for r in result.reports
    }:
        np.testing.assert_array_equal(after[tensor], before[tensor])


def test_one_compilation_for_all_layers(tokens, tmp_path):
    for function in (layers._gather, layers._forward, layers._embed):
        function.clear_cache()
    run("pre_norm", tmp_path / "out", tokens)
    assert layers._gather._cache_size() == len(STAGES)
    assert layers._forward._cache_size() == 1


def test_padding_changes_nothing(tokens, tmp_path):
    """Neither what it holds nor, up to rounding, how samples are batched."""
    ids = tokens.token_ids.copy()
    ids[~tokens.mask] = 9
    first = run("pre_norm", tmp_path / "a", tokens)
    second = run("pre_norm", tmp_path / "b", Calibration(ids, tokens.mask))
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert [r.error for r in first.reports] == [r.error for r in second.reports]


def test_batches(tokens, tmp_path, monkeypatch):
    first = run("pre_norm", tmp_path / "a", tokens, activations=jnp.float32)
    monkeypatch.setattr(layers, "_BATCH_TOKENS", 5 * 16)  # 12 samples in 3 batches
    second = run("pre_norm", tmp_path / "b", tokens, activations=jnp.float32)
    for ours, theirs in zip(first.reports, second.reports, strict=True):
        assert ours.error == pytest.approx(theirs.error, rel=0.02)


@pytest.mark.parametrize("form", ["flashjax", "hf"])
def test_bfloat16(form, tokens, tmp_path):
    out = tmp_path / "out"
    run("pre_norm", out, tokens, dtype=jnp.bfloat16, format=form)
    found = load_file(out / "model.safetensors")
    values = [a for name, a in found.items() if not name.endswith("bitmap")]
    assert all(array.dtype == jnp.bfloat16 for array in values)
    assert (len(values) < len(found)) == (form == "flashjax")
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"


def test_hf_format_equals_the_sparse_one(tokens, tmp_path):
    run("pre_norm", tmp_path / "a", tokens, format="hf")
    run("pre_norm", tmp_path / "b", tokens)
    plain, sparse = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert plain.keys() == sparse.keys()
    for name, array in plain.items():
        np.testing.assert_array_equal(array, sparse[name])


@pytest.mark.parametrize("name", ["pre_norm_projected_untied", "post_norm_projected"])
def test_transformers_loads_the_hf_format(name, tokens, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    run(name, tmp_path / "out", tokens, format="hf")
    theirs, report = transformers.OPTForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ours, _ = opt.from_pretrained(tmp_path / "out", dtype=jnp.float32)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(tokens.token_ids[:1]).long()).logits
    np.testing.assert_allclose(
        ours(tokens.token_ids[:1]), logits.numpy(), rtol=2e-4, atol=2e-4
    )


# An interrupted run.


class _KilledError(Exception):
    pass


def interrupted(tokens, out, monkeypatch, *, after, **options):
    """A run that ends once `after` layers are written."""
    write = partial_run.PartialRun.write_part

    def stop(self, index, *args):
        if index == after:
            raise _KilledError
        write(self, index, *args)

    with monkeypatch.context() as patch:
        patch.setattr(partial_run.PartialRun, "write_part", stop)
        with pytest.raises(_KilledError):
            run("pre_norm", out, tokens, **options)


@pytest.mark.parametrize("merged", [True, False])
def test_resume_gives_the_same_bytes(tokens, tmp_path, monkeypatch, merged):
    if not merged:
        monkeypatch.setattr(partial_run, "_MERGED_BYTES", 0)
    whole = run("pre_norm", tmp_path / "whole", tokens)
    for after in (1, 2):
        out = tmp_path / f"resumed{after}"
        interrupted(tokens, out, monkeypatch, after=after)
        assert not out.exists()
        result = run("pre_norm", out, tokens, resume=True)
        assert result.resumed_layers == after
        assert content(out) == content(tmp_path / "whole")
        assert [r.error for r in result.reports] == [r.error for r in whole.reports]
        assert not out.with_name(f"{out.name}.partial").exists()
    assert (tmp_path / "whole" / "model.safetensors").exists() == merged
    opt.from_pretrained(tmp_path / "whole")


def test_resume_of_the_last_step(tokens, tmp_path, monkeypatch):
    run("pre_norm", tmp_path / "whole", tokens)

    def stop(*unused):
        raise _KilledError

    with monkeypatch.context() as patch:
        patch.setattr(partial_run, "replace_folder", stop)
        with pytest.raises(_KilledError):
            run("pre_norm", tmp_path / "out", tokens)
    run("pre_norm", tmp_path / "out", tokens, resume=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_resume_without_an_unfinished_run(tokens, tmp_path):
    run("pre_norm", tmp_path / "out", tokens, resume=True)
    with pytest.raises(CheckpointError, match="expected a new or empty folder"):
        run("pre_norm", tmp_path / "out", tokens, resume=True)


def test_unfinished_runs_are_respected(tokens, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(tokens, out, monkeypatch, after=1)
    before = content(tmp_path / "out.partial" / "model")
    for message, options in {
        r"unfinished run \(1 of 2 layers done\): go on with it by resume": {},
        "sparsity was 0.5, is 0.6": {"resume": True, "sparsity": 0.6},
        "method was 'wanda', is 'magnitude'": {"resume": True, "method": "magnitude"},
        "calibration was '.*', is '.*'": {
            "resume": True,
            "calibration": Calibration(tokens.token_ids[1:], tokens.mask[1:]),
        },
        "budget was 'uniform', is {": {"resume": True, "budget": {"layers.0.fc1": 0}},
    }.items():
        with pytest.raises(CheckpointError, match=message):
            run("pre_norm", out, tokens, **options)
    with pytest.raises(CheckpointError, match="model was "):
        run("no_affine", out, tokens, resume=True)
    (tmp_path / "out.partial" / "run.json").write_text('{"sparsity": 0.')
    with pytest.raises(CheckpointError, match=r"run.json: .*JSON.* delete .*partial"):
        run("pre_norm", out, tokens, resume=True)
    assert content(tmp_path / "out.partial" / "model") == before


def test_errors_that_are_not_the_models_lose_nothing(tokens, tmp_path):
    def fail(what, done, total):
        if what.startswith("layers.1"):
            raise ValueError("no connection")

    with pytest.raises(ValueError, match="no connection"):
        run("pre_norm", tmp_path / "out", tokens, progress=fail)
    result = run("pre_norm", tmp_path / "out", tokens, resume=True)
    assert result.resumed_layers == 1


@pytest.mark.parametrize("number", [np.float32, np.float64, Fraction, np.asarray])
def test_numbers_of_any_kind(tokens, tmp_path, number):
    half = number(1) / 2
    budget = MappingProxyType({"layers.0.fc1": number(1) / 4})
    result = run("pre_norm", tmp_path / "out", tokens, sparsity=half, budget=budget)
    targets = {report.name: report.target for report in result.reports}
    assert targets["layers.0.fc1"] == 0.25
    assert targets["layers.1.fc2"] == 0.5
    expected = run(
        "pre_norm", tmp_path / "plain", tokens, sparsity=0.5, budget=dict(targets)
    )
    assert content(tmp_path / "out") == content(tmp_path / "plain")
    assert result.sparsity == expected.sparsity


def test_two_runs_at_once(tokens, tmp_path):
    def again(what, done, total):
        if what == "layers.0.fc1":
            for resume in (True, False):
                with pytest.raises(CheckpointError, match="another run is writing"):
                    run("pre_norm", tmp_path / "out", tokens, resume=resume)

    run("pre_norm", tmp_path / "out", tokens, progress=again)


def test_full_disk_in_the_middle(tokens, tmp_path, monkeypatch):
    write = partial_run.write_file

    def full(path, dense, sparse):
        if any("layers.1." in name for name in sparse):
            raise OSError(28, "No space left on device")
        return write(path, dense, sparse)

    with monkeypatch.context() as patch:
        patch.setattr(partial_run, "write_file", full)
        message = "not saved, 1 of 3 parts are in .*out.partial; make room and go on"
        with pytest.raises(CheckpointError, match=message):
            run("pre_norm", tmp_path / "out", tokens)
    assert run("pre_norm", tmp_path / "out", tokens, resume=True).resumed_layers == 1


# Budgets.


def test_named_budgets(tokens, tmp_path):
    named = {"layers.0.fc1": 0.75, "layers.1.self_attn.q_proj": 0}
    result = run("pre_norm", tmp_path / "out", tokens, budget=named)
    for report in result.reports:
        assert report.target == named.get(report.name, 0.5)
        assert report.sparsity == pytest.approx(report.target, abs=0.03)


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_owl(method, tokens, tmp_path, monkeypatch):
    options = {"budget": "owl", "method": method}
    first = run("pre_norm", tmp_path / "a", tokens, **options)
    targets = {r.name: r.target for r in first.reports}
    assert targets["layers.0.fc1"] == targets["layers.0.self_attn.q_proj"]
    assert targets["layers.0.fc1"] != targets["layers.1.fc1"]
    mean = sum(r.target * r.size for r in first.reports) / first.elements
    assert mean == pytest.approx(0.5)
    interrupted(tokens, tmp_path / "b", monkeypatch, after=1, **options)
    run("pre_norm", tmp_path / "b", tokens, resume=True, **options)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_pattern(tokens, tmp_path):
    run("pre_norm", tmp_path / "out", tokens, sparsity=None, pattern="2:4")
    for name, array in stored(tmp_path / "out").items():
        if any(f".{m}.weight" in name for m in MATRICES):
            groups = np.count_nonzero(array.reshape(len(array), -1, 4), axis=-1)
            assert (groups <= 2).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.5}, "expected sparsity from 0 to 1, got 1.5"),
        ({"method": "best"}, "method must be one of magnitude, .*got 'best'"),
        ({"pattern": "2:4", "sparsity": 0.7}, "which is what the pattern"),
        ({"pattern": "five"}, "expected a pattern as '2:4'"),
        ({"budget": "even"}, "expected 'uniform', 'owl' or"),
        ({"budget": 0.5}, "expected 'uniform', 'owl' or"),
        ({"budget": {"layers.2.fc1": 0.5}}, "from layers.0.*, got 'layers.2.fc1'"),
        ({"budget": {"layers.0.fc1": 1.1}}, "from 0 to 1 for layers.0.fc1, got 1.1"),
        ({"budget": {"layers.0.fc1": "a"}}, "for layers.0.fc1, got 'a'"),
        ({"budget": {"layers.0.fc1": float("nan")}}, "got nan"),
        ({"budget": "owl", "pattern": "2:4"}, "expected 'uniform' with the pattern"),
        ({"damping": 0.1}, "the method wanda has none"),
        ({"damping": -1}, "damping: expected a number of at least 0, got -1"),
        ({"sparsity": 10**400}, "expected sparsity from 0 to 1, got inf"),
        ({"budget": {"layers.0.fc1": np.asarray(True)}}, "layers.0.fc1, got True"),
        ({"dtype": jnp.float32}, "format 'hf' stores it"),
        ({"format": "gguf"}, "expected 'flashjax' or 'hf', got gguf"),
        ({"dtype": jnp.int8}, "dtype must be float32, float16 or bfloat16"),
        ({"activations": jnp.bfloat16}, "expected float16 like the weights, or"),
    ],
)
def test_bad_arguments(options, message, tokens, tmp_path):
    with pytest.raises(ValueError, match=message):
        run("pre_norm", tmp_path / "out", tokens, **options)
    assert os.listdir(tmp_path) == []


def test_calibration_for_another_model(tokens, tmp_path):
    large = Calibration(tokens.token_ids + 40, tokens.mask)
    with pytest.raises(ValueError, match=r"token ids in \[0, 48\)"):
        run("pre_norm", tmp_path / "out", large)
    long = Calibration(np.ones((1, 33), np.int32), np.ones((1, 33), bool))
    with pytest.raises(ValueError, match="at most the model's 32 positions, got 33"):
        run("pre_norm", tmp_path / "out", long)


def test_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match=r"needs a tokenizer\.json"):
        run("pre_norm", tmp_path / "out", None)


# Layers that cannot be pruned.


@pytest.fixture
def broken(tmp_path):
    """Makes a copy of a model with one tensor changed."""
    from safetensors.numpy import save_file

    def make(name, change):
        folder = tmp_path / "broken"
        shutil.copytree(DATA / "pre_norm", folder)
        tensors = load_file(folder / "model.safetensors")
        tensors[f"model.decoder.{name}"] = change(tensors[f"model.decoder.{name}"])
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make


@pytest.mark.parametrize(
    ("name", "factor", "message"),
    [
        ("layers.0.fc2.bias", np.nan, "outputs of layers.0 hold NaN or infinity"),
        ("layers.1.fc1.bias", np.inf, "inputs of layers.1.fc2 hold NaN or infinity"),
        ("layers.1.fc1.weight", np.nan, "layers.1.fc1: .*expected finite weights"),
    ],
)
def test_values_that_are_not_finite(name, factor, message, tokens, tmp_path, broken):
    folder = broken(name, lambda a: np.full_like(a, factor))
    with pytest.raises(CheckpointError, match=message):
        run(folder, tmp_path / "out", tokens)
    # The same arguments would fail again: nothing to resume.
    assert sorted(os.listdir(tmp_path)) == ["broken"]


def test_overflow_says_what_to_do(tokens, tmp_path, broken):
    folder = broken("layers.0.fc2.bias", lambda a: np.full_like(a, 6e4))
    folder = broken_twice(folder, "layers.0.fc1.bias", 100)
    with pytest.raises(CheckpointError, match="compute activations in float32"):
        run(folder, tmp_path / "out", tokens)
    run(folder, tmp_path / "out", tokens, activations=jnp.float32)


def broken_twice(folder, name, value):
    from safetensors.numpy import save_file

    tensors = load_file(folder / "model.safetensors")
    for tensor in (f"model.decoder.{name}", "model.decoder.layers.0.fc2.weight"):
        tensors[tensor] = np.full_like(tensors[tensor], value)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_singular_statistics_name_the_layer(tokens, tmp_path):
    one = Calibration(tokens.token_ids[:1, :1], tokens.mask[:1, :1])
    with pytest.raises(CheckpointError, match=r"layers\.0\.\S+: .*damping"):
        run("pre_norm", tmp_path / "out", one, method="sparsegpt", damping=0.0)
    assert os.listdir(tmp_path) == []
