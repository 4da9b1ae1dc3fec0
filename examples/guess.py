"""An environment of one's own: guess a number from hints; `environment.cls=examples/guess.py:Guess`."""

import re


class Guess:
    """One instance plays one episode. `reset` gets the row's columns that it names, `step` the policy's text."""

    def __init__(self, highest=10):
        self.highest = highest

    def reset(self, number):
        self.number = int(number)
        return f"I think of a number from 1 to {self.highest}. Your guess?"

    def step(self, action):
        found = re.findall(r"\d+", action)
        if not found:
            return "Answer with a number.", -0.1, False, {}
        guess = int(found[-1])
        if guess == self.number:
            return "Right.", 1.0, True, {}
        return ("Higher." if guess < self.number else "Lower."), 0.0, False, {}


def rows(highest=10):
    """`data.train=function:examples/guess.py:rows`"""
    for number in range(1, highest + 1):
        yield {"prompt": "Let us play.", "number": number}
