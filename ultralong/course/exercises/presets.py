"""A preset with a learner's changes, for exercises whose answer is such changes."""

from __future__ import annotations

import json
import re
from typing import Any

from ultralong.training.config import TrainConfig, preset
from ultralong.utils import settings


def changed_preset(name: str, changes: Any) -> TrainConfig:
    """A preset with changes, as `--set` and `load_config` take them.

    Raises:
        AssertionError: No dict, or the trainer refuses it; the message is for the learner.
    """
    assert isinstance(changes, dict), f"Give a dict of keys and values, as --set takes them; found {changes!r}."
    try:
        wanted = [f"{key}={json.dumps(value, default=str)}" for key, value in changes.items()]
        return settings.load(TrainConfig, preset(name), wanted)
    except (ValueError, TypeError) as error:
        said = re.sub(r"\S+/(\S+\.yaml)", r"\1", " ".join(str(error).split()))
        raise AssertionError(f"The trainer refuses it: {said}") from error
