"""Types of settings that say which values are allowed; `Recipe` checks them. The largest ones keep work in bounds."""

from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

Amount = Annotated[int, Field(ge=0, le=10**9)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Width = Annotated[int, Field(ge=1, le=10**6)]
"""Of what is in memory as a whole: a layer, a batch, a block of rows."""
Side = Annotated[int, Field(ge=1, le=4096)]
"""In pixels."""
Epochs = Annotated[float, Field(ge=0, le=10**6)]

Share = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
NotNegative = Annotated[float, Field(ge=0, le=1e9)]
Positive = Annotated[float, Field(gt=0, le=1e9)]


def _ascending(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise PydanticCustomError("descending", "the smaller number first")
    return ends


Portion = Annotated[float, Field(gt=0, le=1)]
Shares = Annotated[tuple[Share, Share], AfterValidator(_ascending)]
Area = Annotated[tuple[Portion, Portion], AfterValidator(_ascending)]
"""Smallest and largest share of an image."""
Ratio = Annotated[tuple[Positive, Positive], AfterValidator(_ascending)]
"""Smallest and largest width by height."""
