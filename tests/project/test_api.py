"""The public API: instant to import, typed, and its docstrings' examples run in their order on the miniature."""

import dataclasses
import doctest
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
import typing

import pytest
from test_env import ROOT

import ultralong
from ultralong import api
from ultralong.cli.options import options_of
from ultralong.cli.table import COMMANDS

FUNCTIONS = [name for name in ultralong.__all__ if name != "__version__"]
IN_ORDER = list(api.__all__)  # the order in which the examples follow each other
HEAVY = {"torch", "transformers", "numpy", "yaml", "accelerate", "datasets"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the examples run: documents in `texts`, conversations in `talks.yaml`."""
    made = tmp_path_factory.mktemp("api")
    (made / "texts").mkdir()
    for number in range(8):
        (made / "texts" / f"{number}.txt").write_text(f"Chapter {number}. " + "It was a dark and stormy night. " * 60)
    talk = [{"role": "user", "content": "What is dark?"}, {"role": "assistant", "content": "The night is dark. " * 9}]
    (made / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for _ in range(40)))
    (made / "talks.yaml").write_text(
        "name: talks\ndescription: Talks.\nkind: chat\nsources:\n"
        "  - {name: own, license: CC0-1.0, path: talks.jsonl, read: {format: jsonl, field: messages}}\n"
    )
    return made


def test_the_examples_in_the_docstrings_run(folder, monkeypatch):
    """All in one process and in this order: what one makes, the next one takes."""
    monkeypatch.chdir(folder)
    for name in IN_ORDER:
        function, globs = getattr(ultralong, name), {n: getattr(api, n) for n in FUNCTIONS}
        (test,) = doctest.DocTestFinder(recurse=False).find(function, name, globs=globs)
        assert test.examples, f"{name} has no example"
        said = []
        result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
        assert result.failed == 0, "".join(said)


def test_the_example_of_the_package_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = []
    (test,) = doctest.DocTestFinder(recurse=False).find(ultralong, "ultralong", globs={})
    assert doctest.DocTestRunner().run(test, out=said.append).failed == 0, "".join(said)


def test_every_function_is_there_for_people_and_for_type_checkers():
    assert [name for name in IN_ORDER if name in FUNCTIONS] == IN_ORDER
    assert sorted(IN_ORDER) == sorted(FUNCTIONS)
    assert set(FUNCTIONS) <= set(dir(ultralong))
    stated = {
        line.rsplit(" ", 1)[-1]
        for line in (ROOT / "ultralong" / "__init__.py").read_text().splitlines()
        if line.startswith("    from ultralong.api import")
    }
    assert stated == set(FUNCTIONS)
    with pytest.raises(AttributeError, match="no attribute 'extnd'"):
        ultralong.extnd  # noqa: B018


def test_functions_stay_functions_when_every_package_is_imported():
    packages = [info.name for info in pkgutil.iter_modules(ultralong.__path__)]
    assert not set(packages) & set(FUNCTIONS), "a package of that name would take the function's place"
    for name in packages:
        if name not in ("cli", "__main__"):
            importlib.import_module(f"ultralong.{name}")
    assert all(inspect.isfunction(getattr(ultralong, name)) for name in FUNCTIONS)


def test_parameters_are_those_of_the_function_behind():
    """Same names and defaults, so that neither drifts from the other."""
    behind = {
        "extend": ("ultralong.checkpoints.extend", "extend"),
        "pack": ("ultralong.data.recipe.build", "pack_recipe"),
        "plan": ("ultralong.planner", "plan"),
        "check": ("ultralong.checkpoints.check", "check"),
        "merge": ("ultralong.checkpoints.merge", "merge"),
        "verify": ("ultralong.data.verify", "verify"),
        "make_attention_context": ("ultralong.attention", "make_attention_context"),
        "needle": ("ultralong.evaluation.runs.commands", "measure"),
        "perplexity": ("ultralong.evaluation.runs.commands", "measure"),
        "evaluate": ("ultralong.evaluation.runs.run", "run"),
    }
    for name, (module, function) in behind.items():
        theirs = inspect.signature(getattr(importlib.import_module(module), function)).parameters
        for parameter in inspect.signature(getattr(ultralong, name)).parameters.values():
            if parameter.name in theirs and parameter.default is not parameter.empty:
                assert parameter.default == theirs[parameter.name].default, f"{name}: {parameter.name}"


COMMANDS_OF = {
    "extend": "extend",
    "pack": "pack",
    "plan": "plan",
    "train": "train",
    "sft": "sft",
    "launch": "render_launch",
    "check": "check",
    "verify": "verify",
    "ablate": "ablate",
    "merge": "merge",
    "eval needle": "needle",
    "eval perplexity": "perplexity",
}


@pytest.mark.parametrize("command", COMMANDS_OF)
def test_a_command_and_its_function_take_the_same_options(command):
    """Same names and defaults; a command writes JSON, and takes as --set what the function takes as `changes`."""
    theirs = {option.name: option.default for option in options_of(COMMANDS[command])}
    ours = {
        name: dataclasses.MISSING if parameter.default is parameter.empty else parameter.default
        for name, parameter in inspect.signature(getattr(ultralong, COMMANDS_OF[command])).parameters.items()
    }
    assert set(theirs) - set(ours) <= {"json", "set"}
    assert set(ours) - set(theirs) <= {"changes"}
    assert {name: ours[name] for name in set(ours) & set(theirs)} == {
        name: theirs[name] for name in set(ours) & set(theirs)
    }


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_is_documented_and_typed(name):
    function = getattr(ultralong, name)
    section = inspect.getdoc(function).partition("Args:")[2].partition("Returns:")[0].partition("Raises:")[0]
    for parameter in inspect.signature(function).parameters.values():
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        assert f"    {stars}{parameter.name}: " in section, f"{name} does not explain {parameter.name}"
        assert parameter.annotation is not parameter.empty
    assert typing.cast(str, function.__annotations__["return"])


def test_importing_a_function_imports_nothing_heavy():
    script = "import sys\nfrom ultralong import extend, plan\nprint(*sorted({n.split('.')[0] for n in sys.modules}))"
    start = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    done = subprocess.run([sys.executable, "-S", "-c", start + script], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())
