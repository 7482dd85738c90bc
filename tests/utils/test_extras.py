"""Optional packages: found when there, named with their command when not, and never confused with another failure."""

import sys

import pytest

from ultralong.utils.extras import require


def test_returns_the_module_itself():
    assert require("json.decoder", extra="data") is sys.modules["json.decoder"]


def test_names_the_package_and_the_command():
    with pytest.raises(ImportError, match=r"no_such_package is needed.*pip install 'ultralong\[data\]'"):
        require("no_such_package.inner", extra="data")


def test_a_broken_package_keeps_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import something_it_lacks\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="something_it_lacks"):
        require("broken_package", extra="data")


def test_a_missing_part_of_an_installed_package_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "half_package").mkdir()
    (tmp_path / "half_package" / "__init__.py").write_text("raise ImportError('needs a newer libc')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="needs a newer libc"):
        require("half_package", extra="data")
