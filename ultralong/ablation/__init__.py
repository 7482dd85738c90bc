"""Ablation studies: arms that differ from one base in named settings, measured on the same samples over seeds."""

from ultralong.ablation.price import price
from ultralong.ablation.run import ablate
from ultralong.ablation.study import Study, find_study, load_study

__all__ = ["Study", "ablate", "find_study", "load_study", "price"]
