"""An endpoint of OpenAI's protocol as an engine: `ultralong serve`, vLLM, SGLang or llama.cpp, here or elsewhere.

Prompts go to `/completions` as token ids, so that the endpoint reads exactly what other engines read; the tokenizer is
that of the model folder. Requests that time out or are refused for a while are repeated; others end the run, which can
be resumed.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from typing import Any
from urllib.parse import urlsplit

from transformers import PreTrainedTokenizerBase

from ultralong.data.chat.transport import answer_hooks, check_address, is_this_machine, read_key
from ultralong.inference.decoding import GREEDY, FinishReason, Sampling
from ultralong.inference.engines import Answer
from ultralong.utils.extras import require
from ultralong.utils.words import COVER

SHOWN = 1000  # characters of an error
RETRIES = 5  # with waits that double, as the client does
# How an answer that is none of the protocol shows: a page, a list of no choices, bytes that are no text.
ODD_ANSWER = (AttributeError, LookupError, TypeError, ValueError, RecursionError)
LARGEST_ANSWER = 1 << 24  # bytes
SECONDS = 3600.0  # for a whole answer: a million tokens are read in minutes


class OpenAIEngine:
    """An endpoint that answers one prompt at a time.

    Args:
        url: The endpoint's URL with its version, such as `http://localhost:8000/v1`.
        tokenizer: That of the model behind it.
        name: The model's name at the endpoint; None takes the only one that it lists.
        key_variable: Environment variable that holds the key; without it no key is sent.

    Raises:
        ImportError: The openai package is not installed.
        ValueError: The variable holds no key, the address is none, the endpoint cannot be reached, or it lists several
            models and no name was given.
    """

    def __init__(
        self, url: str, tokenizer: PreTrainedTokenizerBase, name: str | None = None, key_variable: str | None = None
    ) -> None:
        self._openai: Any = require("openai", extra="openai")
        check_address(url, key_variable)
        self._key = read_key(key_variable)
        # Texts and key stay with the endpoint: no redirect is followed, and no proxy of the environment is asked to
        # reach this machine.
        local = is_this_machine(urlsplit(url).hostname or "")
        self._client = self._openai.OpenAI(
            base_url=url,
            api_key=self._key or "none",
            max_retries=RETRIES,
            timeout=SECONDS,
            default_headers={"Accept-Encoding": "identity"},
            http_client=self._openai.DefaultHttpxClient(
                follow_redirects=False, trust_env=not local, event_hooks=answer_hooks(SECONDS, LARGEST_ANSWER)
            ),
        )
        weakref.finalize(self, self._client.close)  # its connections, as the package closes those of its own clients
        self.tokenizer, self.name = tokenizer, f"openai {url}"
        self._model = name or self._only_model(url)

    def max_batch(self, capacity: int) -> int:
        """See `Engine`."""
        return 1

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: Sequence[int],
        *,
        capacity: int | None = None,
        sampling: Sampling = GREEDY,
        stop: Collection[int] | None = None,
    ) -> list[Answer]:
        """See `Engine`: one after the other. The endpoint ends answers by its own stop tokens.

        Raises:
            ValueError: Other stop tokens were asked for, or the endpoint refuses a prompt or does not answer.
        """
        if stop is not None:
            raise ValueError("An endpoint ends answers by its model's own stop tokens: others can't be given.")
        options: dict[str, Any] = {"temperature": sampling.temperature}
        if sampling.temperature:
            options |= {"top_p": sampling.top_p, "seed": sampling.seed}
        answers = []
        for prompt, budget in zip(prompts, max_new_tokens, strict=True):
            try:
                said = self._client.completions.create(
                    model=self._model, prompt=list(prompt), max_tokens=budget, **options
                )
                choice, usage = said.choices[0], said.usage
                # A server that repeats the key would put it into the answers' file.
                text = choice.text if self._key is None else choice.text.replace(self._key, COVER)
                tokens = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            except self._openai.OpenAIError as error:
                raise ValueError(
                    f"{self.name} gave no answer to {len(prompt):,} tokens: {self._without_key(error)}"
                ) from None
            except ODD_ANSWER as error:
                raise ValueError(
                    f"{self.name} gave no answer of OpenAI's protocol to {len(prompt):,} tokens "
                    f"({self._without_key(error)})."
                ) from None
            reason: FinishReason = "stop" if choice.finish_reason == "stop" else "length"
            details = getattr(usage, "prompt_tokens_details", None)
            answers.append(Answer(text, tokens, reason, getattr(details, "cached_tokens", None) or 0))
        return answers

    def release(self) -> None:
        """See `Engine`: the endpoint keeps its memory."""

    def _without_key(self, error: Exception) -> str:
        """What an error says, on one line; an endpoint may repeat the key that it refuses."""
        said = f"{error} ({error.__cause__})" if isinstance(error.__cause__, ValueError) else str(error)
        said = said if self._key is None else said.replace(self._key, COVER)
        return " ".join(said.split())[:SHOWN] or type(error).__name__

    def _only_model(self, url: str) -> str:
        try:
            names = [model.id for model in self._client.models.list()]
        except (self._openai.OpenAIError, *ODD_ANSWER) as error:
            raise ValueError(f"{url} can't be asked for its models: {self._without_key(error)}") from None
        if names == [None]:
            raise ValueError(f"{url} lists a model without a name: say which with --endpoint-model.")
        if len(names) != 1:
            raise ValueError(f"{url} has the models {', '.join(map(str, names))}: say which with --endpoint-model.")
        return str(names[0])
