"""Look at the files of a model's folder as far as that takes no time: whole weights, and an embedding for every token that
the tokenizer writes."""

from __future__ import annotations

import functools
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apportion.platform.errors import ConfigError

INDEX = "model.safetensors.index.json"
_BIN_INDEX = "pytorch_model.bin.index.json"  # of the older format, which is read where there are no safetensors
_LARGEST_SIZE = 2**31  # of a model's dimension: what is above it is damage
_MOST_LAYERS = 10_000
_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "head_dim", "max_position_embeddings", "n_positions",
)  # fmt: skip
_OF_EACH_LAYER = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim")  # may be lists
_LAYER = re.compile(r"^(?:model\.)?layers\.(\d+)\.")  # a language model's: those of images have names before it
_KINDS: dict[str, tuple[type, str]] = {
    "layer_types": (list, "a list"), "architectures": (list, "a list"), "model_type": (str, "text"),
    "sliding_window": (int, "a whole number"), "quantization_config": (dict, "a mapping"), "auto_map": (dict, "a mapping"),
}  # fmt: skip
_ROLES = {"eos_token": "end-of-sequence", "pad_token": "padding", "bos_token": "beginning-of-sequence"}


def read_json(file: Path, what: str) -> dict[str, Any]:
    """A mapping from a JSON file. ConfigError for anything else."""
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not readable ({_plain(error)}), expected {what}") from error
    if not isinstance(read, dict):
        raise ConfigError(f"{file}: got a {type(read).__name__}, expected {what}, a mapping")
    return read


def check_sizes(config: Mapping[str, Any], file: Path) -> None:
    """ConfigError for a dimension that no model has."""
    for name in _SIZES:
        size = config.get(name)
        if size is None or (isinstance(size, list) and name in _OF_EACH_LAYER):
            continue
        most = _MOST_LAYERS if name == "num_hidden_layers" else _LARGEST_SIZE
        if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
            raise ConfigError(f"{file}: got {name} {size!r:.40}, expected a whole number above 0")
        if size > most:
            raise ConfigError(f"{file}: got {name} {size!r:.40}, expected a whole number of at most {most:,}")
    for name, (kind, expected) in _KINDS.items():
        if not isinstance(config.get(name), kind | None):
            raise ConfigError(f"{file}: got {name} {config[name]!r:.40}, expected {expected}")
    if not all(isinstance(name, str) for name in config.get("layer_types") or ()):
        raise ConfigError(f"{file}: got layer_types {config['layer_types']!r:.40}, expected a list of text")


def tensors_of(folder: Path | None) -> dict[str, list[int]]:
    """Shapes by name, from the headers of the safetensors files. ConfigError for a file that is not whole."""
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")) if folder is not None else ():
        shapes |= {name: entry["shape"] for name, entry in _header(file).items()}
    return shapes


def _header(file: Path) -> dict[str, dict[str, Any]]:
    _check_link(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= size:
            raise ConfigError(
                f"got {file}, which is no safetensors file (left over from git without lfs?), expected the "
                "model's weights: fetch them"
            )
        text = stream.read(length)
    try:
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        sound = all(all(isinstance(n, int) for n in entry["shape"]) for entry in entries.values())
        expected = 8 + length + int(end)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        sound, expected = False, size
    if not sound:
        raise ConfigError(f"got {file}, whose header is damaged, expected the model's weights: fetch the file again")
    if size != expected:
        raise ConfigError(
            f"got {file} of {size:,} bytes, whose header says {expected:,}: it is "
            f"{'truncated' if size < expected else 'damaged'}, expected whole weights: fetch the file again"
        )
    return entries


def _check_link(file: Path) -> None:
    if not file.exists():
        raise ConfigError(f"got {file}, a link to a file that is not there, expected the model's weights: fetch them")


def check_weights(folder: Path, path: str, key: str) -> None:
    """ConfigError for a model's folder whose weights are truncated, or of which a part is missing."""
    older = sorted(folder.glob("pytorch_model*.bin")) if not any(folder.glob("*.safetensors")) else []
    try:
        tensors_of(folder)
        for file in older:
            _check_link(file)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
    index = folder / INDEX
    names_parts = index.is_file() and not (folder / "model.safetensors").is_file()
    weight_map = read_json(index, "an index of the weights").get("weight_map") if names_parts else {}
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ConfigError(f"{key}: got {index} without a weight_map, expected an index of the weights: fetch it again")
    for name in missing_shards(folder):
        raise ConfigError(
            f"{key}: got {path}, whose index names {name}, which is not there, expected all parts of the weights: fetch "
            "that file"
        )
    for file in older:
        with file.open("rb") as stream:
            packed = stream.read(2) == b"PK"
        if packed and not zipfile.is_zipfile(file):  # its table of contents is at the end
            raise ConfigError(f"{key}: got {file}, which is truncated, expected whole weights: fetch the file again")


def check_fit(config: Mapping[str, Any], folder: Path, path: str, key: str) -> None:
    """ConfigError where config.json says more layers than the weights have."""
    tensors = tensors_of(folder)
    if "auto_map" in config or missing_shards(folder):  # code of the model's own may name and join them otherwise
        return
    numbers = [int(found[1]) for name in tensors if (found := _LAYER.search(name))]
    layers = config.get("num_hidden_layers")
    if numbers and layers is not None and layers > max(numbers) + 1:
        raise ConfigError(
            f"{key}: got {path}, whose config.json has num_hidden_layers {layers} and whose weights have "
            f"{max(numbers) + 1} layers, expected as many: fetch both again"
        )


def missing_shards(folder: Path) -> list[str]:
    """Files that the index of the weights names and that are not in the folder; none where there is no readable index."""
    name = INDEX if any(folder.glob("*.safetensors")) or (folder / INDEX).is_file() else _BIN_INDEX
    try:
        index = json.loads((folder / name).read_text(encoding="utf-8"))
        return sorted({name for name in index["weight_map"].values() if not (folder / name).is_file()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


# --- tokenizer ---


@dataclass(frozen=True)
class _Tokenizer:
    """What a tokenizer's files say. `added` are tokens of their own, which ordinary text does not give."""

    vocabulary: int  # one above the highest id of the ordinary tokens
    added: Mapping[str, int]
    roles: Mapping[str, str]  # eos_token and the like: its text
    template: str  # with which it renders a chat
    around: str  # the tokens that it puts around any text

    @property
    def size(self) -> int:
        return max([self.vocabulary, *(number + 1 for number in self.added.values())])


def check_tokenizer(folder: Path, path: str, key: str, chat_template: str | None, vocabulary: int | None) -> None:
    """ConfigError where the model has no embedding for a token that its tokenizer writes. `vocabulary` is the number of
    embeddings, `chat_template` the text of a template in place of the tokenizer's own.

    An added token that neither the template nor a role uses is allowed: some published models have one.
    """
    if not isinstance(vocabulary, int):
        return
    _check_ids(folder, path, key, vocabulary)
    tokenizer = _read_tokenizer(folder)
    if tokenizer is None or tokenizer.size <= vocabulary:
        return
    used = None
    if tokenizer.vocabulary > vocabulary:
        used = "ordinary text gives them"
    for role, text in tokenizer.roles.items():
        if tokenizer.added.get(text, 0) >= vocabulary:
            used = used or f"its {_ROLES[role]} token {text!r} has id {tokenizer.added[text]}"
    places = {
        "its chat template writes": tokenizer.template if chat_template is None else chat_template,
        "it puts around a text": tokenizer.around,
    }
    for text, number in tokenizer.added.items():
        for place, written in places.items():
            if number >= vocabulary and text in written:
                used = used or f"{place} {text!r}, id {number}"
    if used is not None:
        raise ConfigError(
            f"{key}: got {path}, whose tokenizer has {tokenizer.size} tokens and whose embeddings are {vocabulary} ({used}), "
            f"expected an embedding for each token: resize the model (resize_token_embeddings({tokenizer.size})), or "
            "take that token out of the tokenizer"
        )


def _check_ids(folder: Path, path: str, key: str, vocabulary: int) -> None:
    """The ids that a model's own files give for the end of a sequence and for padding."""
    for file in (folder / "config.json", folder / "generation_config.json"):
        if not file.is_file():
            continue
        read = read_json(file, "a model's settings")
        inner = read.get("text_config")
        read = {**(inner if isinstance(inner, dict) else {}), **read}
        for name in ("eos_token_id", "pad_token_id"):
            ids = read.get(name)
            for number in ids if isinstance(ids, list) else [ids]:
                lowest = -1 if name == "pad_token_id" else 0  # -1: no padding
                if number is not None and (not isinstance(number, int) or not lowest <= number < vocabulary):
                    raise ConfigError(
                        f"{key}: got {path}, whose {file.name} has {name} {number!r:.40}, outside the model's {vocabulary} "
                        f"embeddings, expected 0 to {vocabulary - 1}: correct it there"
                    )


def _read_tokenizer(folder: Path) -> _Tokenizer | None:
    """None where the files are of another kind than tokenizer.json or vocab.json."""
    files = [folder / name for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json", "chat_template.jinja")]
    stamps = tuple((str(file), file.stat().st_mtime_ns) for file in files if file.is_file())
    try:
        return _tokenizer_of(folder, stamps)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ConfigError(
            f"{folder}: got tokenizer files that are damaged ({type(error).__name__}: {_plain(error)}), expected those of a "
            "Hugging Face tokenizer: fetch them again"
        ) from error


@functools.lru_cache(maxsize=8)
def _tokenizer_of(folder: Path, stamps: tuple[tuple[str, int], ...]) -> _Tokenizer | None:
    """`stamps` are of the files that it is read from: some have many megabytes."""
    added: dict[str, int] = {}
    around = ""
    if (folder / "tokenizer.json").is_file():
        read = read_json(folder / "tokenizer.json", "a tokenizer")
        model = read.get("model")
        words = model.get("vocab") if isinstance(model, dict) else None
        if not isinstance(words, dict | list):
            return None
        ids = words if isinstance(words, dict) else {str(word[0]): at for at, word in enumerate(words)}
        added |= {entry["content"]: entry["id"] for entry in read.get("added_tokens") or ()}
        around = json.dumps(read.get("post_processor"), ensure_ascii=False)
    elif (folder / "vocab.json").is_file():
        ids = read_json(folder / "vocab.json", "a vocabulary")
    else:
        return None
    settings = (
        read_json(folder / "tokenizer_config.json", "a tokenizer's settings")
        if (folder / "tokenizer_config.json").is_file()
        else {}
    )
    for number, entry in (settings.get("added_tokens_decoder") or {}).items():
        added.setdefault(entry["content"], int(number))
    ordinary = [number for word, number in ids.items() if word not in added]
    roles = dict(_roles(settings))
    for text in roles.values():  # one that the tokenizer lacks is added to it when it is loaded
        if text not in ids and text not in added:
            added[text] = max([*ids.values(), *added.values(), -1]) + 1
        added.setdefault(text, ids.get(text, 0))
    return _Tokenizer(max([*ordinary, -1]) + 1, added, roles, _template(folder, settings), around)


def _roles(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for role in _ROLES:
        token = settings.get(role)
        text = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(text, str):
            raise ValueError(f"{role} is {str(token)!r:.40}")
        if text:
            yield role, text


def _template(folder: Path, settings: Mapping[str, Any]) -> str:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    template = settings.get("chat_template")
    return template if isinstance(template, str) else json.dumps(template, ensure_ascii=False)


def _plain(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
