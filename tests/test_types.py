"""Everything public says its types; what they are, mypy checks in `make lint`."""

import inspect

import pytest

import flashjax as fj
from flashjax import checkpoint, export, linen, prune, testing
from flashjax.models import opt
from flashjax.models.opt import calibration, evaluation, memory, pruning

MODULES = [fj, checkpoint, export, linen, prune, testing, opt]
MODULES += [calibration, evaluation, memory, pruning]


def public(module):
    """The functions and classes of a module; those of others where it lists them."""
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
    ]
    return {f"{module.__name__}.{name}": getattr(module, name) for name in names}


def callables(name, value):
    """What of a public object can be called, by name."""
    if not inspect.isclass(value):
        return {name: value} if callable(value) else {}
    found = {}
    for attribute, member in vars(value).items():
        if attribute.startswith("_") and attribute not in ("__init__", "__call__"):
            continue
        if isinstance(member, property):
            member = member.fget
        member = inspect.unwrap(getattr(member, "__func__", member))
        if inspect.isfunction(member) and member.__module__.startswith("flashjax"):
            found[f"{name}.{attribute}"] = member
    return found


FUNCTIONS = {
    name: function
    for module in MODULES
    for owner, value in public(module).items()
    for name, function in callables(owner, value).items()
}


def test_all_are_found():
    assert {"flashjax.sparse_matmul", "flashjax.SparseMatrix.from_dense"} <= set(
        FUNCTIONS
    )
    assert len(FUNCTIONS) > 100


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_every_argument_and_result_has_a_type(name):
    function = FUNCTIONS[name]
    parameters = list(inspect.signature(function).parameters.values())
    if "self" in (names := [p.name for p in parameters]) or "cls" in names:
        parameters = parameters[1:]
    for parameter in parameters:
        assert parameter.annotation is not parameter.empty, parameter.name
    hints = getattr(function, "__annotations__", {})
    assert "return" in hints or name.endswith(".__init__")
