"""A judge that says what a test scripts, and what it is shown: trajectories of letters, prompts, batches."""

import numpy as np

from apportion.actors.judge import Judge, JudgeSpec
from apportion.batch import Batch, Prompt, Trajectory

END = 0  # spelled as nothing, like a special token


def decode(ids):
    return "".join(chr(token) for token in ids if token != END)


def encode(text):
    return [ord(character) for character in text]


def trajectory(text, prompt="p", sample=0, group=0, turn_ids=None):
    response = [*encode(text), END]
    turns = np.zeros(len(response), np.int32) if turn_ids is None else np.asarray(turn_ids, np.int32)
    mask = turns >= 0
    return Trajectory(
        prompt,
        group,
        sample,
        np.array([7, *response], np.int32),
        1,
        mask,
        turns,
        np.where(mask, -1.0, np.nan).astype(np.float32),
        0,
        "stop",
        text,
    )


def batch_of(*texts, **kwargs):
    return Batch.from_trajectories([trajectory(text, sample=i, **kwargs) for i, text in enumerate(texts)])


def prompt(columns=None, name="p", text="1 + 1?"):
    return Prompt(name, np.array([7], np.int32), text, columns or {})


CAPO = {"name": "capo"}


def spec_of(folder=None, **changes):
    fields = {
        "credit": CAPO,
        "tokenizer": "",
        "trust_remote_code": False,
        "delimiter": "\n\n",
        "answer_column": "answer",
        "critiques": None,
        "timeout_seconds": 5.0,
        "batch_timeout_seconds": 20.0,
        "cache_folder": None if folder is None else str(folder),
    }
    return JudgeSpec(**(fields | changes))


class Scripted:
    """Says the given critiques of whatever it is asked, and remembers what that was."""

    durable = True
    name = "scripted"

    def __init__(self, *critiques):
        self.critiques, self.asked = list(critiques), []

    def content(self, case):
        return case.prompt()

    def ask(self, cases, count, deadline):
        self.asked += cases
        return [[self.critiques[k % len(self.critiques)] for k in range(count)] for _ in cases]

    def close(self):
        return None


def judge_with(source, folder=None, **changes):
    return Judge(spec_of(folder, **changes), source, decode)
