"""Every signature is checked by beartype, in a scope of jaxtyping where a shape is said.

jaxtyping's own decorator writes two functions for each to have it say more of what is wrong: that takes three times as
long to import, and twice to call.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype

by_jaxtyping = jaxtyping.jaxtyped
by_beartype = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))
# Of an inner function's code: the annotations that checks were written for, and a stand-in with these checks.
written: dict[CodeType, tuple[dict[str, Any], FunctionType]] = {}


def checks_types(function: FunctionType) -> Callable[..., Any]:
    """Have beartype check a function; checks of an inner one, which is made at every call, are written once."""
    if "<locals>" not in function.__qualname__:
        return by_beartype(function)
    annotations = inspect.get_annotations(function)
    known, checked = written.get(function.__code__, (None, function))
    if known != annotations:
        # One without what the function closes over, which would otherwise never leave memory.
        cells = tuple(CellType() for _ in function.__code__.co_freevars)
        stand_in = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
        stand_in.__qualname__, stand_in.__annotations__ = function.__qualname__, annotations
        checked = by_beartype(stand_in)
        written[function.__code__] = annotations, checked
    # Where nothing is to be checked, beartype returns the function as it is.
    if checked.__code__ is function.__code__:
        return function
    again = FunctionType(checked.__code__, checked.__globals__)
    again.__kwdefaults__ = {**checked.__kwdefaults__, "__beartype_func": function}
    return functools.update_wrapper(again, function)


def shapes(annotation: Any) -> Iterator[Any]:
    """Yield the shapes anywhere in an annotation, and annotations that are strings, which may hold some."""
    parts = annotation if isinstance(annotation, list) else get_args(annotation)
    if isinstance(annotation, str) or (inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray)):
        yield annotation
    for part in parts:
        yield from shapes(part)


def checks_shapes(function: FunctionType) -> Callable[..., Any]:
    """Have beartype check a function whose dimensions of one name are to be equal."""
    checked, scope = by_beartype(function), by_jaxtyping("context")

    @functools.wraps(function)
    def scoped(*args: Any, **options: Any) -> Any:
        with scope:
            return checked(*args, **options)

    return scoped


def jaxtyped(*, typechecker: Any) -> Any:
    """Stand in for the decorator that jaxtyping's import hook puts on every function and class."""

    def decorate(subject: Any) -> Any:
        if inspect.isfunction(subject):
            said = [s for annotation in inspect.get_annotations(subject).values() for s in shapes(annotation)]
            if not said:
                return checks_types(subject)
            # Dimensions that arguments give, and values that are yielded later, are jaxtyping's own affair.
            if not inspect.isgeneratorfunction(subject) and not any("{" in getattr(s, "dim_str", "{") for s in said):
                return checks_shapes(subject)
        if dataclasses.is_dataclass(subject) and "__init__" in vars(subject):
            subject.__init__ = decorate(subject.__init__)
            return subject
        return by_jaxtyping(subject, typechecker=typechecker)

    return decorate


def install() -> None:
    """Take the place of jaxtyping's decorator in what is imported from now on."""
    jaxtyping.jaxtyped = jaxtyped
