"""The public API: instant to import, typed, and its docstrings' examples run in their order on the miniature."""

import ast
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
        "needle": ("ultralong.evaluation.runs.commands", "measure_one"),
        "perplexity": ("ultralong.evaluation.runs.commands", "measure_one"),
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
    "eval run": "evaluate",
}


@pytest.mark.parametrize("command", COMMANDS_OF)
def test_an_option_is_declared_by_the_function_alone(command):
    """A command gets the function itself: names, types, defaults and help texts come from there."""
    work, function = COMMANDS[command], getattr(ultralong, COMMANDS_OF[command])
    groups = work.__dict__["groups"]
    mine = [group for group in groups.values() if group.load() is function]
    assert len(mine) == 1, "the command does not call the function"
    assert set(inspect.signature(work).parameters) - set(groups) == {"json"}, "it declares an option of its own"
    shown = {option.name: option for option in options_of(work)}
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in mine[0].left_out and parameter.kind is not parameter.VAR_KEYWORD:
            default = dataclasses.MISSING if parameter.default is parameter.empty else parameter.default
            assert shown[mine[0].names.get(name, name)].default == default


# What a command asks of a function of the API's rooms that has no place in the order of the steps, and its own options.
OTHERS = {
    "data build": ("make:pack", set()),
    "data stats": ("texts:count_lengths", {"picture"}),
    "data show": ("texts:view_row", {"most", "colour", "html"}),
    "data decontaminate": ("texts:decontaminate", set()),
    "data merge": ("texts:merge_stores", set()),
    "eval loss": ("answers:row_loss", set()),
    "eval longppl": ("answers:longppl", set()),
    "eval make": ("answers:write_samples", set()),
    "eval answer": ("answers:answer", set()),
    "export gguf": ("make:export_gguf", set()),
    "launch rehearse": ("hosts:rehearse", set()),
}


@pytest.mark.parametrize("command", OTHERS)
def test_the_other_commands_get_their_function_too(command):
    place, own = OTHERS[command]
    work = COMMANDS[command]
    (group,) = work.__dict__["groups"].values()
    assert group.place == f"ultralong.api.{place}"
    assert set(inspect.signature(work).parameters) - {"work", "json"} == own
    assert {option.name for option in options_of(work)} >= {*own, "json"}


NOT_GIVEN = ("None", "()", "False", "'auto'")  # defaults that leave the choice to what is called


def declared_again(tree):
    """Options with a default in a command, handed to a parameter of the library that has a default of its own."""
    for node, own in functions_of(tree):
        pairs = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
        with_default = {one.arg for one, value in pairs if value is not None and ast.unparse(value) not in NOT_GIVEN}
        imported = {
            alias.asname or alias.name: (one.module, alias.name)
            for one in ast.walk(node)
            if isinstance(one, ast.ImportFrom) and (one.module or "").startswith("ultralong")
            for alias in one.names
        }
        for call in (one for one in ast.walk(node) if isinstance(one, ast.Call)):
            if not (isinstance(call.func, ast.Name) and call.func.id in imported):
                continue
            module, name = imported[call.func.id]
            parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
            handed = [*zip(parameters, call.args), *((word.arg, word.value) for word in call.keywords)]
            for parameter, value in handed:
                given = {one.id for one in ast.walk(value) if isinstance(one, ast.Name)} & with_default & own
                if parameter in parameters and parameters[parameter].default is not inspect.Parameter.empty:
                    yield from ((node.name, option) for option in sorted(given))


def test_no_default_of_a_command_is_declared_by_the_library_again():
    files = sorted((ROOT / "ultralong" / "cli").glob("*.py"))
    assert not [
        (file.name, *found) for file in files for found in declared_again(ast.parse(file.read_text(encoding="utf-8")))
    ]
    second = "def show(*, most=12):\n    from ultralong.utils.progress import progress\n    progress([], desc=most)\n"
    assert list(declared_again(ast.parse(second))) == [("show", "most")]


def functions_of(tree):
    """The commands' own options of one module of the command line: name and parameters beside the groups'."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            taken = {word.arg for mark in node.decorator_list if isinstance(mark, ast.Call) for word in mark.keywords}
            yield node, {one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)} - taken


def declared_twice(tree):
    """Options that a command declares, and also takes from a group or hands to a function of the public API."""
    names = set(FUNCTIONS) - {"load_config"}
    for node, own in functions_of(tree):
        used = {
            alias.asname or alias.name
            for one in ast.walk(node)
            if isinstance(one, ast.ImportFrom) and (one.module or "").startswith("ultralong.api")
            for alias in one.names
            if alias.name in names
        }
        for call in (one for one in ast.walk(node) if isinstance(one, ast.Call)):
            if isinstance(call.func, ast.Name) and call.func.id in used:
                passed = {one.id for word in call.keywords for one in ast.walk(word.value) if isinstance(one, ast.Name)}
                yield from sorted(passed & own)


def test_no_command_hands_options_of_its_own_to_a_function_of_the_api():
    files = sorted((ROOT / "ultralong" / "cli").glob("*.py"))
    assert not [
        (file.name, found) for file in files for found in declared_twice(ast.parse(file.read_text(encoding="utf-8")))
    ]
    second = "def pack(*, length, json=None):\n    from ultralong.api import pack as run\n    run(length=length)\n"
    assert list(declared_twice(ast.parse(second))) == ["length"]


def test_no_option_of_a_command_has_two_declarations():
    for name, command in COMMANDS.items():
        options = [option.name for option in options_of(command)]
        assert len(options) == len(set(options)), name


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
