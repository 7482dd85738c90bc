"""The asking program of the serving bench: `python -m ultralong.bench.serving.client`.

It reads one JSON object from its input (`port`, `model`, `vocabulary`, `warm` and `tokens` of prompts, `new_tokens`)
and writes one to its output, see `ask_all`. It is a process of its own, as a user's would be.
"""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any

from ultralong.utils.extras import require

FOLLOWING = 16  # tokens that the prompt has more when it is asked again
WARM_ANSWER = 8
SECONDS = 3600.0  # for a whole answer


def ask_all(asked: dict[str, Any]) -> dict[str, Any]:
    """Ask a server here: a short prompt that is not timed, the long one, and the long one with a little more.

    Args:
        asked: What this program reads.

    Returns:
        `asked` and `again_with_the_prompt_kept`, see `ask`.
    """
    client = require("openai", extra="openai").OpenAI(
        base_url=f"http://127.0.0.1:{asked['port']}/v1", api_key="none", max_retries=0, timeout=SECONDS
    )
    draw = random.Random(0)
    warm, prompt = (draw.choices(range(asked["vocabulary"]), k=asked[key]) for key in ("warm", "tokens"))
    more = prompt + draw.choices(range(asked["vocabulary"]), k=FOLLOWING)
    ask(client, asked["model"], warm, WARM_ANSWER)
    first = ask(client, asked["model"], prompt, asked["new_tokens"])
    print(json.dumps(first), file=sys.stderr, flush=True)  # minutes of work, kept if what follows fails
    return {"asked": first, "again_with_the_prompt_kept": ask(client, asked["model"], more, asked["new_tokens"])}


def ask(client: Any, model: str, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """One streamed answer, chosen greedily.

    Returns:
        `prompt_tokens`, `cached_tokens` and `new_tokens` as the server counts them, `seconds_to_first_token` from the
        request to the first text, and `tokens_per_second_after`: the other tokens over the time from there to the end.
    """
    begin = time.perf_counter()
    first, last, usage = 0.0, 0.0, None
    stream = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=new_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices and chunk.choices[0].text:
            last = time.perf_counter()
            first = first or last
    assert usage is not None, "the server counted nothing"
    return {
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": getattr(usage.prompt_tokens_details, "cached_tokens", 0) or 0,
        "new_tokens": usage.completion_tokens,
        "seconds_to_first_token": first - begin,
        "tokens_per_second_after": (usage.completion_tokens - 1) / (last - first),
    }


if __name__ == "__main__":
    print(json.dumps(ask_all(json.load(sys.stdin))))
