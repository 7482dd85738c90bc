"""A budget in tokens or money that several threads draw on and that is never exceeded."""

from __future__ import annotations

import threading


class Budget:
    """Tokens and money, spent and set aside; safe to use from several threads.

    Args:
        tokens: Tokens of prompts and answers together; None is no limit.
        money: Money; None is no limit.
        prompt_price: Money for a million tokens of prompt.
        answer_price: Money for a million tokens of answer.
        spent: Tokens of prompts and of answers that were used before.

    Attributes:
        prompt: Tokens of prompts used.
        answer: Tokens of answers used.
    """

    def __init__(
        self,
        tokens: int | None = None,
        money: float | None = None,
        prompt_price: float = 0.0,
        answer_price: float = 0.0,
        *,
        spent: tuple[int, int] = (0, 0),
    ) -> None:
        self.most_tokens, self.most_money = tokens, money
        self.prices = (prompt_price, answer_price)
        self.prompt, self.answer = spent
        self._aside = [0, 0]
        self._lock = threading.Lock()

    @property
    def tokens(self) -> int:
        """Tokens used."""
        return self.prompt + self.answer

    @property
    def money(self) -> float:
        """Money used."""
        return self._price(self.prompt, self.answer)

    def reserve(self, prompt: int, answer: int) -> bool:
        """Reserve what a request costs at most; False when that is more than is left."""
        with self._lock:
            most = (self.prompt + self._aside[0] + prompt, self.answer + self._aside[1] + answer)
            over = self.most_tokens is not None and sum(most) > self.most_tokens
            over |= self.most_money is not None and self._price(*most) > self.most_money
            if over:
                return False
            self._aside[0] += prompt
            self._aside[1] += answer
            return True

    def settle(self, aside: tuple[int, int], used: tuple[int, int]) -> None:
        """Book what a request used in place of what was set aside for it."""
        with self._lock:
            self._aside[0] -= aside[0]
            self._aside[1] -= aside[1]
            self.prompt += used[0]
            self.answer += used[1]

    def _price(self, prompt: int, answer: int) -> float:
        return (prompt * self.prices[0] + answer * self.prices[1]) / 1e6
