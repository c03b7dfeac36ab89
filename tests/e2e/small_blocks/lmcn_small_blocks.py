"""A vLLM plugin for tests: lets the CPU backend use blocks of 16 tokens, as GPUs do and LMCache's quickstart assumes.

vLLM 0.32 declares multiples of 32 for the CPU, though its "vec16" kernels (which it chooses by itself for such blocks) serve 16.
"""

from __future__ import annotations


def register() -> None:
    from vllm.v1.attention.backend import MultipleOf
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    CPUAttentionBackend.get_supported_kernel_block_sizes = staticmethod(lambda kv_cache_spec=None: [MultipleOf(16)])
