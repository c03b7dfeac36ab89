"""Prompts with confident answers, the same in every process: a few words in random order, over and over. The model goes on
repeating them, with the top two logits usually 3 to 9 apart, so that an answer from wrong KV is another answer."""

from __future__ import annotations

import random
from pathlib import Path

_WORDS = (
    "Ada Boole Curie Dirac Euler Fermi Gauss Hopper Ito Joule Kepler Lovelace Maxwell Noether Ohm Pascal "
    "bridge clock engine garden harbour lantern mirror orchard piano quarry river tower violin window "
    "Athens Bergen Cairo Delft Essen Florence Geneva Haifa Izmir Jena Kyoto Lisbon Madrid Naples Oslo"
)


def text(seed: int, times: int) -> str:
    words = random.Random(seed).sample(_WORDS.split(), k=14)
    return (" ".join(words) + ".\n") * times


def tokens(model: Path, seed: int, length: int) -> list[int]:
    """Exactly `length` tokens."""
    from tokenizers import Tokenizer

    found: list[int] = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text(seed, times=length // 14 + 1)).ids
    assert len(found) >= length, f"the text gives only {len(found)} tokens"
    return found[:length]
