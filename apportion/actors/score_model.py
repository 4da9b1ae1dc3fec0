"""A decoder with one score for a whole sequence, as transformers' sequence classification has it: the reward model.

The score is read at a row's last token, which ends the answer. What is saved is loaded by
`AutoModelForSequenceClassification`, and by `reward.functions=model:PATH`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from apportion.actors.loading import attention_refused, check_attention_softcap, model_refused, tensors_only
from apportion.actors.modules import base_causal_lm, final_hidden

HEAD = "score"


class ScoreModel(nn.Module):
    """Wraps a Hugging Face sequence classification model with one label (or a peft model around one)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, rows: Tensor, columns: Tensor, tree: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Ids [rows, S], and where the last token of each sequence [b] stands, to float32 scores [b]; `tree` as in
        `CausalLMLogprobs`."""
        classifier = base_causal_lm(self.model)
        picked = final_hidden(self.model, input_ids, *(tree or ()))[rows, columns]
        return getattr(classifier, HEAD)(picked).squeeze(-1).float()


class ScoreSpec(Protocol):
    """What is read of a stage's spec."""

    model: str
    dtype: str
    attention: str
    trust_remote_code: bool
    lora: Any | None
    seed: int


def load_score_model(spec: ScoreSpec, gradient_checkpointing: bool = False) -> ScoreModel:
    """A reward model from a causal LM's weights with a fresh head, or from one that was trained before.

    A fresh head is drawn from N(0, 1 / (D + 1)) (Stiennon et al. 2020, arXiv 2009.01325, appendix B), by `seed`, so
    that every rank has the same. With `lora` the adapters and the head are trained.
    """
    from transformers import AutoModelForSequenceClassification

    refused = model_refused(spec.model, spec.trust_remote_code)
    with refused, attention_refused(spec.attention, spec.model), tensors_only(spec.model):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            spec.model,
            num_labels=1,
            dtype=getattr(torch, spec.dtype),
            attn_implementation=spec.attention,
            trust_remote_code=spec.trust_remote_code,
            output_loading_info=True,
        )
    check_attention_softcap(model.config, spec.attention, spec.model)
    head = getattr(model, HEAD, None)
    if head is None:
        raise ValueError(
            f"model.path: got {type(model).__name__} without a layer {HEAD!r}, expected a decoder with one"
        )
    if any(name.startswith(f"{HEAD}.") for name in info["missing_keys"]):
        generator = torch.Generator().manual_seed(spec.seed)
        fresh = torch.randn(head.weight.shape, generator=generator) / (head.weight.shape[1] + 1) ** 0.5
        head.weight.data.copy_(fresh)
    model.config.use_cache = False
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if spec.lora is not None:
        model = _with_adapters(model, spec.lora, gradient_checkpointing)
    return ScoreModel(model)


def _with_adapters(model: Any, lora: Any, gradient_checkpointing: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets)
    )
    if gradient_checkpointing:
        model.enable_input_require_grads()
    adapted = get_peft_model(model, settings, autocast_adapter_dtype=False)
    getattr(base_causal_lm(adapted), HEAD).weight.requires_grad_(True)
    return adapted


def save_score_model(
    base: str, named: dict[str, Tensor], folder: Path, trust_remote_code: bool = False, chat_template: str | None = None
) -> None:
    """Write weights with the config and tokenizer of `base` as a classification model with one label.

    `chat_template` is the text of the one that the model was trained with, None for the tokenizer's own.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    with model_refused(base, trust_remote_code):
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code, num_labels=1)
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)
    config.pad_token_id = _padding(tokenizer)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(
            config, dtype=next(iter(named.values())).dtype, trust_remote_code=trust_remote_code
        )
    model.save_pretrained(folder, state_dict={name: tensor.to("cpu") for name, tensor in named.items()})
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)


def _padding(tokenizer: Any) -> int:
    """An id that no answer ends with. transformers reads the score at the last token that is not padding, so eos, with
    which answers do end, must not be it."""
    for known in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id):
        if known is not None and known != tokenizer.eos_token_id:
            return int(known)
    others = [i for i in tokenizer.all_special_ids if i != tokenizer.eos_token_id]
    if not others:
        raise ValueError("tokenizer: got eos as its only special token, expected another one to pad with")
    return int(others[0])
