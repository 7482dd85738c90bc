"""The one step of the build that pyproject.toml cannot say: data recipes stand beside the package, and go into it.

An editable install reads them where they stand (see `ultralong.data.recipe.schema.RECIPES`).
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

RECIPES = Path("data_recipes")


class BuildWithRecipes(build_py):
    """Copies data_recipes/ to ultralong/data_recipes/ in a wheel, and lists it for a source distribution."""

    def run(self) -> None:
        """Build as usual, then copy."""
        package = Path(self.build_lib) / "ultralong"
        if not self.editable_mode and package.exists() and not package.samefile("ultralong"):
            shutil.rmtree(package)  # of a build before: what the source has no more would be in this wheel too
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "ultralong" / RECIPES
            target.mkdir(parents=True, exist_ok=True)
            for file in self._recipes():
                shutil.copy2(file, target / Path(file).name)

    def get_source_files(self) -> list[str]:
        """What a source distribution must hold to be built again."""
        return [*super().get_source_files(), *self._recipes()]

    @staticmethod
    def _recipes() -> list[str]:
        return sorted(str(file) for file in RECIPES.iterdir() if file.suffix in (".yaml", ".md"))


setup(cmdclass={"build_py": BuildWithRecipes})
