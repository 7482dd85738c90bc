"""Training at length: one loop for continued pretraining and SFT, sharded, offloaded, resumed bit for bit.

`ultralong.training.loop.train` runs what a `ultralong.training.config.TrainConfig` says.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainResult:
    """What a run did.

    Attributes:
        model: The trained model, a plain Hugging Face folder.
        steps: Optimizer steps of the whole run, those before a resumption included.
        tokens: Tokens (inputs) of the whole run.
        loss: Mean loss per target over the last tenth of the steps, in nats.
        seconds: Wall time of this call, start-up and saving included.
    """

    model: str
    steps: int
    tokens: int
    loss: float
    seconds: float
