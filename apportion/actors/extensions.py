"""DeepSpeed compiles a small part of itself at first use: here in a folder of this project's, one process at a time.

torch marks a folder in which it compiles with a file, and waits without end for that file to go. Whoever is killed while
compiling leaves the mark to every later run, each of which then hangs without a word. In a folder where nobody else
compiles, a mark that is found under a lock of the operating system's was left behind, and is removed.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from apportion.data.builtin import cache_folder, locked

VARIABLE = "TORCH_EXTENSIONS_DIR"  # torch's; whoever sets it compiles there as torch does


def extensions_folder() -> Path:
    """A node's own: what one has compiled another may not be able to run."""
    return cache_folder() / "extensions" / socket.gethostname()


def compile_extensions(offloads: bool) -> None:
    """Compile and load what DeepSpeed is going to ask for, or load what is compiled; `offloads`: its Adam for CPUs too."""
    folder = extensions_folder()
    if os.environ.setdefault(VARIABLE, str(folder)) != str(folder):
        return
    from deepspeed.accelerator import get_accelerator
    from deepspeed.ops import __compatible_ops__

    accelerator = get_accelerator()
    names = ["ShareMemCommBuilder"] if accelerator.device_name() == "cpu" else []
    names += ["CPUAdamBuilder"] if offloads else []
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".extensions.lock"):
        for mark in folder.glob("**/lock"):
            mark.unlink()
        for name in names:
            builder = accelerator.create_op_builder(name)
            if builder is not None and __compatible_ops__.get(builder.NAME, False):
                builder.load(verbose=False)
