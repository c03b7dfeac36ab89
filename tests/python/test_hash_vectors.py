from __future__ import annotations

from pathlib import Path

from make_hash_vectors import header


def test_checked_in_vectors_are_those_of_the_script() -> None:
    path = Path(__file__).parent.parent / "data" / "hash_vectors.hpp"
    assert path.read_text() == header() + "\n"
