"""flashspark in other programs: one module for each, none of which is imported before it is asked for.

docs/integrations.md has the table of programs, and how each is switched on.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    """Loads a module when it is first named: the Hugging Face loader's users have no import statement for it."""
    from importlib import import_module

    home = f"{__name__}.{name}"
    try:
        return import_module(home)
    except ModuleNotFoundError as error:
        if error.name != home:
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
