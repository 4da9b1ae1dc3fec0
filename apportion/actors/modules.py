"""The torch modules that training engines wrap: a causal LM that gives log-probs of chosen tokens, and a value model.

Logits exist for action tokens only, `logits_chunk_tokens` of them at a time, and the backward pass makes them anew
(where the head is more than a matrix, only if there is more than one chunk). So no tensor has both a whole batch's
tokens and the vocabulary as axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from apportion.actors.plain_head import PlainHeadLogprobs, plain_weight


class CausalLMLogprobs(nn.Module):
    """Wraps a Hugging Face causal LM (or a peft model around one)."""

    def __init__(self, model: nn.Module, logits_chunk_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.chunk = logits_chunk_tokens
        causal = base_causal_lm(model)
        config = causal.config.get_text_config()  # of a vision model, its language part's
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.logit_scale = _logit_scale(config)

    @property
    def calls_head_by_chunk(self) -> bool:
        """Whether the output head is a module that has to be run, not a matrix that this module multiplies with itself."""
        return type(base_causal_lm(self.model).get_output_embeddings()) is not nn.Linear

    def hidden(self, input_ids: Tensor, positions: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
        """`final_hidden` of this model."""
        return final_hidden(self.model, input_ids, positions, visible)

    def logits(self, hidden: Tensor, temperature: float) -> Tensor:
        """[c, D] to float32 [c, V], after the model's own scale and softcap and the sampling temperature."""
        head = base_causal_lm(self.model).get_output_embeddings()
        if self.calls_head_by_chunk:
            return self.finished(head(hidden), temperature)
        # Not head(hidden): ZeRO-3 gathers at every call of a module, and ranks may have different numbers of chunks.
        # A matrix that this module reads itself is gathered once a pass, with this module.
        return self.finished(nn.functional.linear(hidden, head.weight, head.bias), temperature)

    def finished(self, raw: Tensor, temperature: float) -> Tensor:
        """What the output head gave, in float32, after the model's own scale and softcap and the temperature."""
        raw = raw.float()
        if self.logit_scale != 1.0:
            raw = raw * self.logit_scale
        if self.softcap is not None:
            raw = torch.tanh(raw / self.softcap) * self.softcap
        return raw if temperature == 1.0 else raw / temperature

    def _chunk(self, hidden: Tensor, targets: Tensor, temperature: float, entropy_grad: bool) -> tuple[Tensor, ...]:
        logits = self.logits(hidden, temperature)
        normalizer = torch.logsumexp(logits, dim=-1)
        logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - normalizer
        with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
            entropies = normalizer - (torch.softmax(logits, dim=-1) * logits).sum(-1)
        return logprobs, entropies, normalizer

    def chosen(
        self, picked: Tensor, targets: Tensor, temperature: float, entropy_grad: bool = False
    ) -> tuple[Tensor, ...]:
        """Log-prob, entropy and logsumexp of the logits, float32 [r] each, from final hidden states [r, D]."""
        weight = plain_weight(base_causal_lm(self.model).get_output_embeddings())
        if weight is not None and self.softcap is None and not entropy_grad:
            return PlainHeadLogprobs.apply(picked, weight, targets, self.logit_scale / temperature, self.chunk)
        if len(targets) <= self.chunk:
            return self._chunk(picked, targets, temperature, entropy_grad)
        outs = []
        for h, y in zip(picked.split(self.chunk), targets.split(self.chunk), strict=True):
            if torch.is_grad_enabled():
                outs.append(checkpoint(self._chunk, h, y, temperature, entropy_grad, use_reentrant=False))
            else:
                outs.append(self._chunk(h, y, temperature, entropy_grad))
        return tuple(torch.cat(column) for column in zip(*outs, strict=True))

    def forward(
        self,
        input_ids: Tensor,
        rows: Tensor,
        columns: Tensor,
        targets: Tensor,
        temperature: float = 1.0,
        entropy_grad: bool = False,
        work: Callable[[CausalLMLogprobs, Tensor], Any] | None = None,
        tree: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        """Log-prob and entropy of each chosen token, float32 [r], [r]; or what `work` makes of this module and the
        final hidden states [r, D] that predict them, within the same pass."""
        picked = self.hidden(input_ids, *(tree or ()))[rows, columns]
        if work is not None:
            return work(self, picked)
        return self.chosen(picked, targets, temperature, entropy_grad)[:2]


class ValueModel(nn.Module):
    """A decoder with a scalar head. The value at a position is that of the state before the token it predicts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        causal = base_causal_lm(model)
        dtype = next(model.parameters()).dtype
        self.value_head = nn.Linear(causal.config.get_text_config().hidden_size, 1, bias=False, dtype=dtype)
        nn.init.zeros_(self.value_head.weight)  # the first values are 0, not noise

    def forward(
        self, input_ids: Tensor, rows: Tensor, columns: Tensor, tree: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """float32 [r]; `tree` as in `CausalLMLogprobs`."""
        hidden = final_hidden(self.model, input_ids, *(tree or ()))[rows, columns]
        return self.value_head(hidden).squeeze(-1).float()


def final_hidden(
    model: Any, input_ids: Tensor, positions: Tensor | None = None, visible: Tensor | None = None
) -> Tensor:
    """[b, S] ids to final hidden states [b, S, D], right-padded rows, no mask (causal attention needs none).

    For responses behind a shared prompt: `positions` [b, S] and `visible` [b, 1, S, S] bool.
    """
    decoder = base_causal_lm(model).base_model
    if visible is None:
        return decoder(input_ids=input_ids, use_cache=False).last_hidden_state
    return decoder(
        input_ids=input_ids, position_ids=positions, attention_mask=visible, use_cache=False
    ).last_hidden_state


def base_causal_lm(model: Any) -> Any:
    """The Hugging Face model inside a peft model, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _logit_scale(config: Any) -> float:
    if getattr(config, "logits_scaling", None):  # Granite divides
        return 1.0 / config.logits_scaling
    return getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
