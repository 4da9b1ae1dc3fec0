"""A process with plain vLLM, which knows nothing of this project, and its caller's end of the socket."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def cpu_environment(threads: int) -> dict[str, str]:
    """vLLM's best setting on a CPU: every core bound."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }


class Bare:
    """`settings` are vLLM's own."""

    def __init__(self, settings: dict[str, Any], environment: dict[str, str]) -> None:
        ours, theirs = socket.socketpair()
        os.set_inheritable(theirs.fileno(), True)
        common = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
        }
        script = str(Path(__file__).with_name("bare_vllm.py"))
        self._process = subprocess.Popen(
            [sys.executable, script, str(theirs.fileno()), json.dumps(settings)],
            env=os.environ | common | environment, pass_fds=[theirs.fileno()], stdout=subprocess.DEVNULL,
        )  # fmt: skip
        theirs.close()
        self._stream = ours.makefile("rw")
        self._read()

    def _read(self) -> dict[str, Any]:
        line = self._stream.readline()
        if not line:
            raise RuntimeError(f"bare vLLM stopped with exit code {self._process.wait()}")
        return json.loads(line)

    def generate(self, ids: list[list[int]], max_tokens: int, logprobs: bool) -> dict[str, Any]:
        """Sample one response to each prompt: tokens, seconds and peak MiB."""
        self._stream.write(json.dumps({"ids": ids, "max_tokens": max_tokens, "logprobs": logprobs}) + "\n")
        self._stream.flush()
        return self._read()

    def close(self) -> None:
        self._stream.close()
        self._process.terminate()
        self._process.wait(30)
