"""gpurender: lip-sync video from a template, speech and a trained network. Start reading at `gpurender.render`.

The public names are those of `__init__.pyi`. Each is imported when it is first used: what needs no torch does not wait
for it, and the command line can set its process up before.
"""

import sys
from types import ModuleType
from typing import Any

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


class Package(ModuleType):
    """`gpurender.render` is the function, although importing the module of this name sets it to the module."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "render" and isinstance(value, ModuleType):
            value = value.render
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = Package
