"""While tests run, every function of the package refuses what its signature doesn't say."""

import pytest
import torch
from jaxtyping import TypeCheckError

from decouple_merge.evaluation.distances import FeatureStats, Moments, frechet_distance, frechet_of
from decouple_merge.evaluation.metrics import check_known
from decouple_merge.evaluation.references import Reference


def test_shapes_are_checked_of_functions_and_dataclasses() -> None:
    vector, matrix = torch.zeros(3), torch.zeros(3, 3)
    with pytest.raises(TypeCheckError, match=r"covariance_a.*d d"):
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
