"""Random command lines over the real schema: sound, odd and broken words for every key."""

from __future__ import annotations

import random

from apportion.conf.explain import config_keys
from apportion.conf.preference_schema import STAGES
from apportion.conf.schema import Config

BASES = (
    [],
    ["experiment=tiny_grpo"],
    ["experiment=quickstart"],
    ["experiment=tiny_grpo", "algorithm=rloo"],
    ["model.path=builtin:tiny", "data.train=arithmetic", "reward.functions=numeric_match"],
)
ALGORITHMS = ("grpo", "ppo", "capo", "reinforce_pp")  # with a critic, with a judge, with neither
STAGE_COMMANDS = tuple(name.replace("_", "-") for name in STAGES)
STAGE_BASES = ([], ["model.path=builtin:tiny", "data.train=pairs.jsonl"])
ODD_VALUES = (
    "", "1", "0", "-1", "1.5", "1e3", "1e400", "-1e400", "nan", "inf", "-inf", ".nan", "true", "false", "null", "none", "None",
    "yes", "off", "x", "''", "' '", '" "', "[]", "{}", "[1,2]", "[a,b]", "[null]", "[[1],[2]]", "{a: 1}", "{name: grpo}",
    "{a: {b: [1, {c: d}]}}", "[{source: arithmetic}]", "[{}]", "${seed}", "${nothing}", "${train}", "${oc.env:HOME}",
    "${oc.env:NO_SUCH_VARIABLE}", "${share:1}", "${share:x,2}", "${no_such_resolver:1}", "${", "${}", "${${seed}}", "???",
    "'???'", "a,b", "a=b", "[", "]", "{", "}", "(", ")", "'", '"', "\\", "\\n", '"\\u0000"', "\0", "\x1b[2J", "\u202e", "\ud83d",
    "é", "漢", "~", "~/x", "~nobody_here/x", "/", "..", "../x", "/dev/null", "/etc/passwd", "/proc/self/mem", "file:x", "http://",
    "http://h:99999/x", "http://a..b/x", "function:os:system", "function:", "function:no_such:x", ":", "a:b", "99999999999999999999",
    str(2**63), "9" * 5000, "y" * 300, "z" * 5000, "int(3)", "str(3)", "range(1,3)", "choice(a,b)", "glob(*)", "sort(1,2)",
    "interval(0,1)", "shuffle(a,b)", "float(x)", "json_str({a: 1})", "a b", " a", "a ", "a\nb", "!!python/object:x", "*a", "&a b",
    "model:x", "builtin:tiny", "builtin:no", "hf://x", "1_000", "0x10", "1:30", "2024-01-01", "-", "--", "@", "%", "a/b", "a//b",
)  # fmt: skip
NUMBERS = (
    "-1", "-2147483649", "-1e300", "0", "-0.0", "5e-324", "1e-300", "1e-30", "1e-8", "0.5", "1", "2", "2147483647", "2147483648",
    str(2**53 + 1), str(2**63), str(2**64), str(10**400), "1e18", "1e38", "1e300", "1e400", "nan", "inf", "-inf",
)  # fmt: skip
WHOLE_WORDS = (
    "", "=", "=1", "x", "+", "~", "++", "+=1", "~=1", "@=1", "a@b=1", "+a@b=1", "seed", ".=1", "a.=1", ".a=1", "a..b=1", "seed.=1",
    "seed.x=1", "seed.0=1", "model.path.x=1", "algorithm.credit.name.x=1", "algorithm.shaping.x=1", "algorithm.shaping.0=1",
    "+algorithm.shaping.0=1", "reward.functions.0=x", "reward.functions.0.function=x", "~seed=5", "~seed", "~train", "~algorithm",
    "~algorithm=grpo", "~experiment", "~lora", "+algorithm=rloo", "++algorithm=rloo", "algorithm@x=grpo", "+lora@y=default",
    "lora=default", "lora=none", "lora=x", "experiment=x", "algorithm=[grpo,rloo]", "algorithm=[]", "algorithm={}", "algorithm=1",
    "experiment=[tiny_grpo,quickstart]", "experiment=1.5", "experiment=true", "lora=[default]", "lora={rank: 2}", "preference=sft",
    "hydra=x", "hydra.mode=x", "hydra.verbose=true", "foo/bar=1", "algorithm/x=1", "train/steps=1", "+train/x=1", "[a]=1", "{a}=1",
    "a b=1", "é=1", "k" * 5000 + "=1", "a." * 500 + "b=1", "train.steps=1,2", "seed=choice(1,2)", "algorithm.credit={name: rloo",
    "before=[x]", "before=['sft run_name=a']", "before=['sft run_name=']", 'before=["dpo \'"]', "before=[{a: b}]", "--x", "-x",
    "--cfg", "--cfg=x", "--cfg=job", "--config-dir", "--config-dir=.", "--config-name=x", "--info", "--info=x", "-m", "--package=x",
    "--version", "resume=x", "resume=", "resume=/", "resume=.", "resume=..", "runs_folder=", "runs_folder=/dev/null",
)  # fmt: skip


def command_line(seed: int) -> list[str]:
    """The words of case `seed`, always the same. A run `given` and a run `stage` of `sft` are in the runs folder."""
    draw = random.Random(seed)
    command = draw.choice(
        ("plan",) * 10 + ("train",) * 4 + ("evaluate", "show", "doctor", "other") + STAGE_COMMANDS * 2
    )
    keys = config_keys()
    if command in STAGE_COMMANDS:
        keys = config_keys(STAGES[command.replace("-", "_")])
        words = [command, *draw.choice((*STAGE_BASES, ["resume=stage"]))]
    elif command in ("plan", "train"):
        words = [command, *draw.choice((*BASES, ["resume=given"]))]
    elif command == "evaluate":
        words = [command, draw.choice(("given", "given", "given", "stage", "nowhere", *ODD_VALUES))]
    elif command == "show":
        return [
            command,
            *draw.choices(("given", "runs_folder=runs", *WHOLE_WORDS, *ODD_VALUES), k=draw.randrange(1, 3)),
        ]
    elif command == "doctor":  # alone it looks at the machine
        return [command, _word(draw, list(keys))]
    else:
        return [draw.choice((*WHOLE_WORDS, *ODD_VALUES, "trian", "plan=1")), "seed=1"]
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        words.insert(draw.randint(1, len(words)), _word(draw, list(keys)))
    return words


def number_line(seed: int) -> list[str]:
    """The words of case `seed`: a sound command line with odd numbers for one or two keys that take numbers."""
    draw = random.Random(seed)
    stage = draw.choice([None] * 3 + list(STAGES))
    command, base, kind = "plan", ["experiment=tiny_grpo", f"algorithm={draw.choice(ALGORITHMS)}"], Config
    if stage is not None:
        command, base, kind = stage.replace("_", "-"), STAGE_BASES[1], STAGES[stage]
    keys = [key for key, words in config_keys(kind).items() if "an integer" in words or "a number" in words]
    lora = ["lora=default"] * draw.randint(0, 1)
    keys = [key for key in keys if lora or ".lora." not in key]
    return [command, *base, *lora, *(f"{draw.choice(keys)}={draw.choice(NUMBERS)}" for _ in range(draw.randint(1, 2)))]


def _word(draw: random.Random, keys: list[str]) -> str:
    if draw.random() < 0.2:
        return draw.choice(WHOLE_WORDS)
    key = draw.choice(keys)
    kind = draw.random()
    if kind < 0.08:
        key = _mangled(draw, key)
    elif kind < 0.12:
        key = f"{key}.{draw.choice(('x', '0', 'name', '_target_', ''))}"
    elif kind < 0.18:
        key = draw.choice(("+", "++", "~")) + key
    return f"{key}={_value(draw, keys)}"


def _value(draw: random.Random, keys: list[str]) -> str:
    kind = draw.random()
    if kind < 0.6:
        return draw.choice(ODD_VALUES)
    if kind < 0.7:
        return "${" + draw.choice(keys) + "}"
    if kind < 0.8:
        return f"[{draw.choice(ODD_VALUES)},{draw.choice(ODD_VALUES)}]"
    if kind < 0.9:
        return (
            "{" + draw.choice(("a", "name", "source", "function", "params", "0")) + ": " + draw.choice(ODD_VALUES) + "}"
        )
    return _mangled(draw, draw.choice(ODD_VALUES))


def _mangled(draw: random.Random, text: str) -> str:
    """The text with one character changed, doubled or left out."""
    if not text:
        return draw.choice("[]{}'\"=,$")
    at = draw.randrange(len(text))
    return draw.choice(
        (
            text[:at] + text[at + 1 :],
            text[: at + 1] + text[at:],
            text[:at] + draw.choice("[]{}'\"=,$. \t~+@:\\") + text[at + 1 :],
        )
    )
