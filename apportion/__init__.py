"""apportion: reinforcement learning of language models with credit for every token, on Ray, vLLM and DeepSpeed."""

__version__ = "0.1.0"
