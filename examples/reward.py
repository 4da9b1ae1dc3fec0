"""A reward of one's own: a function that gets lists and returns one number a completion."""


def named_briefly(prompts, completions, answer, max_words=3, **columns):
    """1 where the answer is named, less 0.1 for each word past `max_words`; None where the row has no answer."""
    rewards = []
    for completion, wanted in zip(completions, answer, strict=True):
        if wanted is None:
            rewards.append(None)
            continue
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        named = wanted.lower() in text.lower()
        rewards.append(float(named) - 0.1 * max(0, len(text.split()) - max_words))
    return rewards
