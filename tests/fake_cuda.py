"""A CUDA driver of our own, compiled in a second, which plays what a test wants: WSL2-like, without /dev/nvidia*."""

import shutil
import subprocess
from pathlib import Path

SOURCE = r"""
#include <string.h>
#include <stddef.h>
#include <stdlib.h>
#include <unistd.h>
#include <signal.h>
static const char *hidden(void) { return getenv("CUDA_VISIBLE_DEVICES"); }
int cuDriverGetVersion(int *version) { *version = 13010; return 0; }
int cuInit(unsigned flags) {
    if (HANGS) sleep(60);
    if (CRASHES) raise(SIGSEGV);
    if (ERROR) return ERROR;
    return hidden() && !*hidden() ? 100 : 0;
}
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuDeviceGet(int *device, int index) { *device = 40 + index; return 0; }
int cuDeviceGetName(char *name, int size, int device) {
    strncpy(name, device == 40 ? "NVIDIA A100-SXM4-80GB" : "Tesla T4", size);
    return 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    *bytes = device == 40 ? MEMORY : 15655829504ul;
    return 0;
}
int cuDeviceGetUuid(void *uuid, int device) { memset(uuid, device, 16); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (attribute != 75 && attribute != 76) return 1;
    *value = device == 40 ? (attribute == 75 ? 8 : 0) : (attribute == 75 ? 7 : 5);
    return 0;
}
int cuGetErrorName(int code, const char **name) {
    *name = code == 999 ? "CUDA_ERROR_UNKNOWN" : NULL;
    return code == 999 ? 0 : 1;
}
"""
DEFAULTS = {"COUNT": 2, "ERROR": 0, "HANGS": 0, "CRASHES": 0, "MEMORY": "84986691584ul"}


def compiled(folder: Path, **changes) -> Path:
    """The library's file, named as the driver's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "driver.c").write_text(SOURCE)
    library = folder / "libcuda.so.1"
    compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("g++")
    assert compiler is not None
    defined = [f"-D{name}={value}" for name, value in (DEFAULTS | changes).items()]
    command = [compiler, "-x", "c", "-shared", "-fPIC", "-O0", *defined, "-o", str(library), str(folder / "driver.c")]
    subprocess.run(command, check=True, timeout=60)
    return library


def tool(folder: Path, script: str) -> Path:
    """An nvidia-smi that runs a shell script."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "nvidia-smi"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return file
