"""Read and write the files of a run's folder that somebody else may have made, or that are damaged.

Reading ends in a value, or in a ValueError that says what is wrong: whatever the encoding, the size and the nesting.
Nothing is written through a link.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import IO, Any

from apportion.platform.errors import ApportionError

LARGEST_JSON = 2**26  # bytes of one file, or of one line
LARGEST_YAML = 2**20  # bytes; PyYAML reads 0.1 to 0.2 MB a second
MOST_VALUES = 100_000  # of a YAML file, with each alias counted as what it repeats
DEEPEST = 100  # mappings and lists inside one another


def read_bytes(file: Path, limit: int) -> bytes:
    """ValueError for what is no regular file, or larger than `limit`."""
    if not stat.S_ISREG(os.stat(file).st_mode):  # opening a pipe without a writer would block
        raise ValueError("it is no regular file")
    with open(file, "rb") as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    return data


def read_text(file: Path, limit: int) -> str:
    return read_bytes(file, limit).decode("utf-8")


def read_json(file: Path) -> Any:
    return parse_json(read_text(file, LARGEST_JSON))


def parse_json(text: str) -> Any:
    """As json.loads; ValueError also for a text that is nested too deep for it."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its lists or mappings are nested too deep") from error


def checked_yaml(text: str) -> str:
    """The text, if it is safe to construct: ValueError for deep nesting, for an alias inside of what it repeats, and for
    aliases that multiply to more than MOST_VALUES. YAMLError for what is no YAML."""
    import yaml

    sizes: dict[str, int] = {}  # of a whole node, by its anchor
    open_nodes: list[list[Any]] = [[None, 0]]  # (anchor, values so far)
    events: Any = yaml.parse(text, Loader=yaml.SafeLoader)
    for event in events:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in (node[0] for node in open_nodes):
                raise ValueError(f"line {line}: alias *{event.anchor} is inside of what it repeats")
            open_nodes[-1][1] += sizes.get(event.anchor or "", 1)
        elif isinstance(event, yaml.ScalarEvent):
            open_nodes[-1][1] += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append([event.anchor, 1])
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
            open_nodes[-1][1] += size
            if anchor is not None:
                sizes[anchor] = size
        if len(open_nodes) > DEEPEST:
            raise ValueError(f"line {line}: lists and mappings are nested more than {DEEPEST} deep")
        if open_nodes[-1][1] > MOST_VALUES:
            raise ValueError(f"line {line}: more than {MOST_VALUES:,} values, aliases included")
    return text


def yaml_problem(error: Exception) -> str:
    """What PyYAML says is wrong, with the place. Never the line itself, which its own text quotes: it may hold a secret."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    said = [part for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part]
    if mark is None or not said:
        return " ".join(str(getattr(error, "reason", None) or type(error).__name__).split())
    file = "" if mark.name.startswith("<") else f'"{mark.name}", '
    return f"{' '.join(', '.join(said).split())} in {file}line {mark.line + 1}, column {mark.column + 1}"


def open_to_append(file: Path) -> IO[str]:
    """Open a file of a run's folder for writing at its end; ApportionError for a link, or for what is no regular file."""
    refuse_link(file)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    return open(os.open(file, flags, 0o666), "a", encoding="utf-8")


def refuse_link(file: Path) -> None:
    """ApportionError unless `file` is a regular file, or is not there: whoever made the folder chose where a link leads."""
    try:
        mode = os.lstat(file).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kind = "a link" if stat.S_ISLNK(mode) else "no regular file"
        raise ApportionError(
            f"{file}: got {kind}, expected a regular file of the run's own: remove it, or copy the file"
        )
