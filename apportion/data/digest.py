"""A number that stands for rows: equal for the same rows in the same order, other for any other.

A resumed run compares it with the one in its checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from apportion.data.rows import Row

if TYPE_CHECKING:
    import numpy as np

SAMPLED_ROWS = 64  # of rows that are made when they are read
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in the default text of an object


def digest_rows(rows: Sequence[Row], prompt_column: str) -> int:
    """64 bits of every row's number and columns, in order.

    Rows that have an `origin` (a task, its parameters and seed) are made when they are read, and there may be very many:
    of these it is the origin and 64 rows at even distances.
    """
    origin = getattr(rows, "origin", None)
    chosen: Iterable[Row] = rows
    if origin is not None and len(rows) > SAMPLED_ROWS:
        chosen = (rows[i * (len(rows) - 1) // (SAMPLED_ROWS - 1)] for i in range(SAMPLED_ROWS))
    digest = hashlib.blake2b(_written([origin, prompt_column, len(rows)]), digest_size=8)
    for row in chosen:
        digest.update(_written([row.number, row.values]))
    return int.from_bytes(digest.digest())


def digest_arrays(arrays: Iterable[np.ndarray]) -> int:
    """64 bits of arrays: kind, shape and content."""
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(_written([str(array.dtype), array.shape]))
        digest.update(array.tobytes())
    return int.from_bytes(digest.digest())


def _written(value: Any) -> bytes:
    """`value` as text that does not depend on the process: keys sorted, no addresses of objects."""
    try:
        text = json.dumps(value, sort_keys=True, default=_plain)
    except (TypeError, ValueError):  # keys that are no texts, or of several kinds
        text = json.dumps(_with_texts_as_keys(value), sort_keys=True, default=_plain)
    return text.encode() + b"\n"


def _with_texts_as_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {f"{type(key).__name__}:{key}": _with_texts_as_keys(inner) for key, inner in value.items()}
    return [_with_texts_as_keys(inner) for inner in value] if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    """What JSON has no form for."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if hasattr(value, "tobytes"):  # arrays, their numbers, images
        form = [str(getattr(value, name, "")) for name in ("dtype", "shape", "mode", "size")]
        return [type(value).__name__, form, hashlib.blake2b(value.tobytes(), digest_size=8).hexdigest()]
    return f"{type(value).__name__}:{_ADDRESS.sub('', str(value))}"
