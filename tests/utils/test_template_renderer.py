"""Templates come with other people's checkpoints: one that runs on, by loops or in one operation, ends and is told."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from forked import fresh_renderer
from jinja2 import TemplateError

from ultralong.utils import template_renderer
from ultralong.utils.chat_template import apply_chat_template
from ultralong.utils.template_renderer import render_template

TALK = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
LOOPS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}",
    "{% macro f() %}{% for a in range(99999) %}{% for b in range(99999) %}{% if b < 0 %}x{% endif %}{% endfor %}"
    "{% endfor %}{% endmacro %}{{ f() }}",
    "{% set n = namespace(t=0) %}{% for a in range(99999) %}{% for b in range(99999) %}{% set n.t = n.t + 1 %}"
    "{% endfor %}{% endfor %}{{ n.t }}",
]
# One operation each, in C, which no thread of Python can cut in two.
ONE_OPERATION = [
    "{{ (9 ** (9 ** 8)) % 7 }}",
    "{{ 10 ** 99999999 }}",
    "{{ (3 ** 33333333) % 10 }}",
    "{{ (('x' * 2000000) ~ 'y') in (('x' * 60000000) ~ 'z') or 7 ** 9999999 }}",
]
TOO_LARGE = [
    "{{ 'a' * 10**10 }}",
    "{{ messages[0].content * 8000000000 }}",
    "{{ '%2000000000d' % 1 }}",
    "{{ '{:>2000000000}'.format(1) }}",
    "{{ 'a' | center(2000000000) }}",
    "{{ messages[0].content.ljust(2000000000) }}",
    "{{ ([0] * 999999999) | join }}",
    "{% set n = namespace(t='x') %}{% for a in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t | length }}",
]


@pytest.fixture(scope="module", autouse=True)
def _fresh():
    with fresh_renderer():
        yield


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(template_renderer, "LONGEST", 0.3)


def test_a_template_ends_though_who_asks_ignores_the_timer_s_signal(tiny_tokenizer, monkeypatch, soon):
    """Which a process that is started inherits."""
    monkeypatch.setattr(tiny_tokenizer, "chat_template", LOOPS[0])
    template_renderer._renderer.stop()
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    try:
        with pytest.raises(ValueError, match=r"did not end within 0.3 s"):
            apply_chat_template(tiny_tokenizer, TALK)
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("template", LOOPS)
def test_a_template_that_runs_on_is_refused(tiny_tokenizer, monkeypatch, soon, template):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"did not end within 0.3 s"):
        apply_chat_template(tiny_tokenizer, TALK, tokenize=False)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("template", ONE_OPERATION)
def test_one_operation_that_runs_on_is_refused(soon, template):
    start = time.monotonic()
    with pytest.raises((ValueError, TemplateError)):
        render_template(template, TALK)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("template", TOO_LARGE)
def test_a_text_that_is_too_large_is_refused(monkeypatch, template):
    """Here the process that renders may grow by 256 MiB; memory and time of this one stay as they are."""
    monkeypatch.setattr(template_renderer, "LARGEST", 2**28)
    with pytest.raises((ValueError, TemplateError), match=r"GiB of memory|not end within|range|too"):
        render_template(template, TALK)


def test_a_long_text_is_not_tokenised(monkeypatch):
    with pytest.raises(ValueError, match=r"writes 50,000,000 characters for a conversation of 15\."):
        render_template("{{ 'a' * 50000000 }}", TALK)


def test_any_thread_may_ask_and_a_refusal_stays_a_refusal(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    found = []

    def work() -> None:
        try:
            apply_chat_template(tiny_tokenizer, TALK, tokenize=False)
        except TemplateError as error:
            found.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == ["roles must alternate"] * 4


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{% for %}", "{{ ''.__class__.mro() }}"])
def test_what_goes_wrong_in_a_template_is_a_refusal(template):
    with pytest.raises(TemplateError):
        render_template(template, TALK)


def test_a_process_that_is_killed_is_started_again():
    assert render_template("{{ messages[0].content }}", TALK)[0] == "x"
    os.kill(template_renderer._renderer.child.pid, signal.SIGKILL)
    template_renderer._renderer.child.wait()
    assert render_template("{{ messages[1].content }}", TALK)[0] == "y"


def test_a_forked_process_asks_one_of_its_own():
    """Two that read one pipe would take each other's answers."""
    render_template("{{ messages[0].content }}", TALK)
    before = template_renderer._renderer.child.pid
    child = os.fork()
    if child == 0:
        same = render_template("{{ messages[0].content }}", TALK)[0] == "x"
        own = template_renderer._renderer.child.pid != before
        template_renderer._renderer.stop()
        os._exit(0 if same and own else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert render_template("{{ messages[1].content }}", TALK)[0] == "y"
    assert template_renderer._renderer.child.pid == before


MARKED = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}!"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.mark.parametrize("content", ["y", "", "two\n\nlines\n", " \u4f60\u597d {{ x }} {% raw %} \ud83d\ude00\n"])
def test_text_ids_and_masks_are_those_of_transformers(tiny_tokenizer, monkeypatch, content):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", MARKED)
    content = content.encode("utf-16", "surrogatepass").decode("utf-16")
    talk = [*TALK, {"role": "user", "content": content}, {"role": "assistant", "content": content + "z"}]
    ours, theirs = apply_chat_template, tiny_tokenizer.apply_chat_template
    for options in ({"tokenize": False}, {"tokenize": False, "add_generation_prompt": True}, {"tokenize": True}):
        assert ours(tiny_tokenizer, talk, **options) == theirs(talk, **{"return_dict": False, **options})
    whole = {"return_dict": True, "return_assistant_tokens_mask": True}
    assert dict(ours(tiny_tokenizer, talk, **whole)) == dict(theirs(talk, **whole))
