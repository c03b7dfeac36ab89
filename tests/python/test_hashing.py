"""ChunkHasher, ChunkKeys and KeyDeriver: known answers against hashlib, every kind of input, every kind of mistake."""

from __future__ import annotations

import array
import hashlib
import pickle
import random
import struct
import threading
from collections.abc import Callable
from typing import Any

import pytest

import lmcache_native as native

pytestmark = pytest.mark.unit

np = pytest.importorskip("numpy")

CHUNK = 16
NAMESPACE = native.make_namespace("model=m\n")


def chain(tokens: list[int], chunk: int, extra: list[bytes] | None = None, parent: bytes | None = None) -> list[bytes]:
    """The definition, in Python."""
    key = hashlib.sha256(NAMESPACE).digest() if parent is None else parent
    keys = []
    for i in range(len(tokens) // chunk):
        part = tokens[i * chunk : (i + 1) * chunk]
        suffix = extra[i] if extra else b""
        message = key + struct.pack(f"<{chunk}i", *part) + suffix + struct.pack("<II", chunk, len(suffix))
        key = hashlib.sha256(message).digest()
        keys.append(key)
    return keys


def some_tokens(count: int, seed: int = 7) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(-(2**31), 2**31) for _ in range(count)]


@pytest.fixture
def hasher() -> native.ChunkHasher:
    return native.ChunkHasher(NAMESPACE, CHUNK)


def test_namespace_is_the_sha256_of_its_description() -> None:
    assert native.make_namespace("a=1\nb=2\n") == hashlib.sha256(b"a=1\nb=2\n").digest()


def test_describe_namespace_is_sorted_and_unambiguous() -> None:
    assert native.describe_namespace({"b": 2, "a": "x=y", "c": True}) == "a=x=y\nb=2\nc=True\n"
    for fields in ({"a\n": 1}, {"a=b": 1}, {"": 1}, {"a": "1\nb=2"}):
        with pytest.raises(native.InvalidArgument):
            native.describe_namespace(fields)


@pytest.mark.parametrize("count", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK, 5 * CHUNK + 3])
def test_keys_are_the_documented_chain(hasher: native.ChunkHasher, count: int) -> None:
    tokens = some_tokens(count)
    assert list(hasher.hash(tokens)) == chain(tokens, CHUNK)


def test_root_is_the_parent_of_the_first_chunk(hasher: native.ChunkHasher) -> None:
    tokens = some_tokens(2 * CHUNK)
    assert hasher.root == hashlib.sha256(NAMESPACE).digest()
    assert hasher.hash(tokens, parent=hasher.root) == hasher.hash(tokens)


def test_extra_keys_and_parent(hasher: native.ChunkHasher) -> None:
    tokens = some_tokens(3 * CHUNK)
    extra = [b"", b"lora:7", bytes(range(200))]
    assert list(hasher.hash(tokens, extra)) == chain(tokens, CHUNK, extra)
    first = hasher.hash(tokens[:CHUNK])
    rest = hasher.hash(tokens[CHUNK:], parent=first[0])
    assert list(first) + list(rest) == list(hasher.hash(tokens))
    assert hasher.hash(tokens, tuple(extra)) == hasher.hash(tokens, extra)


INPUTS: dict[str, Callable[[list[int]], Any]] = {
    "tuple": tuple,
    "numpy int32": lambda t: np.array(t, np.int32),
    "numpy int64": lambda t: np.array(t, np.int64),
    "read-only numpy": lambda t: np.frombuffer(np.array(t, np.int32).tobytes(), np.int32),
    "numpy slice": lambda t: np.array([0, *t, 0], np.int64)[1:-1],
    "list of numpy ints": lambda t: list(np.array(t, np.int64)),
    "array i": lambda t: array.array("i", t),
    "array q": lambda t: array.array("q", t),
    "memoryview": lambda t: memoryview(np.array(t, np.int32)),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_every_kind_of_input_gives_the_same_keys(hasher: native.ChunkHasher, kind: str) -> None:
    tokens = some_tokens(7 * CHUNK + 5)
    assert list(hasher.hash(INPUTS[kind](tokens))) == chain(tokens, CHUNK)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_torch_tensors(hasher: native.ChunkHasher, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    tokens = some_tokens(4 * CHUNK)
    tensor = torch.tensor(tokens, dtype=getattr(torch, dtype))
    assert list(hasher.hash(tensor)) == chain(tokens, CHUNK)
    with pytest.raises(native.InvalidArgument, match="stride of 2"):
        hasher.hash(torch.stack([tensor, tensor], dim=1)[:, 0])
    with pytest.raises(native.InvalidArgument, match=r"torch\.Tensor of float32"):
        hasher.hash(tensor.to(torch.float32))


def test_a_buffer_is_read_in_place_not_copied(hasher: native.ChunkHasher) -> None:
    tokens = np.arange(CHUNK, dtype=np.int32)
    before = hasher.hash(tokens)
    tokens[0] = 99
    assert hasher.hash(tokens) != before


class Index:
    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


WRONG: dict[str, tuple[Any, str]] = {
    "float": ([0, 1.5], r"tokens\[1\]: a token id \(int\) expected, got float"),
    "bool": ([0, 1, True], r"tokens\[2\]: a token id expected, got bool"),
    "numpy bool": ([np.bool_(True)], r"tokens\[0\]: a token id"),
    "str in list": (["a"], r"tokens\[0\]: a token id \(int\) expected, got str"),
    "None in tuple": ((None,), r"tokens\[0\].*NoneType"),
    "too large": ([0, 2**31], r"tokens\[1\]: a token id within int32 expected, got 2147483648"),
    "too small": ([-(2**31) - 1], r"tokens\[0\]: .*-2147483649"),
    "beyond 64 bits": ([2**70], r"tokens\[0\]: .*1180591620717411303424"),
    "too large by __index__": ([Index(2**31)], r"tokens\[0\]: .*2147483648"),
    "str": ("abc", r"got str"),
    "None": (None, r"got NoneType"),
    "int": (5, r"got int"),
    "generator": ((i for i in range(4)), r"got generator"),
    "bytes": (b"1234", r"got bytes of uint8"),
    "float array": (np.zeros(CHUNK, np.float32), r"numpy\.ndarray of float32"),
    "bool array": (np.zeros(CHUNK, np.bool_), r"numpy\.ndarray of bool"),
    "uint32 array": (np.zeros(CHUNK, np.uint32), r"numpy\.ndarray of uint32"),
    "int16 array": (np.zeros(CHUNK, np.int16), r"numpy\.ndarray of int16"),
    "2-D array": (np.zeros((2, CHUNK), np.int32), r"2 dimensions"),
    "0-D array": (np.zeros((), np.int32), r"0 dimensions"),
    "strided array": (np.zeros(2 * CHUNK, np.int64)[::2], r"stride of 2 elements"),
    "reversed array": (np.zeros(CHUNK, np.int32)[::-1], r"stride of -1 elements"),
    "misaligned array": (np.frombuffer(bytes(4 * CHUNK + 1), np.int32, offset=1), r"misaligned"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_tokens_raise_what_would_be_right(hasher: native.ChunkHasher, kind: str) -> None:
    value, message = WRONG[kind]
    with pytest.raises(native.InvalidArgument, match=message) as raised:
        hasher.hash(value)
    assert raised.value.code == "invalid_argument"
    assert isinstance(raised.value, ValueError)


def test_int64_out_of_range_names_the_position(hasher: native.ChunkHasher) -> None:
    tokens = np.zeros(3 * CHUNK, np.int64)
    tokens[CHUNK + 3] = 2**31
    with pytest.raises(native.InvalidArgument, match=str(CHUNK + 3)):
        hasher.hash(tokens)


def test_int_subclasses_and_index_objects_are_tokens(hasher: native.ChunkHasher) -> None:
    class Token(int):
        pass

    assert hasher.hash([Token(5)] * CHUNK) == hasher.hash([5] * CHUNK)
    assert hasher.hash([Index(5)] * CHUNK) == hasher.hash([5] * CHUNK)  # type: ignore[list-item]


def test_a_list_that_shrinks_while_it_is_read(hasher: native.ChunkHasher) -> None:
    tokens: list[Any] = []

    class Shrink:
        def __index__(self) -> int:
            tokens.clear()
            return 1

    tokens.extend([Shrink()] + [0] * CHUNK)
    with pytest.raises(IndexError):
        hasher.hash(tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"extra_keys": [b"a"]}, r"extra"),
        ({"extra_keys": [b"a", b"b", b"c"]}, r"extra"),
        ({"extra_keys": [b"a", "b"]}, r"extra_keys\[1\]: bytes expected, got str"),
        ({"extra_keys": b"ab"}, r"extra_keys: a sequence of bytes expected, got bytes"),
        ({"extra_keys": 5}, r"extra_keys: a sequence of bytes expected, got int"),
        ({"parent": b"short"}, r"parent: 32 bytes expected, got 5"),
    ],
)
def test_wrong_extra_keys_and_parent(hasher: native.ChunkHasher, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(native.InvalidArgument, match=message):
        hasher.hash([0] * (2 * CHUNK), **arguments)


def test_wrong_hasher() -> None:
    with pytest.raises(native.InvalidArgument, match="namespace: 32 bytes expected, got 3"):
        native.ChunkHasher(b"abc")
    for chunk_tokens in (0, -1, 2**32):
        with pytest.raises(native.InvalidArgument, match="chunk_tokens"):
            native.ChunkHasher(NAMESPACE, chunk_tokens)
    assert native.ChunkHasher(NAMESPACE).chunk_tokens == 256


def test_one_hasher_in_many_threads(hasher: native.ChunkHasher) -> None:
    tokens = np.array(some_tokens(400 * CHUNK), np.int32)
    want = hasher.hash(tokens)
    wrong: list[int] = []
    start = threading.Barrier(4)

    def work(number: int) -> None:
        start.wait()
        wrong.extend(number for _ in range(20) if hasher.hash(tokens) != want)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def step_by_definition(parent: bytes, tokens: list[int], extra: bytes = b"") -> bytes:
    message = parent + struct.pack(f"<{len(tokens)}i", *tokens) + extra + struct.pack("<II", len(tokens), len(extra))
    return hashlib.sha256(message).digest()


@pytest.mark.parametrize("count", [0, 1, CHUNK - 1, CHUNK, 5 * CHUNK + 3])
def test_step_is_the_documented_message(hasher: native.ChunkHasher, count: int) -> None:
    tokens = some_tokens(count)
    parent = hashlib.sha256(b"parent").digest()
    for given in (tokens, tuple(tokens), np.array(tokens, np.int32), np.array(tokens, np.int64), array.array("i", tokens)):
        assert hasher.step(parent, given) == step_by_definition(parent, tokens)
    assert hasher.step(parent, tokens, b"salt") == hasher.step(parent, tokens, extra=b"salt")
    assert hasher.step(parent, tokens, b"salt") == step_by_definition(parent, tokens, b"salt")


def test_step_continues_what_hash_began(hasher: native.ChunkHasher) -> None:
    tokens = some_tokens(3 * CHUNK)
    keys = hasher.hash(tokens)
    assert hasher.step(hasher.root, tokens[:CHUNK]) == keys[0]
    assert hasher.step(keys[1], tokens[2 * CHUNK :]) == keys[2]


def test_wrong_arguments_of_step(hasher: native.ChunkHasher) -> None:
    with pytest.raises(native.InvalidArgument, match="parent: 32 bytes expected, got 3"):
        hasher.step(b"abc", [1])
    with pytest.raises(native.InvalidArgument, match=r"tokens: .* got NoneType"):
        hasher.step(hasher.root, None)  # type: ignore[arg-type]
    with pytest.raises(native.InvalidArgument, match=r"tokens\[1\].* 2147483648"):
        hasher.step(hasher.root, [1, 2**31])
    with pytest.raises(native.InvalidArgument, match=r"tokens\[1\] is 2147483648"):
        hasher.step(hasher.root, np.array([1, 2**31]))
    with pytest.raises(TypeError):
        hasher.step(hasher.root, [1], "salt")  # type: ignore[arg-type]


def test_key_deriver() -> None:
    deriver = native.KeyDeriver(NAMESPACE)
    engine_keys = [b"", b"x", bytes(36), bytes(range(256))]
    want = [hashlib.sha256(NAMESPACE + struct.pack("<I", len(k)) + k).digest() for k in engine_keys]
    assert [deriver.derive(k) for k in engine_keys] == want
    assert list(deriver.derive_all(engine_keys)) == want


# ---- ChunkKeys ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def keys() -> native.ChunkKeys:
    return native.ChunkKeys.from_bytes(b"".join(hashlib.sha256(bytes([i])).digest() for i in range(10)))


def test_chunk_keys_are_a_sequence(keys: native.ChunkKeys) -> None:
    items = list(keys)
    assert len(keys) == len(items) == 10
    assert all(isinstance(k, bytes) and len(k) == 32 for k in items)
    assert keys[0] == items[0]
    assert keys[-1] == items[9]
    assert items[3] in keys
    for index in (10, -11):
        with pytest.raises(IndexError):
            keys[index]


@pytest.mark.parametrize(
    "part", [slice(None), slice(2, 5), slice(5, 2), slice(-3, None), slice(None, None, 3), slice(None, None, -1)]
)
def test_slices(keys: native.ChunkKeys, part: slice) -> None:
    assert list(keys[part]) == list(keys)[part]
    assert list(keys[part][1:]) == list(keys)[part][1:]


def test_a_slice_outlives_its_array(keys: native.ChunkKeys) -> None:
    want = list(keys)[4:6]
    part = keys[2:8][2:4]
    del keys
    assert list(part) == want


def test_equality_hash_and_pickle(keys: native.ChunkKeys) -> None:
    same = native.ChunkKeys.from_bytes(keys.tobytes())
    assert same == keys
    assert hash(same) == hash(keys)
    assert keys[1:] != keys
    assert keys[1:3] == same[1:3]
    assert keys != list(keys)
    assert keys != b""
    assert pickle.loads(pickle.dumps(keys[2:5])) == keys[2:5]


def test_memory_is_shared_and_read_only(keys: native.ChunkKeys) -> None:
    matrix = np.asarray(keys[2:5])
    assert matrix.shape == (3, 32)
    assert matrix.dtype == np.uint8
    assert matrix.tobytes() == keys[2:5].tobytes()
    assert np.shares_memory(matrix, np.asarray(keys))
    view = keys.view()
    assert (view.shape, view.format, view.readonly) == ((10, 32), "B", True)
    want = keys.tobytes()
    del keys
    assert view.tobytes() == want
    with pytest.raises(ValueError, match="read-only"):
        matrix[0] = 0


def test_empty_chunk_keys() -> None:
    empty = native.ChunkKeys.from_bytes(b"")
    assert (len(empty), list(empty), empty.tobytes()) == (0, [], b"")
    assert np.asarray(empty).shape == (0, 32)
    assert empty.view().shape == (0, 32)


def test_from_bytes_wants_whole_keys() -> None:
    with pytest.raises(native.InvalidArgument, match="multiple of 32 bytes expected, got 33"):
        native.ChunkKeys.from_bytes(bytes(33))
