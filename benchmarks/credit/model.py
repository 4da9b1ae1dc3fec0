"""A small decoder trained from scratch, with the few attributes that the actors ask of a Hugging Face causal LM, and
sampling from it with cached keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    """Pre-norm causal attention and a feed-forward part."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_inner = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.rise, self.fall = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BSD: Tensor, past: Tensor | None, start: int) -> Tensor:
        """`past` [2, b, heads, limit, D / heads] is written at the positions from `start` on, and read up to the last."""
        b, s, width = x_BSD.shape
        q, k, v = self.qkv(self.norm_attention(x_BSD)).view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if past is not None:
            past[0, :, :, start : start + s], past[1, :, :, start : start + s] = k, v
            k, v = past[0, :, :, : start + s], past[1, :, :, : start + s]
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=s > 1)
        x_BSD = x_BSD + self.out(seen.transpose(1, 2).reshape(b, s, width))
        return x_BSD + self.fall(F.gelu(self.rise(self.norm_inner(x_BSD))))


class Decoder(nn.Module):
    """Ids to final hidden states; positions are learned."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, limit: int) -> None:
        super().__init__()
        self.heads, self.limit = heads, limit
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(limit, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=0.05)

    def hidden(self, input_ids: Tensor, past: Tensor | None = None, start: int = 0) -> Tensor:
        """[b, S] to [b, S, D]; with `past` only the prompt (start 0) or one more token can be given."""
        x = self.embedding(input_ids) + self.position.weight[start : start + input_ids.shape[1]]
        for index, layer in enumerate(self.layers):
            x = layer(x, None if past is None else past[index], start)
        return self.norm(x)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(last_hidden_state=self.hidden(input_ids))


class TinyLM(nn.Module):
    """A causal LM as `apportion.actors.modules` sees one."""

    def __init__(self, vocabulary: int, width: int = 208, layers: int = 2, heads: int = 4, limit: int = 64) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=width)
        self.config.get_text_config = lambda: self.config
        self.base_model = Decoder(vocabulary, width, layers, heads, limit)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def logits(self, input_ids: Tensor) -> Tensor:
        """[b, S] to [b, S, V]."""
        return self.lm_head(self.base_model.hidden(input_ids))


class Stream:
    """Rows that go on together, a token at a time, from prompts of one length [b, P]."""

    def __init__(self, model: TinyLM, prompts: Tensor, generator: torch.Generator, greedy: bool = False) -> None:
        decoder, (b, length) = model.base_model, prompts.shape
        self.model, self.generator, self.greedy, self.position = model, generator, greedy, length
        shape = (len(decoder.layers), 2, b, decoder.heads, decoder.limit, model.config.hidden_size // decoder.heads)
        self._past = torch.empty(shape)
        self._hidden = decoder.hidden(prompts, self._past)[:, -1]

    def draw(self) -> tuple[Tensor, Tensor]:
        """The next token of each row [b], and its log-prob [b] at temperature 1."""
        logprobs = self.model.lm_head(self._hidden).log_softmax(-1)
        if self.greedy:
            tokens = logprobs.argmax(-1)
        else:
            tokens = torch.multinomial(logprobs.exp(), 1, generator=self.generator)[:, 0]
        return tokens, logprobs.gather(1, tokens[:, None])[:, 0]

    def advance(self, tokens: Tensor) -> None:
        """Put a token [b] behind each row."""
        self._hidden = self.model.base_model.hidden(tokens[:, None], self._past, self.position)[:, 0]
        self.position += 1


@dataclass
class Ending:
    """How long responses may get, and the token that ends them."""

    tokens: int
    stop: int


@torch.no_grad()
def generate(
    model: TinyLM, prompts: Tensor, ending: Ending, generator: torch.Generator, greedy: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [b, T], log-probs [b, T] and lengths [b], the stop token included."""
    model.eval()
    stream = Stream(model, prompts, generator, greedy)
    ids, logprobs = [], []
    lengths = torch.full((len(prompts),), ending.tokens)
    for step in range(ending.tokens):
        drawn, logprob = stream.draw()
        ids.append(drawn)
        logprobs.append(logprob)
        lengths = torch.where((drawn == ending.stop) & (lengths == ending.tokens), step + 1, lengths)
        if step + 1 == ending.tokens or bool((lengths <= step + 1).all()):
            break
        stream.advance(drawn)
    return torch.stack(ids, 1), torch.stack(logprobs, 1), lengths
