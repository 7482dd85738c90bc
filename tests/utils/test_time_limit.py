"""Templates come with other people's checkpoints: one whose loops run on is refused, in any thread."""

from __future__ import annotations

import resource
import threading
import time

import pytest

from ultralong.utils import chat_template
from ultralong.utils.chat_template import apply_chat_template
from ultralong.utils.time_limit import resident_bytes, time_limit

TALK = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
LOOPS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}",
    "{% macro f() %}{% for a in range(99999) %}{% for b in range(99999) %}{% if b < 0 %}x{% endif %}{% endfor %}"
    "{% endfor %}{% endmacro %}{{ f() }}",
    "{% set n = namespace(t=0) %}{% for a in range(99999) %}{% for b in range(99999) %}{% set n.t = n.t + 1 %}"
    "{% endfor %}{% endfor %}{{ n.t }}",
]


@pytest.mark.parametrize("template", LOOPS)
@pytest.mark.parametrize("place", ["here", "in a thread"])
def test_a_template_that_runs_on_is_refused(tiny_tokenizer, monkeypatch, template, place):
    monkeypatch.setattr(chat_template, "LONGEST", 0.5)
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    found = []

    def work() -> None:
        try:
            apply_chat_template(tiny_tokenizer, TALK, tokenize=False)
        except ValueError as error:
            found.append(str(error))

    start = time.monotonic()
    if place == "here":
        work()
    else:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(60)
    assert found == ["the chat template did not end within 0.5 s and 4 GiB: its loops run on."]
    assert time.monotonic() - start < 30


def test_a_template_whose_text_grows_without_end_is_refused(tiny_tokenizer, monkeypatch):
    grows = (
        "{% set n = namespace(t='x' * 4000000) %}{% set m = n.t %}{% for a in range(99999) %}{% set n.t = n.t ~ m %}"
    )
    monkeypatch.setattr(chat_template, "LARGEST", 2**26)
    monkeypatch.setattr(chat_template, "LONGEST", 300.0)  # so that it is memory that ends it
    monkeypatch.setattr(tiny_tokenizer, "chat_template", grows + "{% endfor %}")
    with pytest.raises(ValueError, match=r"did not end within 300 s and 0.0625 GiB"):
        apply_chat_template(tiny_tokenizer, TALK, tokenize=False)


def test_memory_is_counted_as_the_system_counts_it():
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert 2**24 < resident_bytes() <= 1.05 * most


def test_what_ends_in_time_is_left_alone(tiny_tokenizer):
    text = apply_chat_template(tiny_tokenizer, TALK, tokenize=False)
    assert text == tiny_tokenizer.apply_chat_template(TALK, tokenize=False)
    for _ in range(300):
        with time_limit(0.3, "no"):
            pass
    time.sleep(0.6)  # nothing comes late
    with time_limit(30, "no"), time_limit(0.01, "the outer counts"):
        time.sleep(0.5)


def test_other_errors_pass_through():
    with pytest.raises(KeyError, match="mine"), time_limit(30, "no"):
        raise KeyError("mine")
