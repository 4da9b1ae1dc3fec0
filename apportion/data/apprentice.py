"""`builtin:apprentice`: a small model that has learnt to act in the microwave environment, and nothing of the task.

A language model of 135M parameters sampled at temperature 1 names one of the listed actions in a few per cent of its
turns, which is too seldom to learn from in minutes. The apprentice (about a million parameters) is trained from scratch
on episodes that choose any listed action at random: it knows the language of the task, and its policy is the uniform
one. What is then learnt, is learnt by reinforcement.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apportion.data.environments import Microwave, microwave_rows

STEPS, EPISODES_A_STEP, LEARNING_RATE = 120, 24, 3e-3
VOCABULARY = 512
IGNORED = -100  # label of a token that is not learnt


def build_apprentice(folder: Path) -> None:
    """Train the model and its tokenizer, the same every time, and save them as a Hugging Face folder."""
    import torch
    from transformers import GenerationConfig

    tokenizer = _tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _model(tokenizer)
        _train(model, tokenizer)
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def random_episodes(seed: int) -> Iterator[list[dict[str, str]]]:
    """Conversations without end, every action drawn uniformly from the listed ones; foods of both splits."""
    rng = random.Random(seed)
    rows = [*microwave_rows(held_out=False), *microwave_rows(held_out=True)]
    while True:
        row, kitchen = rng.choice(rows), Microwave()
        messages = [{"role": "user", "content": f"{row['prompt']}\n\n{kitchen.reset(row['food'])}"}]
        done = False
        while not done:
            action = rng.choice(list(Microwave.actions.values()))
            observation, _, done, _ = kitchen.step(action)
            messages += [{"role": "assistant", "content": action}, {"role": "user", "content": observation}]
        yield messages[:-1]


def encoded(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Ids of a conversation and the labels that a language model learns from it: actions and their ends alone."""
    ids: list[int] = []
    labels: list[int] = []
    for message in messages:
        words = tokenizer(f"{message['content']}<|end|>", add_special_tokens=False)["input_ids"]
        learnt = message["role"] == "assistant"
        ids += [tokenizer.convert_tokens_to_ids(f"<|{message['role']}|>"), *words]
        labels += [IGNORED, *(words if learnt else [IGNORED] * len(words))]
    return ids, labels


def _tokenizer() -> Any:
    """Byte pairs over the environment's own text, so that a word is a token or two."""
    from itertools import islice

    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from apportion.data.builtin import TINY_CHAT_TEMPLATE, TINY_SPECIAL_TOKENS

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in TINY_SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [message["content"] for episode in islice(random_episodes(1), 400) for message in episode]
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>", model_max_length=1024
    )
    tokenizer.chat_template = TINY_CHAT_TEMPLATE
    return tokenizer


def _model(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _train(model: Any, tokenizer: Any) -> None:
    import torch
    from torch.nn.utils.rnn import pad_sequence

    episodes = random_episodes(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    model.train()
    for _ in range(STEPS):
        rows = [encoded(tokenizer, next(episodes)) for _ in range(EPISODES_A_STEP)]
        ids = pad_sequence([torch.tensor(i) for i, _ in rows], batch_first=True, padding_value=tokenizer.pad_token_id)
        labels = pad_sequence([torch.tensor(y) for _, y in rows], batch_first=True, padding_value=IGNORED)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
