"""Walks through models of Flax NNX: the paths of their layers, and swapping these."""

from collections.abc import Callable, Iterator
from typing import Any

from flax import nnx


def check_model(op: str, model: Any) -> None:
    """Raises TypeError unless it is an NNX model."""
    if not isinstance(model, nnx.Module | list | tuple | dict):
        raise TypeError(
            f"{op}: expected an nnx.Module, or lists, tuples or dicts of them, got "
            f"{type(model).__name__}"
        )


def node_at(model: Any, path: str) -> Any:
    """The node of a model at a path such as "layers.3.fc1"; the model itself at ""."""
    node = model
    for part in path.split(".") if path else ():
        node = node[int(part)] if part.isdigit() else getattr(node, part)
    return node


def set_node(model: Any, path: str, node: Any) -> None:
    """Puts a layer where another one is, as an attribute of its parent."""
    parent, _, name = path.rpartition(".")
    setattr(node_at(model, parent), name, nnx.data(node))


def layers_of(
    node: Any, kind: type, path: str = "", active: frozenset[int] = frozenset()
) -> Iterator[tuple[str, Any]]:
    """Every path to every layer of exactly this type; a cycle is followed once."""
    if type(node) is kind:
        yield path, node
    elif id(node) not in active:
        for name, child in _children(node):
            child_path = f"{path}.{name}" if path else name
            yield from layers_of(child, kind, child_path, active | {id(node)})


def replace_layers(node: Any, kind: type, swap: Callable[[Any], Any]) -> Any:
    """Puts what `swap` gives in the place of layers of exactly this type.

    Returns:
      The model, changed in place; something new where the model itself is such a layer
      or a tuple of them.
    """
    return _replace(node, kind, swap, set())


def _children(node: Any) -> list[tuple[str, Any]]:
    if isinstance(node, nnx.Variable):
        return []
    if isinstance(node, nnx.Module):
        return [(k, v) for k, v in vars(node).items() if not k.startswith("_pytree_")]
    if isinstance(node, dict):
        return [(str(key), child) for key, child in node.items()]
    if hasattr(node, "_fields"):
        return list(zip(node._fields, node, strict=True))
    if isinstance(node, list | tuple):
        return [(str(i), child) for i, child in enumerate(node)]
    return []


def _replace(
    node: Any, kind: type, swap: Callable[[Any], Any], visited: set[int]
) -> Any:
    if type(node) is kind:
        return swap(node)
    if isinstance(node, tuple):
        new = [_replace(child, kind, swap, visited) for child in node]
        if all(a is b for a, b in zip(new, node, strict=True)):
            return node
        return type(node)(*new) if hasattr(node, "_fields") else type(node)(new)
    if id(node) in visited:
        return node
    visited.add(id(node))
    if isinstance(node, dict):
        for key, child in list(node.items()):
            node[key] = _replace(child, kind, swap, visited)
    elif isinstance(node, list):
        node[:] = [_replace(child, kind, swap, visited) for child in node]
    else:
        for name, child in _children(node):
            new = _replace(child, kind, swap, visited)
            if new is not child:
                setattr(node, name, nnx.data(new))
    return node
