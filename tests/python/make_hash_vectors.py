"""Known answers for the C++ hash tests, from hashlib: `python tests/python/make_hash_vectors.py > tests/data/hash_vectors.hpp`.

The message of each key is built here from its definition (cpp/include/lmcn/chunk_hasher.hpp), not from the C++ code.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field

DESCRIPTION = "dtype=bfloat16\nmodel=test\n"


def tokens(seed: int, count: int) -> list[int]:
    """Spread over all of int32, both signs; make_tokens() in chunk_hasher_test.cpp is the same."""
    values = [(seed + i) * 2654435761 % 2**32 for i in range(count)]
    return [value - 2**32 if value >= 2**31 else value for value in values]


def step(parent: bytes, chunk: list[int], extra: bytes) -> bytes:
    message = parent + struct.pack(f"<{len(chunk)}i", *chunk) + extra + struct.pack("<II", len(chunk), len(extra))
    return hashlib.sha256(message).digest()


@dataclass(frozen=True, slots=True)
class ChainCase:
    name: str
    chunk_tokens: int
    token_count: int
    seed: int = 1
    extra: list[bytes] = field(default_factory=list)
    parent: bytes = b""

    def keys(self) -> list[bytes]:
        namespace = hashlib.sha256(DESCRIPTION.encode()).digest()
        key = self.parent or hashlib.sha256(namespace).digest()
        all_tokens = tokens(self.seed, self.token_count)
        keys = []
        for i in range(self.token_count // self.chunk_tokens):
            chunk = all_tokens[i * self.chunk_tokens : (i + 1) * self.chunk_tokens]
            key = step(key, chunk, self.extra[i] if self.extra else b"")
            keys.append(key)
        return keys


def pattern(count: int) -> bytes:
    return bytes(i * 7 % 256 for i in range(count))


PARENT = hashlib.sha256(b"some earlier chunk").digest()
CHAINS = [
    ChainCase("no_tokens", 256, 0),
    ChainCase("less_than_a_chunk", 256, 255),
    ChainCase("one_token_chunks", 1, 3),
    ChainCase("five_token_chunks_fill_a_block_exactly", 5, 10),
    ChainCase("sixteen_token_chunks_and_a_tail", 16, 16 * 4 + 15, seed=2),
    ChainCase("chunks_of_256", 256, 256 * 3, seed=3),
    ChainCase("chunks_of_502", 502, 502 * 2),
    ChainCase("chunks_of_504", 504, 504 * 2),
    ChainCase("chunks_of_505", 505, 505 * 2),
    ChainCase("chunks_of_1024", 1024, 2048, seed=4),
    ChainCase("chunks_of_1025", 1025, 2050, seed=5),
    ChainCase("chunks_of_5000", 5000, 10001, seed=6),
    ChainCase("extras_of_many_lengths", 16, 16 * 5, extra=[b"", b"lora=sql", pattern(64), pattern(5000), b"\0"]),
    ChainCase("extras_with_256", 256, 512, extra=[pattern(32), pattern(1)]),
    ChainCase("parent_given", 64, 128, parent=PARENT),
    ChainCase("parent_and_extras", 64, 128, parent=PARENT, extra=[b"a", b"b"]),
]
STEPS = [(0, b""), (1, b""), (255, b""), (7, b"tail"), (3000, pattern(3000))]
DERIVED_BYTES = [0, 1, 8, 16, 32, 36, 83, 84, 200, 5000]
NAMESPACES = ["", "a=1\n", DESCRIPTION, "x" * 3000]


def quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"') + '"'


def hex_list(values: list[bytes]) -> str:
    return "{" + ", ".join(quoted(value.hex()) for value in values) + "}"


def header() -> str:
    lines = [
        "// Written by tests/python/make_hash_vectors.py from hashlib; do not edit. Byte strings are in hex.",
        "// clang-format off",
        "#pragma once",
        "",
        "#include <cstdint>",
        "#include <string>",
        "#include <vector>",
        "",
        "namespace lmcn::vectors {",
        "",
        f"inline const std::string kDescription = {quoted(DESCRIPTION)};",
        "",
        "struct Chain { std::string name; std::uint32_t chunk_tokens, token_count, seed;"
        " std::string parent; std::vector<std::string> extra, keys; };",
        "inline const std::vector<Chain> kChains = {",
    ]
    for case in CHAINS:
        lines.append(
            f'    {{"{case.name}", {case.chunk_tokens}, {case.token_count}, {case.seed}, {quoted(case.parent.hex())}, '
            f"{hex_list(case.extra)},\n     {hex_list(case.keys())}}},"
        )
    lines += ["};", "", "struct Step { std::uint32_t token_count; std::string extra, parent, key; };"]
    lines.append("inline const std::vector<Step> kSteps = {")
    for count, extra in STEPS:
        key = step(PARENT, tokens(1, count), extra)
        lines.append(f'    {{{count}, "{extra.hex()}", "{PARENT.hex()}", "{key.hex()}"}},')
    lines += ["};", "", "struct Derived { std::string engine_key, key; };  // in the namespace of kDescription"]
    lines.append("inline const std::vector<Derived> kDerived = {")
    namespace = hashlib.sha256(DESCRIPTION.encode()).digest()
    for count in DERIVED_BYTES:
        key = hashlib.sha256(namespace + struct.pack("<I", count) + pattern(count)).digest()
        lines.append(f'    {{"{pattern(count).hex()}", "{key.hex()}"}},')
    lines += ["};", "", "struct Namespace { std::string description, id; };", "inline const std::vector<Namespace> kNamespaces = {"]
    lines += [f'    {{{quoted(text)}, "{hashlib.sha256(text.encode()).hexdigest()}"}},' for text in NAMESPACES]
    lines += ["};", "", "}  // namespace lmcn::vectors"]
    return "\n".join(lines)


if __name__ == "__main__":
    print(header())
