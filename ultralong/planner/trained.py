"""Which of a planned model's parameters are trained: all of them, or LoRA's adapters beside frozen ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedConfig

from ultralong.planner.shapes import Shape
from ultralong.planner.traces.models import config_of
from ultralong.training.adapters.config import LoRAConfig
from ultralong.training.adapters.lora import TrainedParameters, count_trained
from ultralong.training.throughput import FROZEN_SHARE


@dataclass(frozen=True)
class PlannedParameters:
    """Parameters of a model in numbers.

    Attributes:
        trained: All that are trained.
        in_layers: Those of them that are in the decoder layers.
        frozen: All others.
        multiplied: Those that a token is multiplied with, a frozen one counted as two thirds (`throughput`).
        added: Those in the layers that the model itself does not have.
        in_four_bits: Frozen ones that are held in 4 bits, all in the layers.
        largest_in_four_bits: Those in the largest matrix.
    """

    trained: int
    in_layers: int
    frozen: int
    multiplied: float
    added: int = 0
    in_four_bits: int = 0
    largest_in_four_bits: int = 0

    @property
    def outside(self) -> int:
        """Trained parameters outside of the layers."""
        return self.trained - self.in_layers

    @property
    def head(self) -> bool:
        """Whether the head is trained, as it is where everything is."""
        return not self.frozen


def planned_parameters(model: PreTrainedConfig, shape: Shape, lora: LoRAConfig, outside: int) -> PlannedParameters:
    """Count what a run trains.

    Args:
        model: The model's config.
        shape: The model in numbers.
        lora: The run's adapters.
        outside: Parameters of the model outside of its layers.

    Raises:
        ImportError: There are adapters, and peft is not installed.
    """
    if not lora.on:
        return PlannedParameters(shape.parameters, shape.parameters - outside, 0, shape.multiplied)
    found = counted(model.to_json_string(use_diff=False), lora)
    multiplied = shape.multiplied * FROZEN_SHARE + found.trained_in_layers
    inside = found.trained_in_layers
    held = found.in_four_bits, found.largest_in_four_bits
    return PlannedParameters(found.trained, inside, found.frozen, multiplied, inside, *held)


@lru_cache(maxsize=32)
def counted(model: str, lora: LoRAConfig) -> TrainedParameters:
    """As `count_trained`, once for all the memory plans of a run: peft takes seconds to put its adapters in."""
    return count_trained(config_of(model), lora)
