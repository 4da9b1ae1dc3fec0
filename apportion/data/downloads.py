"""Models of the hub: which files a run needs, whether they are whole in the cache, and fetching them.

`python -m apportion.data.downloads` fetches what a line of its standard input names, as JSON, and answers a JSON object a line.
It is a process of its own because a download cannot be interrupted otherwise, and ends when its standard input does.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from apportion.data.builtin import PREFIX
from apportion.data.errors import DataError

GIB = 2**30
SAY_SECONDS = 30.0  # between two lines of progress
_WEIGHTS = re.compile(r"(model(-\d+-of-\d+)?)\.safetensors")  # as transformers writes them
_OTHER_FORMATS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack", ".ot",
    ".tflite", ".npz", ".mlmodel", ".pkl", ".zip", ".tar", ".gz", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".pdf", ".mp4",
    ".md", ".gitattributes", ".py",
)  # fmt: skip
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class HubModel:
    """A model that the configuration's `key` names."""

    key: str
    name: str
    remote_code: bool = False
    weights: bool = True  # without: its configuration and tokenizer alone


def on_hub(path: str) -> bool:
    """Whether a model is neither built in nor on this machine's disk."""
    return not path.startswith((PREFIX, "/", "./", "../", "~")) and not Path(path).exists()


def needed_files(names: Iterable[str], remote_code: bool, weights: bool = True) -> list[str]:
    """Of a repository's files those that transformers and vLLM read: safetensors if there are any, else .bin, and everything
    small. Other formats, and code that must not run, stay where they are.

    >>> needed_files(["a.md", "config.json", "model.safetensors", "pytorch_model.bin", "original/x.pth", "m.gguf"], False)
    ['config.json', 'model.safetensors']
    """
    names = sorted(names)
    top = [name for name in names if "/" not in name]
    chosen = [name for name in top if not name.endswith(_OTHER_FORMATS)]
    chosen += [name for name in names if name.startswith("additional_chat_templates/")]
    if remote_code:
        chosen += [name for name in names if name.endswith(".py")]
    if weights:
        tensors = [name for name in top if name.endswith(".safetensors") and not name.startswith("consolidated")]
        usual = [name for name in tensors if _WEIGHTS.fullmatch(name)]
        older = [name for name in top if re.fullmatch(r"(pytorch_model.*|adapter_model)\.bin", name)]
        chosen += usual or tensors or older
    return sorted(chosen)


def cached_folder(model: HubModel) -> Path | None:
    """Where the cache has the model as it was last fetched; None where it is not whole. Asks no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model.name, local_files_only=True, ignore_patterns="*"))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if _is_whole(folder, model.weights) else None


def _is_whole(folder: Path, weights: bool) -> bool:
    if not ((folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()):
        return False
    if not weights or any((folder / name).is_file() for name in ("model.safetensors", "pytorch_model.bin")):
        return True
    for index in _INDICES:
        if (folder / index).is_file():
            files = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
            if all((folder / name).is_file() for name in files):
                return True
    indexed = any((folder / index).is_file() for index in _INDICES)
    return not indexed and any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir())


def needs_the_hub(folder: Path) -> bool:
    """Whether loading a model reads other repositories, too: an adapter's base model, or code that lies elsewhere."""
    if (folder / "adapter_config.json").is_file():
        return True
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in folder.glob("*config.json")]
    return any(re.search(r'"auto_map"[^}]*--', text) for text in texts)


def fetch(model: HubModel, say: Callable[[str], None]) -> bool:
    """Have the model whole in the cache; True if files came. DataError, one line, where that cannot be."""
    from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE:
        if cached_folder(model) is None:
            raise DataError(
                f"{model.key}: got {model.name}, which is not whole in {constants.HF_HUB_CACHE}, with HF_HUB_OFFLINE set, "
                "expected a model that is, or a way to the hub"
            )
        return False
    with _explained(model, say) as reached:
        info = HfApi().model_info(model.name, revision="main", files_metadata=True, timeout=30)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        files = needed_files(sizes, model.remote_code, model.weights)
        revision = info.sha
        missing = [f for f in files if not isinstance(try_to_load_from_cache(model.name, f, revision=revision), str)]
        total = sum(sizes[file] for file in missing)
        _check_room(model, total, Path(constants.HF_HUB_CACHE))
        if missing:
            say(f"downloading {model.name}: {len(missing)} files, {total / GIB:.2f} GiB")
        with _progress(model, total, Path(constants.HF_HUB_CACHE), say):
            folder = Path(snapshot_download(model.name, allow_patterns=[glob.escape(file) for file in files]))
        if not _is_whole(folder, model.weights):
            raise DataError(
                f"{model.key}: got {model.name}, a repository without "
                f"{'config.json or weights that transformers reads' if model.weights else 'config.json'}, expected a "
                "Hugging Face model"
            )
        reached.append(bool(missing))
    return any(reached)


@contextmanager
def _explained(model: HubModel, say: Callable[[str], None]) -> Iterator[list[bool]]:
    """What the hub or the network refuses, as one line. A hub that does not answer is no failure where the cache has all."""
    import httpx2
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    at = f"{model.key}: got {model.name}"
    try:
        yield []
    except GatedRepoError as error:
        raise DataError(
            f"{at}, which is gated, expected access to it: accept its terms on the hub, and set HF_TOKEN (or hf auth login)"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DataError(
            f"{at}, which is neither a folder here nor a model of the hub, expected owner/name, a folder or builtin:NAME; a "
            "private model needs HF_TOKEN"
        ) from error
    except (httpx2.RequestError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if cached_folder(model) is None:
            raise DataError(
                f"{at}, which is not whole in the cache, and the hub does not answer ({reason}), expected a way to the hub: "
                "look at the network, a proxy and HF_ENDPOINT, or give a model's folder"
            ) from error
        say(f"{model.name}: the hub does not answer ({reason}); the copy in the cache is used")
    except OSError as error:
        raise DataError(f"{at}, whose download failed ({error}), expected the system to allow it") from error


def _check_room(model: HubModel, total: int, cache: Path) -> None:
    there = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if total > free:
        raise DataError(
            f"{model.key}: got {model.name}, whose files are {total / GIB:.1f} GiB, expected at most the {free / GIB:.1f} GiB "
            f"that are free under {cache}: make room, or set HF_HOME to another disk"
        )


@contextmanager
def _progress(model: HubModel, total: int, cache: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Say every half minute how much has come."""
    blobs, ended = cache / f"models--{model.name.replace('/', '--')}" / "blobs", threading.Event()
    before = _bytes_in(blobs)

    def tell() -> None:
        while not ended.wait(SAY_SECONDS):
            say(f"{model.name}: {(_bytes_in(blobs) - before) / GIB:.2f} of {total / GIB:.2f} GiB")

    teller = threading.Thread(target=tell, name="download-progress", daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


def _bytes_in(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    total = 0
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):  # a part that is whole by now has another name
            total += entry.stat().st_blocks * 512
    return total


def as_json(models: Sequence[HubModel]) -> str:
    return json.dumps([asdict(model) for model in models])


def _end_with_parent() -> None:
    """Standard input ends when the parent wants no more, or is gone."""
    sys.stdin.read()
    _leave(1)


def _leave(code: int) -> NoReturn:
    """End at once, since threads of a download may still read. Parts of files go: the next start could not use them."""
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            file = Path(os.readlink(link))
            if file.suffix == ".incomplete":
                file.unlink()
    os._exit(code)


def main() -> int:
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    lock = threading.Lock()

    def answer(**said: Any) -> None:
        with lock:
            print(json.dumps(said), flush=True)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    models = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    try:
        came = [fetch(HubModel(**model), lambda text: answer(say=text)) for model in models]
    except DataError as error:
        answer(error=str(error))
        return 1
    answer(came=any(came))
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    _leave(code)
