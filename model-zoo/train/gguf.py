"""Reads the part of GGUF that SmolLM2's file uses: metadata, and tensors of type F32, F16, Q4_1, Q8_0."""

import struct
from pathlib import Path

import numpy as np

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# type id → (values a block, bytes a block)
BLOCKS = {0: (1, 4), 1: (1, 2), 3: (32, 20), 8: (32, 34)}


class Gguf:
    """An opened GGUF file: `metadata`, and `tensor(name)` as float32."""

    def __init__(self, path: Path):
        self.bytes = memoryview(Path(path).read_bytes())
        magic, _version, tensors, entries = struct.unpack_from("<4sIQQ", self.bytes, 0)
        if magic != b"GGUF":
            raise ValueError(f"{path} is no GGUF file")
        self.at = 24
        self.metadata = {self._string(): self._value(self._scalar("I")) for _ in range(entries)}
        self.places = {}
        for _ in range(tensors):
            name, dims = self._string(), self._scalar("I")
            shape = [self._scalar("Q") for _ in range(dims)][::-1]
            self.places[name] = (shape, self._scalar("I"), self._scalar("Q"))
        alignment = self.metadata.get("general.alignment", 32)
        self.data = -(-self.at // alignment) * alignment

    def tensor(self, name: str) -> np.ndarray:
        """The tensor, dequantized, in the shape that PyTorch gives it."""
        shape, kind, offset = self.places[name]
        if kind not in BLOCKS:
            raise ValueError(f"{name} has GGUF type {kind}, which is not read here")
        values, size = BLOCKS[kind]
        count = int(np.prod(shape)) // values
        raw = np.frombuffer(self.bytes, np.uint8, count * size, self.data + offset).reshape(count, size)
        return dequantize(raw, kind).reshape(shape)

    def _scalar(self, code: str):
        (value,) = struct.unpack_from("<" + code, self.bytes, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        self.at += length
        return bytes(self.bytes[self.at - length : self.at]).decode("utf-8")

    def _value(self, kind: int):
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            inner, length = self._scalar("I"), self._scalar("Q")
            return [self._value(inner) for _ in range(length)]
        return self._scalar(SCALARS[kind])


def dequantize(raw: np.ndarray, kind: int) -> np.ndarray:
    """Blocks `[count, bytes]` → float32 `[count, values]`."""
    if kind == 0:
        return raw.view(np.float32)
    half = raw.view(np.float16) if kind == 1 else None
    if half is not None:
        return half.astype(np.float32)
    scale = raw[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == 8:
        return raw[:, 2:].copy().view(np.int8).astype(np.float32) * scale
    minimum = raw[:, 2:4].copy().view(np.float16).astype(np.float32)
    nibbles = np.concatenate([raw[:, 4:] & 15, raw[:, 4:] >> 4], axis=1)
    return nibbles.astype(np.float32) * scale + minimum
