"""Values with tensors as plain bytes, for a pipe between processes; torch itself would take shared memory."""

import io
import pickle
from typing import Any

import torch
from torch import Tensor

from .tensors import raw_bytes


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return _tensor, (bytes(raw_bytes(value)), value.dtype, tuple(value.shape))
        return NotImplemented


def pack(value: Any) -> bytes:
    """Pickle a value for a process of this same program; tensors arrive as copies on the CPU."""
    packed = io.BytesIO()
    _Pickler(packed, pickle.HIGHEST_PROTOCOL).dump(value)
    return packed.getvalue()


def unpack(packed: bytes) -> Any:
    """Read what ``pack`` made; of a file or of anything that a user gave it is never called."""
    return pickle.loads(packed)


def _tensor(content: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    # Of no bytes torch makes no buffer.
    return torch.frombuffer(bytearray(content), dtype=dtype).view(shape) if content else torch.empty(shape, dtype=dtype)
