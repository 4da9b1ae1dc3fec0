"""Rewards from a reward model: a Hugging Face sequence classification model with one label.

Token in: where the model's tokenizer has the policy's vocabulary, it reads the very ids that the policy read and
sampled. Otherwise the text is rendered through its own chat template.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from apportion.actors.reward_call import Failure, LimitedCaller, RewardCall, failure_of
from apportion.actors.reward_sources import RewardEntry
from apportion.data.builtin import resolve_model
from apportion.data.errors import DataError
from apportion.data.messages import as_messages
from apportion.data.model_errors import of_model_files, reason
from apportion.data.prompts import TokenizerPath
from apportion.data.rendering import Renderer
from apportion.platform.errors import ConfigError

SETTINGS = ("dtype", "device", "trust_remote_code")
DTYPES = ("float32", "bfloat16", "float16")


class ModelSource:
    """One component of the reward: the model's single logit, as it is.

    `policy_tokenizer` is the policy's tokenizer, or where it is; None counts as another one.
    Settings in the entry's `params`: `dtype` (float32), `device` (cuda if there is
    one) and `trust_remote_code` (false).
    """

    def __init__(self, entry: RewardEntry, policy_tokenizer: Any = None) -> None:
        path = str(entry.function).removeprefix("model:")
        self.name, self.weight = entry.name or "reward_model", entry.weight
        settings = {"dtype": "float32", "device": None, "trust_remote_code": False} | entry.params
        if unknown := set(settings) - set(SETTINGS):
            raise ConfigError(
                f"reward.functions {path}: got params {', '.join(sorted(unknown))}, expected {', '.join(SETTINGS)}"
            )
        if settings["dtype"] not in DTYPES:
            raise ConfigError(f"reward.functions {path}: got dtype {settings['dtype']!r}, expected {', '.join(DTYPES)}")
        if entry.columns:
            raise ConfigError(f"reward.functions {path}: got columns, a reward model reads none; leave them out")
        self._batch_size, self._limit = entry.batch_size or 16, entry.timeout_seconds
        self._caller = LimitedCaller(self.name)
        self._model, self._tokenizer = _load(path, settings)
        self._renderer = Renderer(self._tokenizer, {})
        if isinstance(policy_tokenizer, TokenizerPath):
            policy_tokenizer = policy_tokenizer.load()
        self._longest = getattr(self._model.config, "max_position_embeddings", None)
        self.reads_ids = policy_tokenizer is not None and policy_tokenizer.get_vocab() == self._tokenizer.get_vocab()

    @property
    def hung(self) -> int:
        return self._caller.hung

    def close(self) -> None:
        self._caller.close()

    def missing_columns(self, columns: set[str]) -> list[str]:
        return []

    def score(self, call: RewardCall) -> list[Any]:
        try:
            return self._caller.call(lambda: self._score(call), self._limit)
        except Exception as error:  # noqa: BLE001 - a model that fails on these samples fails these samples
            return [failure_of(error, self.name)] * len(call)

    def _score(self, call: RewardCall) -> list[Any]:
        elements: list[Any] = [None] * len(call)
        sequences: list[list[int]] = []
        fitting = []
        for index in range(len(call)):
            try:
                ids = self._sequence(call, index)
            except DataError as error:  # its own template does not show what was said: no score of something else
                elements[index], ids = Failure("raised", f"{self.name}: {error}"), []
            sequences.append(ids)
            if isinstance(elements[index], Failure):
                continue
            if self._longest is not None and len(ids) > self._longest:
                text = f"{self.name}: got {len(ids)} tokens, the model takes {self._longest}"
                elements[index] = Failure("too_long", text)
            else:
                fitting.append(index)
        fitting.sort(key=lambda index: len(sequences[index]))  # little padding
        for start in range(0, len(fitting), self._batch_size):
            chunk = fitting[start : start + self._batch_size]
            for index, reward in zip(chunk, self._forward([sequences[i] for i in chunk]), strict=True):
                elements[index] = reward
        return elements

    def _sequence(self, call: RewardCall, index: int) -> list[int]:
        if self.reads_ids:
            return [*call.prompt_ids[index], *call.completion_ids[index]]
        prompt, completion = call.prompts[index], call.completions[index]
        answer = completion if isinstance(completion, str) else completion[-1]["content"]
        if not self._tokenizer.chat_template:
            if not isinstance(prompt, str):
                raise ConfigError(f"{self.name}: got messages, but its tokenizer has no chat template")
            return list(self._tokenizer(prompt + answer)["input_ids"])
        messages = [*as_messages(prompt), {"role": "assistant", "content": answer}]
        rendered = self._renderer.checked(messages, None, asks=False)
        return list(self._tokenizer(rendered.text, add_special_tokens=False)["input_ids"])

    def _forward(self, sequences: list[list[int]]) -> list[float]:
        import torch

        # Transformers takes the score at the last token that is not padding, on whichever side that lies.
        pad = self._model.config.pad_token_id
        width = max(map(len, sequences))
        ids = np.full((len(sequences), width), pad, np.int64)
        mask = np.zeros((len(sequences), width), np.int64)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
        device = self._model.device
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.from_numpy(ids).to(device), attention_mask=torch.from_numpy(mask).to(device)
            )
        return output.logits[:, 0].float().cpu().tolist()


def _load(path: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    from apportion.actors.loading import tensors_only

    folder, trust = resolve_model(path), bool(settings["trust_remote_code"])
    try:
        labels = AutoConfig.from_pretrained(folder, trust_remote_code=trust).num_labels
        if labels != 1:
            raise ConfigError(f"reward.functions model:{path}: got a model with {labels} labels, expected 1")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        with tensors_only(f"reward.functions model:{path}"):
            model = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=getattr(torch, settings["dtype"]), trust_remote_code=trust
            )
    except ConfigError:
        raise
    except Exception as error:
        if trust or not of_model_files(error):
            raise
        raise ConfigError(f"reward.functions model:{path}: could not be loaded ({reason(error)})") from None
    if model.config.pad_token_id is None:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad is None:
            raise ConfigError(
                f"reward.functions model:{path}: neither a pad nor an eos token, expected one to pad with"
            )
        model.config.pad_token_id = pad
    device = settings["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), tokenizer
