"""The short scripts and the notebook run, and do what they say."""

import importlib.util
import json
import re

import jax
import pytest
from example_support import EXAMPLES


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def promotion():
    """What users have, instead of the tests' strictness."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def numbers(pattern, text):
    return [float(number) for number in re.findall(pattern + r" ([\d.e+-]+)", text)]


@pytest.mark.parametrize("name", ["sparse_mlp", "replace_layers"])
def test_sparse_layers_give_what_dense_ones_do(name, capsys):
    load(name).main()
    out = capsys.readouterr().out
    (difference,) = numbers(r"largest difference from [^:]*:", out)
    # bfloat16 in replace_layers: two different roundings of values up to about 4.
    assert difference < {"sparse_mlp": 5e-3, "replace_layers": 0.05}[name]
    assert "SparseMatrix(" in out


def test_fine_tuning_repairs_what_pruning_spoils(capsys):
    load("prune_and_finetune").main(steps=100)
    _, pruned, tuned = numbers("loss", capsys.readouterr().out)
    assert tuned < pruned


def test_tensor_parallel_needs_one_sum(capsys):
    if len(jax.devices("cpu")) < 4:
        pytest.skip("needs 4 CPU devices: run without FLASHJAX_TEST_PLATFORM")
    load("tensor_parallel").main()
    out = capsys.readouterr().out
    assert "4 devices, 1 all-reduce" in out
    assert numbers("float32:", out)[0] < 5e-3


def test_generate(capsys):
    module = load("generate_text")
    module.main(new_tokens=4)
    out = capsys.readouterr().out
    assert out.count("--- ") == 3
    assert all(prompt in out for prompt in module.PROMPTS)


def test_notebook(monkeypatch, capsys):
    monkeypatch.chdir(EXAMPLES)
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text(encoding="utf-8"))
    names = {}
    for i, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "outputs are not committed"
            code = compile("".join(cell["source"]), f"tour.ipynb, cell {i}", "exec")
            exec(code, names)
    assert "It is a truth universally acknowledged, that" in capsys.readouterr().out
