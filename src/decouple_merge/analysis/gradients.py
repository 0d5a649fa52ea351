"""Gradients of the loss at single timesteps: whole, or sketched where they are too large to keep."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..merging.arithmetic import Tensors
from ..models.base import Base
from ..seeds import generator
from ..training.gradient import frozen_copy, loss_and_gradients, with_leaves
from .fixed import FixedImages

# Of the columns that are multiplied at once in float32; sums of such products are float64.
CHUNK = 2**14
MAX_BYTES = 4e9


def layer_of(key: str) -> str:
    """Name the layer of a tensor."""
    return key.rpartition(".")[0] or key


@dataclass(frozen=True)
class Sketch:
    """Gradients as rows of numbers, in groups of tensors.

    Whole, a row is all entries of the gradient. Sketched, a group is k numbers: its entries get random signs and those
    whose places are equal modulo k are added (the count sketch, Charikar et al. 2002). Inner products stay right on
    average; the error of a cosine c has a standard deviation of about (1 - c²)/√k.

    Attributes:
        groups: name to the keys of its tensors.
        size: k; None keeps the gradients whole. A prime, so that the period of no layer falls in with it.
    """

    groups: dict[str, list[str]]
    size: int | None
    seed: int

    def widths(self, leaves: Tensors) -> list[int]:
        """Count the numbers of each group."""
        if self.size is not None:
            return [self.size] * len(self.groups)
        return [sum(leaves[key].numel() for key in keys) for keys in self.groups.values()]

    def signs(self, leaves: Tensors) -> Tensors:
        """Draw the signs, int8; empty where the gradients stay whole."""
        if self.size is None:
            return {}
        return {
            key: torch.randint(0, 2, (leaf.numel(),), generator=generator(self.seed, "sketch", key), dtype=torch.int8)
            .mul_(2)
            .sub_(1)
            .to(leaf.device)
            for key, leaf in leaves.items()
        }

    def row(self, gradients: Tensors, signs: Tensors) -> Float[Tensor, " width"]:
        """Make a row of a gradient, float32 on the CPU."""
        parts: list[Tensor] = []
        for keys in self.groups.values():
            if self.size is None:
                parts += [gradients[key].flatten() for key in keys]
            else:
                folded = [self._folded(gradients[key].flatten() * signs[key]) for key in keys]
                parts.append(torch.stack(folded).sum(0))
        return torch.cat(parts).float().cpu()

    def _folded(self, flat: Tensor) -> Tensor:
        assert self.size is not None
        return torch.nn.functional.pad(flat, (0, -len(flat) % self.size)).view(-1, self.size).sum(0)


class GradientRows:
    """Computes rows of gradients of one network's mean loss over images, one timestep at a time."""

    def __init__(self, base: Base, weights: Tensors, sketch: Sketch, device: torch.device, batch_size: int) -> None:
        self.base, self.sketch, self.device, self.batch_size = base, sketch, device, batch_size
        self.network = frozen_copy(base, [weights], device)
        self.tensors, self.leaves = with_leaves({k: v.to(device) for k, v in weights.items()})
        self.signs = sketch.signs(self.leaves)

    def gradient(self, images: FixedImages, t: Tensor) -> Tensors:
        """Compute the gradient of the mean of ‖target - f(x_t, t)‖² over images, each at its own timestep."""
        total = [torch.zeros_like(leaf) for leaf in self.leaves.values()]
        for batch in images.batches(t, self.batch_size):
            scale = torch.tensor(len(batch.t) / len(images))
            _, found = loss_and_gradients(self.base, self.network, self.tensors, self.leaves, batch, scale, self.device)
            torch._foreach_add_(total, found)
        return dict(zip(self.leaves, total, strict=True))

    def halves(self, images: FixedImages, t: Tensor) -> tuple[Float[Tensor, "2 width"], Float[Tensor, " 2"]]:
        """Compute the rows of the images' two halves, and the squared norms of the whole gradients.

        Args:
            t: one for all images, or one for each image of a half.
        """
        half = len(images) // 2
        rows, norms = [], []
        for part in (images.part(0, half), images.part(half, 2 * half)):
            found = self.gradient(part, t.expand(half))
            rows.append(self.sketch.row(found, self.signs))
            norms.append(sum(float(g.double().square().sum()) for g in found.values()))
        return torch.stack(rows), torch.tensor(norms, dtype=torch.float64)


@dataclass(frozen=True)
class Grams:
    """Inner products of the gradients of two halves A, B of the images, float64 [T, T].

    Attributes:
        ab: ⟨A_i, B_j⟩.
    """

    aa: Float[Tensor, "t t"]
    bb: Float[Tensor, "t t"]
    ab: Float[Tensor, "t t"]

    def __add__(self, other: "Grams") -> "Grams":
        return Grams(self.aa + other.aa, self.bb + other.bb, self.ab + other.ab)

    def usual(self) -> Float[Tensor, "t t"]:
        """Compute the cosines of the gradients on all images; 0 where one is zero."""
        gram = (self.aa + self.bb + self.ab + self.ab.T) / 4
        norms = gram.diagonal().sqrt()
        return gram / torch.outer(norms, norms).clamp(min=torch.finfo(torch.float64).tiny)

    def halves(self) -> Float[Tensor, "t t"]:
        """Compute cosines that the noise of few images doesn't shrink, with the noise ceiling on the diagonal.

        cos_ij = (⟨A_i, B_j⟩ + ⟨A_j, B_i⟩) / 2 / √(⟨A_i, B_i⟩·⟨A_j, B_j⟩). A's and B's noise is independent, so that
        products of both keep only what they share. NaN where ⟨A_i, B_i⟩ is not above 0: there noise is all that was
        found. It may lie beyond ±1. The ceiling is the cosine of A_i and B_i: 1 is no noise.
        """
        shared = self.ab.diagonal()
        root = torch.where(shared > 0, shared, torch.nan).sqrt()
        cosines = (self.ab + self.ab.T) / 2 / torch.outer(root, root)
        ceiling = shared / (self.aa.diagonal() * self.bb.diagonal()).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        return cosines.diagonal_scatter(ceiling)


def grams_of(rows: Float[Tensor, "t 2 width"], widths: Sequence[int]) -> list[Grams]:
    """Compute the inner products of the rows in each group of columns."""
    found = []
    for columns in rows.split(list(widths), dim=2):
        sums = torch.zeros(3, len(rows), len(rows), dtype=torch.float64)
        for chunk in columns.split(CHUNK, dim=2):
            a, b = chunk.unbind(1)
            for total, (left, right) in zip(sums, ((a, a), (b, b), (a, b)), strict=True):
                total += (left @ right.T).double()
        found.append(Grams(*sums))
    return found


def sketch_of(weights: Tensors, num_rows: int, seed: int) -> Sketch:
    """Choose to keep whole as many gradients of two halves, or to sketch them where they are more than 4 GB."""
    keys = [key for key, value in weights.items() if value.is_floating_point()]
    num_bytes = 2 * 4 * num_rows * sum(weights[key].numel() for key in keys)
    return Sketch({"all": keys}, None if num_bytes <= MAX_BYTES else next_prime(4096), seed)


def next_prime(number: int) -> int:
    """Find the smallest prime that is not below a number."""
    while number < 2 or any(number % d == 0 for d in range(2, math.isqrt(number) + 1)):
        number += 1
    return number
