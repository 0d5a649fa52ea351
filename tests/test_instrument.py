"""While tests run, every function of the package refuses what its signature doesn't say."""

from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError

import instrument
from decouple_merge.evaluation.distances import FeatureStats, Moments, frechet_distance, frechet_of
from decouple_merge.evaluation.metrics import check_known
from decouple_merge.evaluation.references import Reference


def test_shapes_are_checked_of_functions_and_dataclasses() -> None:
    vector, matrix = torch.zeros(3), torch.zeros(3, 3)
    with pytest.raises(TypeCheckError, match=r"(?s)covariance_a.*d d"):
        frechet_distance(vector, torch.zeros(3, 4), vector, matrix)
    with pytest.raises(TypeCheckError):
        frechet_distance(vector, torch.zeros(4, 4), vector, matrix)
    with pytest.raises(TypeCheckError):
        Moments(vector, vector)


def test_types_are_checked_where_no_shape_is_said() -> None:
    with pytest.raises(TypeCheckError, match="metric"):
        check_known(3)
    with pytest.raises(TypeCheckError, match="real"):
        frechet_of(FeatureStats.empty(2), 3)
    with pytest.raises(TypeCheckError, match="num_images"):
        Reference("", "many", {}, {})


def test_an_inner_function_is_checked_each_time_it_is_made() -> None:
    def made(added: int) -> Any:
        def inner(number: int, *, times: int = 1) -> int:
            return number * times + added

        return instrument.checks_types(inner)

    one, two = made(1), made(2)
    assert (one(3), two(3), two(3, times=2)) == (4, 5, 8)
    for function in (one, two):
        with pytest.raises(TypeCheckError, match="number"):
            function("3")
