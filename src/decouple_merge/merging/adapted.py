"""A model as its base and an adapter: whole tensors only where and when they are asked for."""

from collections.abc import Iterator, Mapping

from torch import Tensor

# Of a base's key, the factors A [r, in, …] and B [out, r, …] of the change of its tensor [out, in, …].
Factors = Mapping[str, tuple[Tensor, Tensor]]


class Adapted(Mapping[str, Tensor]):
    """The weights θ + B·A under the base's keys (Hu et al. 2021), of which only B and A are held.

    Args:
        base: θ, by key.
        factors: B holds the scale.
    """

    def __init__(self, base: Mapping[str, Tensor], factors: Factors) -> None:
        self.base, self.factors = base, factors

    def version(self, key: str, start: Tensor) -> Tensor:
        """Make the model's tensor from the base's, on its device; where the adapter changes nothing it is the base's.

        Args:
            start: the base's tensor, [out, in, …].
        """
        if key not in self.factors:
            return start
        down, up = (factor.to(start.device) for factor in self.factors[key])
        return start + (up.flatten(1) @ down.flatten(1)).view_as(start)

    def __getitem__(self, key: str) -> Tensor:
        return self.version(key, self.base[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)
