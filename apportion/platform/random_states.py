"""The random states of one process, saved without pickle: Python, numpy, torch (CPU and GPUs), and named generators."""

from __future__ import annotations

import json
import random
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from apportion.platform.errors import CheckpointError
from apportion.platform.foreign import parse_json


def save_random_states(folder: Path, name: str, generators: Mapping[str, np.random.Generator] | None = None) -> Path:
    """Write `random-NAME.npz` into `folder`; `name` says whose they are (`policy-rank-0`, `driver`).

    `generators` are numpy generators of one's own, saved by their names.
    """
    import torch

    version, keys, gauss = random.getstate()
    kind, numpy_keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    words: dict[str, Any] = {
        "python": {"version": version, "gauss": gauss},
        "numpy": {"kind": kind, "position": position, "has_gauss": has_gauss, "cached": cached},
        "generators": {key: _listed(generator.bit_generator.state) for key, generator in (generators or {}).items()},
    }
    arrays = {
        "words": np.frombuffer(json.dumps(words).encode(), np.uint8),
        "python": np.array(keys, np.uint64),
        "numpy": numpy_keys,
        "torch": torch.get_rng_state().numpy(),
    }
    if torch.cuda.is_available():
        for device, state in enumerate(torch.cuda.get_rng_state_all()):
            arrays[f"cuda-{device}"] = state.numpy()
    file = folder / f"random-{name}.npz"
    np.savez(file, allow_pickle=False, **arrays)
    return file


def load_random_states(folder: Path, name: str, generators: Mapping[str, np.random.Generator] | None = None) -> None:
    """Put this process and `generators` back to where `save_random_states` found them, or raise CheckpointError."""
    file = folder / f"random-{name}.npz"
    try:
        with np.load(file, allow_pickle=False) as read:
            arrays = {key: read[key] for key in read.files}
        words = parse_json(arrays["words"].tobytes().decode("utf-8"))
    except (OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); expected the random states of {name}") from error
    try:
        _set(file, arrays, words, generators or {})
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RuntimeError) as error:
        raise CheckpointError(
            f"{file}: got no random states of this version ({type(error).__name__}: {error}), expected those of {name}: "
            "take another checkpoint"
        ) from error


def _set(
    file: Path, arrays: Mapping[str, np.ndarray], words: Any, generators: Mapping[str, np.random.Generator]
) -> None:
    """Set the states. Python, numpy and torch raise errors of many kinds for states that they did not write."""
    import torch

    gpus = sorted((key for key in arrays if key.startswith("cuda-")), key=lambda key: int(key.removeprefix("cuda-")))
    if len(gpus) != (torch.cuda.device_count() if torch.cuda.is_available() else 0):
        raise CheckpointError(
            f"{file}: got the states of {len(gpus)} GPUs, expected this process's number: resume on the same layout"
        )
    missing = sorted(set(generators) ^ set(words["generators"]))
    if missing:
        raise CheckpointError(
            f"{file}: generators differ ({', '.join(missing)}), expected the same names as when it was saved"
        )
    random.setstate((words["python"]["version"], tuple(int(key) for key in arrays["python"]), words["python"]["gauss"]))
    legacy = words["numpy"]
    np.random.set_state((legacy["kind"], arrays["numpy"], legacy["position"], legacy["has_gauss"], legacy["cached"]))
    torch.set_rng_state(torch.from_numpy(arrays["torch"]))
    if gpus:
        torch.cuda.set_rng_state_all([torch.from_numpy(arrays[key]) for key in gpus])
    for key, generator in generators.items():
        generator.bit_generator.state = words["generators"][key]


def _listed(state: Any) -> Any:
    if isinstance(state, Mapping):
        return {key: _listed(value) for key, value in state.items()}
    return state.tolist() if hasattr(state, "tolist") else state
