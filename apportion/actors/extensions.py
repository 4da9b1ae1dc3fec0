"""DeepSpeed compiles a small part of itself at first use: here in a folder of this project's, one process at a time.

torch marks a folder in which it compiles with a file, and waits without end for that file to go. Whoever is killed while
compiling leaves the mark to every later run, each of which then hangs without a word. In a folder where nobody else
compiles, a mark that is found under a lock of the operating system's was left behind, and is removed.
"""

from __future__ import annotations

import os
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

from apportion.data.builtin import cache_folder, locked

VARIABLE = "TORCH_EXTENSIONS_DIR"  # torch's; whoever sets it compiles there as torch does


def extensions_folder() -> Path:
    """A node's, a user's and an installation's own: what one has compiled another may not be able to run, or should not."""
    import torch

    python = "py" + "".join(map(str, sys.version_info[:2]))
    name = f"{socket.gethostname()}-{os.getuid()}-{python}-torch{torch.__version__}"
    return cache_folder() / "extensions" / name


def compile_extensions(offloads: bool) -> None:
    """Compile and load what DeepSpeed is going to ask for, or load what is compiled; `offloads`: its Adam for CPUs too."""
    from deepspeed.accelerator import get_accelerator

    accelerator, folder = get_accelerator(), extensions_folder()
    names = ["ShareMemCommBuilder"] if accelerator.device_name() == "cpu" else []
    names += ["CPUAdamBuilder"] if offloads else []
    if not names or os.environ.get(VARIABLE, str(folder)) != str(folder):
        return
    with ExitStack() as lock:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.enter_context(locked(folder / ".extensions.lock"))
        except OSError:  # a cache that cannot be written, a file system without locks: as without this folder
            return
        os.environ[VARIABLE] = str(folder)
        for mark in folder.glob("**/lock"):
            mark.unlink()
        for builder in map(accelerator.create_op_builder, names):
            if builder is not None and builder.is_compatible(verbose=False):
                builder.load(verbose=False)
