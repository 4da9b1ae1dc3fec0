"""transformers' own generate as a rollout engine, for machines where vLLM cannot be installed. Slower, same answers."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import numpy as np
import torch

from apportion.actors.engine import own_device
from apportion.actors.engines import EngineSpec, Request, Sample, Sampling
from apportion.actors.loading import attention_softcap, model_refused, tensors_only
from apportion.data.response_text import ResponseText
from apportion.platform import progress
from apportion.platform.channel import ChannelAddress, WeightChannel
from apportion.platform.device_memory import DeviceMemory, device_memory
from apportion.platform.weights import SyncReceipt, TensorEntry, WeightBundle, as_bytes, checksum, receive


def _count_step(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
    """A stopping criterion that stops nothing: it is called once a decoding step, which is progress."""
    progress.advance()
    return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


class TransformersEngine:
    def __init__(self, spec: EngineSpec) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        torch.set_num_threads(spec.threads)
        self._device = own_device()
        with model_refused(spec.model, spec.trust_remote_code), tensors_only(spec.model):
            self._tokenizer = AutoTokenizer.from_pretrained(spec.model, trust_remote_code=spec.trust_remote_code)
            self._model: Any = AutoModelForCausalLM.from_pretrained(
                spec.model, dtype=getattr(torch, spec.dtype), trust_remote_code=spec.trust_remote_code
            )
        self._spell = ResponseText(self._tokenizer)
        if attention_softcap(self._model.config) is not None:
            self._model.set_attn_implementation("eager")  # the default leaves the cap out without a word
        self._model.to(self._device).eval()
        # Of the model's own generation settings only the end tokens count: penalties and the like would change what is
        # sampled behind the configuration's back.
        ends = sorted(self._end_ids())
        self._model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=self._pad_id(), top_k=0)
        self._spec = spec
        torch.manual_seed(spec.seed)

    def generate(self, requests: list[Request], sampling: Sampling) -> list[Sample]:
        size = self._spec.max_sequences
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].token_ids))
        samples: dict[int, Sample] = {}
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            for index, sample in zip(chosen, self._generate([requests[i] for i in chosen], sampling), strict=True):
                samples[index] = sample
        return [samples[i] for i in range(len(requests))]

    @torch.no_grad()
    def _generate(self, requests: list[Request], sampling: Sampling) -> list[Sample]:
        width = max(len(r.token_ids) for r in requests)
        ids = torch.zeros(len(requests), width, dtype=torch.long)
        attention = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            length = len(request.token_ids)
            ids[row, width - length :] = torch.from_numpy(request.token_ids.astype(np.int64))
            attention[row, width - length :] = 1
        if any(r.seed is not None for r in requests):  # one generator for the batch: seeds name the batch, not the row
            torch.manual_seed(sum(r.seed or 0 for r in requests) % (2**63))
        greedy = sampling.temperature == 0
        limits = [sampling.max_tokens if r.max_tokens is None else r.max_tokens for r in requests]
        out = self._model.generate(
            input_ids=ids.to(self._device),
            attention_mask=attention.to(self._device),
            do_sample=not greedy,
            max_new_tokens=max(limits),
            pad_token_id=self._pad_id(),
            return_dict_in_generate=True,
            output_scores=True,
            tokenizer=self._tokenizer,
            stop_strings=sampling.stop or None,
            stopping_criteria=[_count_step],
            **(
                {}
                if greedy
                else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
            ),
        )
        new = out.sequences[:, width:].cpu()
        # scores are the processed logits: what was really sampled from
        logprobs = torch.stack(
            [s.float().log_softmax(-1).cpu().gather(1, new[:, t : t + 1]).squeeze(1) for t, s in enumerate(out.scores)],
            1,
        )
        return [self._cut(new[row, :n], logprobs[row, :n], sampling) for row, n in enumerate(limits)]

    @torch.no_grad()
    def score(self, token_ids: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(token_ids.astype(np.int64))[None].to(self._device)
        logprobs = self._model(ids).logits[0, :-1].float().log_softmax(-1)
        return logprobs.gather(1, ids[0, 1:, None]).squeeze(1).cpu().numpy()

    def _cut(self, ids: torch.Tensor, logprobs: torch.Tensor, sampling: Sampling) -> Sample:
        """A row without what `generate` padded it with, which may be an end token that was never sampled."""
        ends, tokens = self._end_ids(), ids.tolist()
        ended = next((t + 1 for t, token in enumerate(tokens) if token in ends), None)
        stopped = self._first_stop(tokens[: ended or len(tokens)], sampling.stop)
        length = stopped or ended or len(tokens)
        kept = ids[:length].numpy().astype(np.int32)
        text = self._spell(kept)
        reason = "length" if stopped is None and ended is None else "stop"
        return Sample(kept, logprobs[:length].numpy().astype(np.float32), reason, text)

    def _first_stop(self, tokens: list[int], stop: list[str]) -> int | None:
        """Tokens up to and with the one that completes a stop string, which may be the name of a special one."""

        def holds(length: int) -> bool:
            text = self._tokenizer.decode(tokens[:length], skip_special_tokens=False)
            return any(s in text for s in stop)

        if not stop or not holds(len(tokens)):
            return None
        return bisect_left(range(1, len(tokens) + 1), True, key=holds) + 1

    def _end_ids(self) -> set[int]:
        ends = self._model.generation_config.eos_token_id
        if ends is None:
            ends = self._tokenizer.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends}

    def _pad_id(self) -> int:
        pad = self._tokenizer.pad_token_id
        return pad if pad is not None else min(self._end_ids())

    def device_memory(self) -> DeviceMemory | None:
        return device_memory()

    def join(self, address: ChannelAddress, first_member: int) -> None:
        self._channel = WeightChannel(address, first_member, self._device)

    def receive(self, entries: list[TensorEntry], version: int, name: str, check: bool) -> SyncReceipt:
        return self.load(WeightBundle(version, entries, receive(self._channel, entries)), name, check)

    def load(self, bundle: WeightBundle, name: str, check: bool) -> SyncReceipt:
        live = dict(self._model.named_parameters())
        with torch.no_grad():
            for tensor_name, tensor in bundle.tensors():
                if tensor_name in live:
                    live[tensor_name].copy_(tensor)
        homeless = [e.name for e in bundle.entries if e.name not in live]
        if not check:
            sums = {e.name: e.checksum for e in bundle.entries}
            return SyncReceipt(name, bundle.version, sums, 0, homeless, None)
        sums = {n: checksum(as_bytes(p)) for n, p in live.items()}
        proved = [e.name for e in bundle.entries if e.name in live]
        return SyncReceipt(
            name, bundle.version, sums, len(live), homeless, proved, sum(p.nbytes for p in live.values())
        )
