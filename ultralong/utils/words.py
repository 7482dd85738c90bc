"""Words that people give: paths with a `~` that no shell has seen, words that are none, keys that nothing may show.

What is printed has keys, tokens and passwords covered, whoever put them into a text: a library's error may hold a
proxy's address with its password, a server's answer the key that it was sent.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

COVER = "***"
SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)$")
SHORTEST = 8  # characters of a value that is covered: a shorter one stands in too many texts by chance
IN_ADDRESS = re.compile(r"(?<=://)[^/\s@]+@")
LIKE_A_KEY = re.compile(r"(hf|sk|pk|gsk|xai|ghp|gho|glpat|AIza|AKIA|nvapi|r8|api)[-_]?[A-Za-z0-9_-]{12,}")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def expand_home(settings: Any, *names: str) -> None:
    """Put the home folder in the place of a leading `~` in fields of a frozen dataclass; for its `__post_init__`.

    Args:
        settings: The dataclass.
        names: Fields that hold a path, or a hub id, or None.

    Raises:
        ValueError: One is empty, which as a path would be the current folder.
    """
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, str) and not value.strip():
            raise ValueError(f"{name} is empty: name what is meant, or leave it out.")
        if isinstance(value, str) and value.startswith("~"):
            object.__setattr__(settings, name, os.path.expanduser(value))


def expand_word(word: str) -> str:
    """A word of a command line with `~` expanded where shells leave it: in `--option=~/path`, and where none ran."""
    option, equals, value = word.partition("=")
    if equals and option.startswith("--") and value.startswith("~/"):
        return f"{option}={os.path.expanduser(value)}"
    return os.path.expanduser(word) if word.startswith("~/") else word


def odd_word(words: Sequence[str]) -> str | None:
    """What is wrong with a word of a command line that nothing can take; None where each is a text.

    An empty one is a variable that was not set: as a folder it would be the current one, as a file none at all.
    """
    for number, word in enumerate(words, start=1):
        option, _, value = word.partition("=")
        if not word.strip() or (option.startswith("--") and "=" in word and not value.strip()):
            return f"word {number} is empty{f' ({option}=)' if word.strip() else ''}: a variable that is not set?"
        try:
            word.encode("utf-8")
        except UnicodeEncodeError:
            encoding = sys.getfilesystemencoding()
            if encoding != "utf-8" and _is_utf8(word):
                return f"word {number} is UTF-8, and this locale's encoding is {encoding}: set LC_ALL=C.UTF-8."
            return f"word {number} is no UTF-8: rename the file or folder, as its name is written into records."
    return None


def _is_utf8(word: str) -> bool:
    """Whether the bytes of a word that Python took from a command line are UTF-8."""
    try:
        os.fsencode(word).decode("utf-8")
    except UnicodeError:
        return False
    return True


def secrets_of(environment: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Values of environment variables that are named as secrets are, such as HF_TOKEN; paths of files are none.

    Args:
        environment: None is this process's.
    """
    found = os.environ if environment is None else environment
    named = {value for name, value in found.items() if SECRET_NAME.search(name.upper()) and len(value) >= SHORTEST}
    # The longest first, as one may be a part of another.
    return tuple(sorted((value for value in named if not os.path.exists(value)), key=len, reverse=True))


def covered(text: str, secrets: tuple[str, ...] = ()) -> str:
    """The text without the secrets, and without names and passwords in addresses (`https://user:password@host`)."""
    if "://" in text:
        text = IN_ADDRESS.sub(COVER + "@", text)
    for secret in secrets:
        text = text.replace(secret, COVER)
    return text


def check_variable(name: str | None) -> None:
    """Refuse what is no name of an environment variable: people give the key itself, which settings would then keep.

    Raises:
        ValueError: It is none; the message does not hold it.
    """
    if name is not None and (not VARIABLE.fullmatch(name) or LIKE_A_KEY.fullmatch(name)):
        raise ValueError(
            "key_variable is the name of an environment variable, such as OPENAI_API_KEY, and what was given is none. "
            "If it is the key itself: put it into a variable, and give that one's name."
        )
