#!/usr/bin/env python3
"""Writes a GGUF file of a larger Llama's shape with random weights and the tokenizer of a small model's file: to measure a
server with a model whose weights cannot be had. Speed and memory do not depend on the values; quality does.

    loadtest/random_gguf.py SMALL.gguf OUT.gguf --shape 8b --type q4_k
"""

import argparse
import random
import struct
import sys

# Layers, hidden size, FFN channels, query heads, KV heads, channels of a head, whether the head is the embedding.
SHAPES = {"1b": (16, 2048, 8192, 32, 8, 64, True), "8b": (32, 4096, 14336, 32, 8, 128, False)}
# Number, columns and bytes of a block, and where it has halves.
TYPES = {
    "bf16": (30, 1, 2, ()),
    "q4_0": (2, 32, 18, (0,)),
    "q8_0": (8, 32, 34, (0,)),
    "q4_k": (12, 256, 144, (0, 2)),
    "q6_k": (14, 256, 210, (208,)),
}
F32, U32, STRING, ARRAY = 0, 4, 8, 9
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
ALIGNMENT = 32


def read_metadata(data):
    """The file's keys, each with its type and value as they are stored, and nothing of its tensors."""
    at = 24
    (count,) = struct.unpack_from("<Q", data, 16)

    def string(at):
        (length,) = struct.unpack_from("<Q", data, at)
        return at + 8 + length

    def skip(kind, at):
        if kind == STRING:
            return string(at)
        if kind != ARRAY:
            return at + SCALARS[kind]
        inner, length = struct.unpack_from("<IQ", data, at)
        at += 12
        if inner in SCALARS:
            return at + SCALARS[inner] * length
        for _ in range(length):
            at = skip(inner, at)
        return at

    pairs = {}
    for _ in range(count):
        end = string(at)
        key = data[at + 8 : end].decode()
        (kind,) = struct.unpack_from("<I", data, end)
        at = skip(kind, end + 4)
        pairs[key] = data[end:at]
    return pairs


def vocabulary(pairs):
    """How many tokens there are."""
    return struct.unpack_from("<IQ", pairs["tokenizer.ggml.tokens"], 4)[1]


def tensors(shape, vocab):
    """Names and shapes, innermost dimension first; norms have one."""
    layers, hidden, ffn, heads, kv_heads, dim, tied = shape
    yield "token_embd.weight", (hidden, vocab)
    for layer in range(layers):
        name = f"blk.{layer}."
        yield name + "attn_norm.weight", (hidden,)
        yield name + "attn_q.weight", (hidden, heads * dim)
        yield name + "attn_k.weight", (hidden, kv_heads * dim)
        yield name + "attn_v.weight", (hidden, kv_heads * dim)
        yield name + "attn_output.weight", (heads * dim, hidden)
        yield name + "ffn_norm.weight", (hidden,)
        yield name + "ffn_gate.weight", (hidden, ffn)
        yield name + "ffn_up.weight", (hidden, ffn)
        yield name + "ffn_down.weight", (ffn, hidden)
    yield "output_norm.weight", (hidden,)
    if not tied:
        yield "output.weight", (hidden, vocab)


def noise(kind):
    """Some thousand blocks of a type, whose values are small."""
    _, columns, size, halves = TYPES[kind]
    if columns == 1:
        values = (struct.pack("<f", random.uniform(-0.02, 0.02))[2:] for _ in range(1 << 18))
        return b"".join(values)
    blocks = bytearray(random.randbytes(size << 12))
    for block in range(0, len(blocks), size):
        for half in halves:
            struct.pack_into("<e", blocks, block + half, 2e-5)
    return bytes(blocks)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("small")
    parser.add_argument("out")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--type", choices=TYPES, default="q4_k")
    options = parser.parse_args()
    random.seed(1)
    with open(options.small, "rb") as file:
        pairs = read_metadata(file.read())
    shape = SHAPES[options.shape]
    layers, hidden, ffn, heads, kv_heads, dim, _ = shape
    sizes = {
        "block_count": layers,
        "embedding_length": hidden,
        "feed_forward_length": ffn,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "rope.dimension_count": dim,
        "context_length": 8192,
    }
    pairs |= {f"llama.{name}": struct.pack("<II", U32, value) for name, value in sizes.items()}
    kind, columns, size, _ = TYPES[options.type]
    infos, offset, lengths = b"", 0, []
    for name, dims in tensors(shape, vocabulary(pairs)):
        is_norm = len(dims) == 1
        length = 4 * dims[0] if is_norm else dims[0] // columns * dims[1] * size
        infos += struct.pack("<Q", len(name)) + name.encode()
        infos += struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, F32 if is_norm else kind, offset)
        lengths.append((is_norm, length))
        offset += (length + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    header = b"GGUF" + struct.pack("<IQQ", 3, len(lengths), len(pairs))
    for key, value in pairs.items():
        header += struct.pack("<Q", len(key)) + key.encode() + value
    header += infos
    blocks, ones = noise(options.type), struct.pack("<f", 1.0)
    with open(options.out, "wb") as file:
        file.write(header + bytes(-len(header) % ALIGNMENT))
        for is_norm, length in lengths:
            source = ones * (length // 4) if is_norm else blocks
            left = length
            while left > 0:
                left -= file.write(source[:left])
            file.write(bytes(-length % ALIGNMENT))
    print(f"{options.out}: {offset >> 20} MiB of {options.type} in the shape of {options.shape}", file=sys.stderr)


if __name__ == "__main__":
    main()
