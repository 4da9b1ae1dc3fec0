"""Ask the CUDA driver which GPUs it shows. A program of its own: `python -I -S cuda_driver.py LIBRARY` prints JSON.

A process that has called cuInit cannot use CUDA in its forked children, and a broken driver may hang or crash: so the
process that wants to know starts this one. It imports the standard library alone.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE: a driver without a GPU, or one whose GPUs are all hidden
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


class Refused(Exception):
    """A function of the driver returned an error."""

    def __init__(self, function: str, code: int) -> None:
        super().__init__(function, code)
        self.function, self.code = function, code


def ask(library: str) -> dict[str, Any]:
    """{"version", "gpus"}, or {"error"} with the driver's name for it."""
    cuda = ctypes.CDLL(library)
    version = ctypes.c_int()
    try:
        _call(cuda, "cuDriverGetVersion", ctypes.byref(version))
        _call(cuda, "cuInit", 0)
        count = ctypes.c_int()
        _call(cuda, "cuDeviceGetCount", ctypes.byref(count))
        gpus = [_gpu(cuda, index) for index in range(count.value)]
    except Refused as error:
        if error.code == NO_DEVICE:
            return {"version": version.value, "gpus": []}
        return {"version": version.value, "error": f"{error.function}: {_name(cuda, error.code)}"}
    return {"version": version.value, "gpus": gpus}


def _gpu(cuda: ctypes.CDLL, index: int) -> dict[str, Any]:
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    name, uuid = ctypes.create_string_buffer(256), ctypes.create_string_buffer(16)
    _call(cuda, "cuDeviceGet", ctypes.byref(device), index)
    _call(cuda, "cuDeviceGetName", name, 256, device)
    _call(cuda, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    _call(cuda, "cuDeviceGetUuid", uuid, device)
    capability = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        _call(cuda, "cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return {
        "name": name.value.decode("utf-8", "replace"),
        "memory": memory.value,
        "uuid": uuid.raw.hex(),
        "capability": capability,
    }


def _call(cuda: ctypes.CDLL, function: str, *arguments: Any) -> None:
    code = getattr(cuda, function)(*arguments)
    if code:
        raise Refused(function, code)


def _name(cuda: ctypes.CDLL, code: int) -> str:
    """CUDA_ERROR_UNKNOWN (999), say."""
    text = ctypes.c_char_p()
    try:
        cuda.cuGetErrorName(code, ctypes.byref(text))
    except AttributeError:  # a driver older than CUDA 6
        return f"error {code}"
    return f"{text.value.decode()} ({code})" if text.value else f"error {code}"


if __name__ == "__main__":
    json.dump(ask(sys.argv[1]), sys.stdout)
