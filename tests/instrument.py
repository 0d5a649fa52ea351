"""Types are checked by beartype alone where no shape is said: jaxtyping's own checks take a tenth of a ms a call."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import CellType, CodeType, FunctionType
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype

checks_shapes = jaxtyping.jaxtyped
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


def names_shapes(annotation: Any) -> bool:
    """Say whether a shape is anywhere in an annotation, or may be in one that is a string."""
    if isinstance(annotation, str):
        return True
    parts = annotation if isinstance(annotation, list) else get_args(annotation)
    is_shape = inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray)
    return is_shape or any(map(names_shapes, parts))


def jaxtyped(*, typechecker: Any) -> Any:
    """Stand in for the decorator that jaxtyping's import hook puts on every function and class."""

    def decorate(subject: Any) -> Any:
        if inspect.isfunction(subject) and not any(map(names_shapes, inspect.get_annotations(subject).values())):
            return checks_types(subject)
        if dataclasses.is_dataclass(subject) and "__init__" in vars(subject):
            subject.__init__ = decorate(subject.__init__)
            return subject
        return checks_shapes(subject, typechecker=typechecker)

    return decorate


def install() -> None:
    """Take the place of jaxtyping's decorator in what is imported from now on."""
    jaxtyping.jaxtyped = jaxtyped
