# SPDX-License-Identifier: Apache-2.0
"""Token-reduction methods by name: one file in this folder is one method.

A file without an underscore defines `REDUCER`, a class derived from `tokens.Reducer`; its docstring
says what it has to do. The contract tests pick it up from here.
"""

import dataclasses
import importlib
import pkgutil
import types
import typing
from collections.abc import Mapping

import flax.linen as nn

from evit_jax.errors import InputError, check_name, check_names
from evit_jax.reducers._scores import OF_CLASS_TOKEN, SCORES
from evit_jax.spec import parse_fields
from evit_jax.tokens import Reducer


def known_reducers() -> list[str]:
    """The names of all methods: the files in this folder but for those that begin with "_"."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in names if not name.startswith("_"))


def create_reducer(spec: str | Mapping | Reducer) -> Reducer:
    """Builds a reducer from "evit", "evit:fuse=False" or dict(name="evit", fuse=False).

    Raises:
      InputError: an unknown method or field, naming the closest known one.
    """
    if isinstance(spec, Reducer):
        return spec
    if isinstance(spec, str):
        name, _, rest = spec.partition(":")
        fields = parse_fields(rest)
    else:
        fields = dict(spec)
        name = fields.pop("name", None)
        if name is None:
            raise InputError(f'a reducer needs a name, as in dict(name="evit"), got {dict(spec)}')
    check_name("reducer", name, known_reducers())
    method = importlib.import_module(f"{__name__}.{name}").REDUCER
    known = {field.name: field.type for field in dataclasses.fields(method)}
    check_names(f"field of {name}", fields, known)
    fields = {key: check_type(f"{name}'s {key}", fields[key], known[key]) for key in fields}
    if issubclass(method, nn.Module):  # which made in a model's method would become its child
        fields["parent"] = None
    return method(**fields)


def without_class_token() -> str:
    """For messages: the methods that need no class token, and what makes the others do without."""
    methods = {name: create_reducer(name) for name in known_reducers()}
    free = [name for name, method in methods.items() if not method.reads_class_token]
    ranking = [name for name in methods if name not in free]
    scores = [score for score in SCORES if score not in (*OF_CLASS_TOKEN, "probe")]
    return (
        f"{', '.join(free)} do without, and {', '.join(ranking)} with another `by`: "
        f"{', '.join(scores)}, or probe with map pooling, as in {ranking[0]}:by={scores[0]}"
    )


def written(spec: str | Mapping) -> str:
    """dict(name="evit", fuse=False) -> "evit:fuse=False"; what was learned is not written out."""
    if isinstance(spec, str):
        return spec
    fields = {name: as_tuple(value) for name, value in spec.items() if name != "name"}
    texts = [
        f"{name}=..." if isinstance(value, tuple) and len(value) > 4 else f"{name}={value}"
        for name, value in fields.items()
    ]
    return spec["name"] + (":" + ",".join(texts) if texts else "")


def as_spec(reducer: Reducer) -> str | dict:
    """What `create_reducer` makes this reducer of: its name, or a dict with what is not default."""
    name = type(reducer).__module__.rpartition(".")[2]
    changed = {
        field.name: getattr(reducer, field.name)
        for field in dataclasses.fields(reducer)
        if field.init and field.name not in ("parent", "name")
        if getattr(reducer, field.name) != field.default
    }
    return dict(name=name) | changed if changed else name


def as_tuple(value):
    """Lists, also inside of lists, as tuples: they can be hashed."""
    return tuple(map(as_tuple, value)) if isinstance(value, (list, tuple)) else value


def check_type(what: str, value, kind):
    """Returns a value of the annotated type, a list as a tuple; raises InputError for another."""
    value = as_tuple(value)
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    kinds = [typing.get_origin(one) or one for one in options]
    if type(value) in kinds or (type(value) is int and float in kinds):
        return value
    raise InputError(
        f"{what} must be of type {' or '.join(k.__name__ for k in kinds)}, got {value!r}"
    )
