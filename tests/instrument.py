"""Types are checked by beartype alone where no shape is said: jaxtyping's own checks take a tenth of a ms a call."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype

checks_shapes = jaxtyping.jaxtyped
by_beartype = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))
# Of each function's code: the annotations that checks were written for, and the function with these checks.
written: dict[CodeType, tuple[dict[str, Any], FunctionType]] = {}


def checks_types(function: FunctionType) -> Callable[..., Any]:
    """Have beartype check a function; checks of an inner function, which is made at every call, are written once."""
    annotations = inspect.get_annotations(function)
    known, checked = written.get(function.__code__, (None, function))
    if known != annotations:
        checked = by_beartype(function)
        # Where nothing is to be checked, beartype returns the function as it is.
        if checked is not function:
            written[function.__code__] = annotations, checked
        return checked
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
