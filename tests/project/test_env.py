"""The environment: pins in one file, ranges that hold them, and imports that need no more than they say."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CORE = (
    *("torch", "transformers", "accelerate", "numpy", "safetensors", "filelock", "yaml", "tqdm", "jinja2"),
    *("huggingface_hub", "tokenizers"),
)
# Left for those who want them; tyro is a dependency, but only of the command line.
OPTIONAL = (
    "datasets",
    "fastapi",
    "prometheus_client",
    "pyarrow",
    "pandas",
    "zstandard",
    "gguf",
    "plotly",
    "matplotlib",
    "ipywidgets",
    "uvicorn",
    "IPython",
    "papermill",
    "jupytext",
    "nbformat",
    "lm_eval",
    "jieba",
    "flash_attn",
    "tyro",
)
IN_THE_CLI = re.compile(r"^ultralong\.(cli(\.|$)|.*__main__$)")
# The web application, which `serve` imports after it has asked for the extra.
IN_THE_SERVER = re.compile(r"ultralong\.inference\.server\.(app|bodies|connections|description|fields|gate|requests)")
# Imported on a GPU, by `fast_step` alone.
IN_TRITON = re.compile(r"ultralong\.inference\.decode_step\.(kernels|fp8_split|peer_merge)")
SERVER = {"fastapi", "pydantic", "starlette", "uvicorn"}


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z", "--", *patterns], cwd=ROOT, capture_output=True, check=True)
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).exists()]


def pins() -> dict[str, Version]:
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = re.fullmatch(r"([a-z0-9-]+)==(\S+)", line).groups()
            assert name not in found, f"{name} is pinned twice"
            found[name] = Version(version)
    return found


def requirements() -> list[Requirement]:
    texts = PROJECT["dependencies"] + [text for name in EXTRAS for text in EXTRAS[name]]
    return [found for text in texts if (found := Requirement(text)).name != PROJECT["name"]]


def test_every_range_is_a_range_and_holds_its_pin():
    pinned = pins()
    text = (ROOT / "constraints.txt").read_text()
    extra = dict(re.findall(r"^#(flash-attn(?:-4)?|torchao)==(\S+)$", text, re.MULTILINE))
    for requirement in requirements():
        assert ">=" in str(requirement.specifier), f"{requirement} has no lower bound"
        assert "==" not in str(requirement.specifier), f"{requirement} pins outside of constraints.txt"
        version = extra.get(requirement.name) or pinned.get(requirement.name)
        assert version is not None, f"{requirement.name} is in pyproject.toml and not in constraints.txt"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} leaves out its pin {version}"


def test_supported_versions_are_inside_the_ranges():
    ranges = {requirement.name: requirement.specifier for requirement in requirements()}
    for name, versions in {"torch": ("2.11.0", "2.12.0", "2.13.0"), "transformers": ("5.17.0", "5.23.0")}.items():
        assert all(ranges[name].contains(version) for version in versions)
    assert not ranges["torch"].contains("2.14.0")
    assert not ranges["transformers"].contains("6.0.0")


def test_nothing_else_holds_a_pin():
    pattern = re.compile(r"^[^#\n]*?\b([a-z][\w.-]*)\s?==\s?\d+(\.\d+)+", re.IGNORECASE | re.MULTILINE)
    for path in tracked("*.toml", "*.yml", "*.yaml", "*.txt", "*.cfg", "Makefile", ".ci", "*.sh", "README.md"):
        if path.name != "constraints.txt":
            found = pattern.search(path.read_text())
            assert found is None, f"{path.relative_to(ROOT)} pins {found.group(0).strip()}"


def test_core_dependencies_are_the_short_list():
    names = {Requirement(text).name for text in PROJECT["dependencies"]}
    assert names == {
        "torch",
        "transformers",
        "accelerate",
        "numpy",
        "safetensors",
        "filelock",
        "pyyaml",
        "tqdm",
        "tyro",
        "jinja2",
    }


def test_dev_brings_what_the_tests_need_and_no_built_kernels():
    dev = {Requirement(text).name: Requirement(text) for text in EXTRAS["dev"]}
    assert dev[PROJECT["name"]].extras == {"data", "gguf", "lora", "notebooks", "serve", "trl"}
    assert not any(name.startswith("flash") for name in dev)
    assert all(Requirement(text).name.startswith("flash-attn") for name in ("flash", "flash4") for text in EXTRAS[name])


def test_each_required_extra_exists():
    for path in tracked("ultralong/*.py", "notebooks/*.py"):
        text = path.read_text()
        calls = re.finditer(r"require\(\s*\"([\w.]+)\",\s*(?:extra=)?\"(\w+)\"", text)
        for call in calls if "from ultralong.utils.extras import" in text else ():
            assert call.group(2) in EXTRAS, f"{path.relative_to(ROOT)} names the extra {call.group(2)!r}"


def test_conda_gives_the_interpreter_and_pip_the_rest():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == PROJECT["name"]
    conda = [item for item in environment["dependencies"] if isinstance(item, str)]
    assert "pip" in conda
    python = next(item for item in conda if item.startswith("python="))
    assert Requirement("python" + PROJECT["requires-python"]).specifier.contains(python.removeprefix("python="))
    assert not {"pytorch", "pytorch-gpu", "numpy"} & set(conda), "two builds of torch would mix"
    (pip,) = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    assert pip == ["-c constraints.txt", "-e .[notebooks,dev]"]


IMPORT_ALL = """
import gc, importlib, importlib.abc, json, pkgutil, sys
gc.disable()  # what is imported stays
blocked = set(json.loads(sys.argv[1]))

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        # What a dependency tries for itself is its own affair; only this package's imports are on trial.
        frame = sys._getframe(1)
        while frame is not None and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        asking = frame.f_globals.get("__name__", "") if frame is not None else ""
        if name.split(".")[0] in blocked and asking.split(".")[0] == "ultralong":
            raise ModuleNotFoundError(f"blocked: {asking} imports {name}", name=name)
        return None

sys.meta_path.insert(0, Block())
import ultralong
names = [info.name for info in pkgutil.walk_packages(ultralong.__path__, "ultralong.")]
failed = {}
for name in names:
    if name in json.loads(sys.argv[2]):
        continue
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed[name] = str(error)
print(json.dumps([names, failed]))
gc.freeze()
"""


def modules() -> list[str]:
    paths = sorted((ROOT / "ultralong").rglob("*.py"))
    dotted = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return [name for name in dotted if name != "ultralong"]


def test_every_module_imports_with_the_core_packages_alone():
    optional = (IN_THE_SERVER, IN_TRITON)
    skipped = [name for name in modules() if IN_THE_CLI.match(name) or any(x.fullmatch(name) for x in optional)]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, json.dumps(OPTIONAL), json.dumps(skipped)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names, failed = json.loads(done.stdout.splitlines()[-1])
    assert failed == {}
    # The walk cannot look into the command line's folder, whose import is blocked.
    walked = [name for name in modules() if not name.startswith("ultralong.cli.")]
    assert sorted(names) == sorted(walked), "a folder without __init__.py is not found by an installed package"


def imported(tree: ast.AST) -> set[str]:
    """Top-level packages that a module imports when it is imported itself: not inside functions, not for types only."""
    found, waiting = set(), list(ast.iter_child_nodes(tree))
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
        waiting += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("name", modules())
def test_a_module_names_only_core_packages_on_top(name):
    path = ROOT / (name.replace(".", "/") + ".py")
    path = path if path.exists() else ROOT / name.replace(".", "/") / "__init__.py"
    allowed = {*CORE, *sys.stdlib_module_names, "ultralong"} | ({"tyro"} if IN_THE_CLI.match(name) else set())
    allowed |= SERVER if IN_THE_SERVER.fullmatch(name) else set()
    allowed |= {"triton"} if IN_TRITON.fullmatch(name) else set()
    assert imported(ast.parse(path.read_text())) <= allowed


def test_importing_the_package_imports_nothing_heavy():
    script = "import sys, ultralong; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{script}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"torch", "transformers", "numpy", "accelerate", "yaml", "tqdm"} & set(done.stdout.split())


def test_the_version_is_one_and_the_same():
    import importlib.metadata

    import ultralong

    assert importlib.metadata.version("ultralong") == ultralong.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == ultralong.__version__


def test_packed_files_are_in_the_package():
    package = ROOT / "ultralong"
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["ultralong"]
    data = {path.relative_to(package) for path in tracked("ultralong") if path.suffix != ".py"}
    missing = [path for path in data if not any(path.match(pattern) for pattern in patterns)]
    assert missing == [], "these files would be missing from an installed package"
    assert Path("py.typed") in data
