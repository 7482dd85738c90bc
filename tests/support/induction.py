"""A language model that needs no training: it continues as the text did the last time it stood at this point."""

from types import SimpleNamespace

import torch
from transformers import LlamaConfig


class InductionModel:
    """Predicts what followed the latest earlier occurrence of its last tokens, within a window of tokens.

    It answers needle questions whose answer prefix repeats the needle's own words, and fails once the needle lies
    further back than its window: a real outcome of a real search, so that a grid can be checked cell by cell.
    """

    def __init__(self, vocabulary: int, window: int | None = None, order: int = 6) -> None:
        self.vocabulary, self.window, self.order = vocabulary, window, order
        self.config = LlamaConfig(vocab_size=vocabulary, num_hidden_layers=1, eos_token_id=None)
        self.generation_config = SimpleNamespace(eos_token_id=None)
        self.device = torch.device("cpu")

    def eval(self):
        return self

    def modules(self):
        return iter(())  # it has no rotary module, as nothing of it depends on positions

    def forward(self, input_ids, past_key_values=None, use_cache=False, logits_to_keep=0):
        history = getattr(past_key_values, "history", input_ids[:, :0]) if use_cache else input_ids[:, :0]
        whole = torch.cat([history, input_ids], dim=1)
        if use_cache:
            past_key_values.history = whole
        keep = logits_to_keep or input_ids.shape[1]
        logits = torch.zeros(len(whole), keep, self.vocabulary)
        for row, tokens in enumerate(whole.tolist()):
            for place in range(keep):
                end = len(tokens) - keep + place + 1
                logits[row, place, self.next_token(tokens[:end])] = 1.0
        return SimpleNamespace(logits=logits)

    __call__ = forward

    def next_token(self, tokens: list[int]) -> int:
        tokens = tokens if self.window is None else tokens[-self.window :]
        for order in range(self.order, 0, -1):
            last = tokens[-order:]
            for start in range(len(tokens) - order - 1, -1, -1):
                if tokens[start : start + order] == last:
                    return tokens[start + order]
        return 0
