"""Numbers of a config: finite, as wide as a tensor holds, and nothing else that pydantic would take for one."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from ..errors import UserError

MAX_INTEGER, MAX_FLOAT = 2**63 - 1, 3.4e38


def _number(value: Any) -> Any:
    """Refuse what isn't written as a number, or is more than torch holds; the section refuses NaN and infinity."""
    if isinstance(value, bool | str | bytes):
        raise UserError("expected a number")
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise UserError(f"expected an integer of at most {MAX_INTEGER}")
    if isinstance(value, float) and MAX_FLOAT < abs(value) < float("inf"):
        raise UserError(f"expected a number of at most {MAX_FLOAT:g}")
    # A negative zero would be another number in hashes and records.
    return 0.0 if isinstance(value, float) and value == 0 else value


Integer = Annotated[int, BeforeValidator(_number)]
PositiveInt = Annotated[Integer, Field(gt=0)]
NonNegativeInt = Annotated[Integer, Field(ge=0)]
Number = Annotated[float, BeforeValidator(_number)]
PositiveFloat = Annotated[Number, Field(gt=0)]
NonNegativeFloat = Annotated[Number, Field(ge=0)]
# A decay of a moving average: at 1 nothing would ever change.
Decay = Annotated[Number, Field(ge=0, lt=1)]
