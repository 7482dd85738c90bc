"""Ablation studies: arms that differ from one base in named settings, measured on the same samples over seeds.

An arm is the recipe's chain: rescale, continue pretraining, average with the start (`start_share`), SFT on short
conversations (`sft`), average again (`sft.start_share`); each part may be left out. `design` holds the keys of a study,
`keys` and `resolve` the names under which what arms share is built once, `build` builds it, `results` compares.
"""

from ultralong.ablation.price import price
from ultralong.ablation.run import ablate
from ultralong.ablation.study import Study, find_study, load_study

__all__ = ["Study", "ablate", "find_study", "load_study", "price"]
