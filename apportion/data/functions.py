"""Finding a user's function by name: `package.module:function`, `package.module.function` or `file.py:function`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from apportion.data.errors import DataError, nearest


def load_function(spec: str) -> Callable[..., Any]:
    """The function that `spec` names.

    A relative file and a module that is not installed are looked for in the working folder. What the user's module
    raises while it is imported is passed on with its own traceback; everything else is a DataError of one line.

    >>> load_function("math:sqrt")(9.0), load_function("os.path.basename")("a/b")
    (3.0, 'b')
    """
    module_name, name = _split(spec)
    try:
        module = _file_module(spec, module_name) if module_name.endswith(".py") else _module(spec, module_name)
    except SystemExit as error:  # a script that is not guarded: it would end this process, with its own exit code
        raise DataError(
            f"{spec}: importing {module_name} calls sys.exit({error.code!r}), expected a module that only defines "
            'things: put what a script does under `if __name__ == "__main__":`'
        ) from None
    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            near = nearest(part, [n for n in dir(found) if not n.startswith("_")])
            raise DataError(f"{spec}: {module_name} has no {part!r}{near}")
        found = getattr(found, part)
    if not callable(found):
        raise DataError(f"{spec}: got a {type(found).__name__}, expected a function")
    return found


def _split(spec: str) -> tuple[str, str]:
    module, colon, name = spec.rpartition(":")
    if not colon:
        module, _, name = spec.rpartition(".")
    if not module or not name:
        raise DataError(f"function: got {spec!r}, expected package.module:function or file.py:function")
    return module, name


def _module(spec: str, name: str) -> ModuleType:
    # A console script has its own folder first on the path, not the one the user stands in.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A missing module that the user's own code imports is their traceback to see; a missing `name` is a wrong name.
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise DataError(f"{spec}: no module {name!r}; it must be installed or lie in {os.getcwd()}") from None
        raise


def _file_module(spec: str, file: str) -> ModuleType:
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise DataError(f"{spec}: no file {path}")
    # The same file gives the same module, so that its state and classes exist once in a process.
    name = f"apportion_user_{path.stem}_{hashlib.sha1(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise DataError(f"{spec}: {path} cannot be imported as Python")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
