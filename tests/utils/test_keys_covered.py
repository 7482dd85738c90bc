"""Keys and passwords are covered in what is printed and written, whoever put them into a text."""

from __future__ import annotations

import os

import pytest
from forked import forked_command

from ultralong import miniature
from ultralong.data.chat.transport import check_address, read_key
from ultralong.evaluation.runs.settings import RunSettings
from ultralong.inference.server.settings import ServeSettings
from ultralong.utils.words import check_variable, covered, secrets_of

KEYS = ("sk-abcdefghij0123456789", "hf_abcdefghijABCDEFGHIJ0123", "AIzaSyA0123456789abcdef", "a key")


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "OPENAI_API_KEY", "MY_SECRET", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY", "wandb_api_key"]
)
def test_values_of_variables_that_are_named_as_secrets_are(name):
    found = secrets_of({name: "very-secret-1", "HOME": "/home/someone", "TOKENIZERS_PARALLELISM": "false-false"})
    assert found == ("very-secret-1",)
    assert covered("401: very-secret-1 is wrong", found) == "401: *** is wrong"


def test_short_values_and_paths_are_no_secrets(tmp_path):
    assert secrets_of({"A_KEY": "short", "SSH_KEY": str(tmp_path), "B_TOKEN": ""}) == ()


def test_the_longest_secret_is_covered_first():
    found = secrets_of({"A_KEY": "abcdefgh", "B_KEY": "abcdefgh-and-more"})
    assert covered("abcdefgh-and-more, abcdefgh", found) == "***, ***"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:pass@host:80/x", "http://***@host:80/x"),
        ("via https://token@host and http://a:b@c", "via https://***@host and http://***@c"),
        ("socks5://u:p%40@h", "socks5://***@h"),
        ("https://host/a@b", "https://host/a@b"),
        ("write to me@host", "write to me@host"),
    ],
)
def test_passwords_in_addresses(text, shown):
    assert covered(text) == shown


@pytest.mark.parametrize("key", KEYS)
def test_a_key_in_the_place_of_its_variables_name_is_not_repeated(key):
    makers = (
        lambda: check_variable(key),
        lambda: read_key(key),
        lambda: check_address("https://host/v1", key),
        lambda: ServeSettings("m", key_variable=key),
        lambda: RunSettings("m", ("needle",), engine="openai", endpoint="https://h/v1", key_variable=key),
    )
    for make in makers:
        with pytest.raises(ValueError, match="is the name of an environment variable") as told:
            make()
        assert key not in str(told.value)


def test_names_of_variables_are_taken():
    for name in (None, "OPENAI_API_KEY", "my_key", "_K2"):
        check_variable(name)


def test_an_address_without_a_scheme_is_told_without_its_password():
    with pytest.raises(ValueError, match="found 'h:80'") as told:
        check_address("someone:hidden@h:80", None)
    assert "hidden" not in str(told.value)


@pytest.mark.parametrize(
    "words",
    [
        ("extend", "https://u:PASSWORD-1@host/x/y", "--to", "4k", "--out", "o"),
        ("check", "https://u:PASSWORD-1@host/x/y"),
        ("check", "TOKEN-VALUE-2"),
        (
            "pack",
            "PASSWORD-1@/x",
            "--tokenizer",
            "https://PASSWORD-1@h/x",
            "--length",
            "64",
            "--out",
            "o",
            "--traceback",
        ),
    ],
)
def test_commands_print_no_secret(tmp_path, words):
    environment = {**os.environ, "HF_TOKEN": "TOKEN-VALUE-2", "MY_PASSWORD": "PASSWORD-1"}
    done = forked_command(*words, cwd=tmp_path, env=environment)
    assert done.returncode == 1
    assert "***" in done.stderr
    for secret in ("PASSWORD-1", "TOKEN-VALUE-2"):
        assert secret not in done.stdout + done.stderr


def test_what_is_no_secret_is_printed(tmp_path):
    done = forked_command("check", miniature.path(), cwd=tmp_path, env={**os.environ, "HF_TOKEN": "TOKEN-VALUE-2"})
    assert done.returncode == 0
    assert "***" not in done.stdout
