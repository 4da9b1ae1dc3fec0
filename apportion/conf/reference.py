"""The page about every configuration value, made from the schema: `python -m apportion.conf.reference > docs/configuration.md`.

A value's meaning is the comment beside its field in `schema*.py`, a section's is its dataclass's docstring.
"""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import re
import sys
import tokenize
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any

from apportion.conf import preference_schema, schema
from apportion.conf.explain import config_keys

_ONE_OF = re.compile(r"\bone_of\([^,]+, self\.(\w+), (?:\(([^)]*)\)|(\w+))\)")

HEAD = """# Configuration

Every value, its type and its default. Generated from the comments in `apportion/conf/schema*.py` with
`python -m apportion.conf.reference > docs/configuration.md`. `apportion train --help` prints the same values with the defaults of
the recipe that is chosen, `apportion train experiment=NAME --cfg job` the whole composed configuration.

A value is set as `KEY=VALUE` on the command line, or in a recipe (a YAML file below `apportion/conf/experiment`, or in
`experiment/` of a folder of your own, given with `--config-dir FOLDER`). The command line goes before the recipe, the recipe before the default.
A mapping on the command line is the whole value (`algorithm.credit={name: rloo}` leaves nothing of the recipe's credit), its key alone changes one
of its values (`algorithm.credit.eps=1e-4`). `???` has to be given. A misspelt key, a wrong type or a combination that cannot run is refused in one line before anything starts.

## Values on the command line

The type of a key decides how its value is read. Put the whole argument in single quotes for the shell: `'rollout.stop=["\\n\\n"]'`.

| typed | read as |
|---|---|
| `run_name=1e5`, `007`, `off`, `2026-11-28`; `model.path=/data/run=3/my model (v2)` | the text as typed, where the key takes text; `null` is no value, `'null'` the word |
| `"a\\nb"` | escapes between double quotes: `\\n`, `\\t`, `\\r`, `\\"`, `\\\\` and `\\uXXXX`; every other backslash stays (`\\boxed`) |
| `"\\theta"`, `"\\nu"`, `"\\right"` | LaTeX, with a warning: the backslash stays |
| `'a\\nb'` | the text as it is, a backslash and an n; for the keys below with a warning |
| `\\n` without quotes | an escape for `data.system_prompt`, `rollout.stop`, `reward.step_delimiter` and `judge.delimiter`; the text as it is for others |
| `train.steps=1e3`, `policy.learning_rate=1E-6` | numbers; a whole number may be written as `1e3` |
| `train.deterministic=off`, `on`, `yes`, `no` | false and true; in a mapping of free keys they are refused: write `true`, `false` or `'"off"'` |
| `train.max_minutes=none` | no value, as `null`; refused where the key takes text |
| `data.train=a,b` | refused: `[a,b]` is a list, `-m` sweeps, `'"a,b"'` is one name; a file of that name is taken as it is |
| `~/m` | the home folder in every path |

In a recipe YAML's rules apply: quote `"1e5"` and `"off"` there.
"""

PREFERENCE = """# Preference stages

`apportion sft`, `apportion reward-model` and `apportion dpo` have the run's values, `model`, `tracking` and `checkpoint` as above, and
these sections; the last three are of one stage each.
"""


def render() -> str:
    """The whole page."""
    parts = [HEAD, _recipes("experiment", "Recipes"), _recipes("algorithm", "Algorithms"), _section(schema.Config, "")]
    parts += _sections(schema.Config)
    parts.append(PREFERENCE)
    shared = {kind for _, kind in _nested(schema.Config)}
    parts += _sections(preference_schema.PreferenceConfig, shared)
    for stage in preference_schema.STAGES.values():
        parts.append(_section(dict(_nested(stage))[stage.stage], stage.stage))
    return "\n".join(parts)


def _sections(config: type, leave_out: Collection[type] = ()) -> list[str]:
    found = []
    for name, kind in _nested(config):
        if kind in leave_out:
            continue
        found.append(_section(kind, name))
        found += [_section(inner, f"{name}.{key}") for key, inner in _nested(kind)]
    return found


def _recipes(group: str, title: str) -> str:
    lines = [f"## {title}: `{group}=NAME`", "", "| name | what it is |", "|---|---|"]
    for file in sorted((Path(__file__).parent / group).glob("*.yaml")):
        lines.append(f"| `{file.stem}` | {_cell(recipe_note(file))} |")
    return "\n".join(lines) + "\n"


def recipe_note(file: Path) -> str:
    """The comment at the top of a recipe's file, as one line."""
    notes = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            notes.append(line.removeprefix("#").strip())
    return " ".join(notes)


def _nested(kind: type) -> list[tuple[str, type]]:
    """Fields of `kind` that are sections of their own, as (name, dataclass)."""
    found = []
    for name, hint in typing.get_type_hints(kind).items():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part) and isinstance(part, type):
                found.append((name, part))
    return found


def _section(kind: type, name: str) -> str:
    nested = {key for key, _ in _nested(kind)}
    words, comments = config_keys(kind) | _choices(kind), _comments(kind)
    lines = [f"## {name or 'The run'}", ""]
    if kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}("):
        lines += [inspect.cleandoc(kind.__doc__), ""]
    lines += ["| key | takes | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(kind):
        if field.name not in nested:
            key = f"{name}.{field.name}" if name else field.name
            meaning = comments.get(field.name, "")
            lines.append(f"| `{key}` | {_cell(words[field.name])} | `{_default(field)}` | {_cell(meaning)} |")
    return "\n".join(lines) + "\n"


def _choices(kind: type) -> dict[str, str]:
    """Field name -> its valid words, of the fields that `__post_init__` checks against a list of them."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            for name, words, constant in _ONE_OF.findall(inspect.getsource(base)):
                valid = vars(sys.modules[base.__module__])[constant] if constant else re.findall(r'"([^"]+)"', words)
                found[name] = "one of " + ", ".join(valid)
    return found


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value)


def _comments(kind: type) -> dict[str, str]:
    """Field name -> the comment on its line, or on the lines above it; base classes' fields too."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            found |= _own_comments(inspect.getsource(base))
    return found


def _own_comments(source: str) -> dict[str, str]:
    found: dict[str, str] = {}
    above: list[str] = []
    names: list[str] = []  # of the line so far
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.removeprefix("#").strip()
            if names:
                found[names[0]] = " ".join([*above, text])
                above = []
            else:
                above.append(text)
        elif token.type == tokenize.NAME:
            names.append(token.string)
        elif token.type == tokenize.NEWLINE:
            if above and names:
                found[names[0]] = " ".join(above)
            names, above = [], []
        elif token.string == "def":
            break
    return found


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(render(), end="")
