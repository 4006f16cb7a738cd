"""Score calibration: two numbers that make P(yes) the share of relevant passages, on data like those they were fitted on."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Calibration(BaseModel):
    """P(yes) becomes sigmoid(margin / temperature + bias). The order of passages stays, for the temperature is positive."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    temperature: float = Field(gt=0)
    """Above 1 scores move towards the middle, below 1 away from it."""
    bias: float
    """Added to all; mostly it says how common relevant passages are among the candidates."""

    def apply(self, margin: float) -> float:
        """Return the calibrated logit of a margin."""
        return margin / self.temperature + self.bias
