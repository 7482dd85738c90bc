"""RULER's thirteen tests (Hsieh et al. 2024, arXiv 2404.06654), without a ceiling on length.

Wording, structure and scores are NVIDIA's; names are lm-eval's. What differs, so that every length works and every
sample can be made alone:

* the size of a prompt is found by arithmetic instead of growing it step by step, and fills at least 97% of the limit;
* sentences are split by a rule of our own, because NLTK's model does not come with a package;
* a haystack starts again when it runs out, as in NVIDIA's current code (lm-eval's stops growing);
* in the question tasks, documents that hold the answer are never repeated, and their depth is drawn anew for every
  sample (NVIDIA's fixed shuffle puts all of them at one depth);
* worked examples stand in the user's turn, also with a chat template.
"""

from ultralong.evaluation.tasks.ruler.registry import RULER_TASKS

__all__ = ["RULER_TASKS"]
