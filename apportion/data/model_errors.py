"""What the libraries raise that read a model's folder, where its files are damaged."""

from __future__ import annotations

# transformers checks few files: what its code meets in a damaged one is what it raises.
_KINDS = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, ImportError)


def of_model_files(error: Exception) -> bool:
    """Whether the error may come from a damaged file of a model, in a call that only reads a model."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    if type(error) is Exception:  # the tokenizers library has no other
        return True
    if "OutOfMemory" in type(error).__name__ or "Accelerator" in type(error).__name__:  # torch's, RuntimeErrors as well
        return False
    return isinstance(error, (*_KINDS, StrictDataclassError, SafetensorError))


def reason(error: Exception) -> str:
    """The first line that says something, at most 200 characters of it.

    >>> reason(ValueError("\\n\\nno such class\\n"))
    'no such class'
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):  # "Validation error for field 'vocab_size':"
        lines = [f"{lines[0]} {lines[1]}"]
    return lines[0][:200] if lines else type(error).__name__
