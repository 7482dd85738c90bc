"""Optional packages: imported where they are used, and named with the command that installs them when missing."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module.

    Args:
        module: Name as in an import statement, such as `"pyarrow.parquet"`.
        extra: The extra of this package that installs it, such as `"data"`.

    Returns:
        The imported module.

    Raises:
        ImportError: It is not installed; the message holds the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if error.name is None or error.name.split(".")[0] != package:
            raise
        raise ImportError(
            f"{package} is needed for this and is not installed. Install it with: pip install 'ultralong[{extra}]'"
        ) from error
