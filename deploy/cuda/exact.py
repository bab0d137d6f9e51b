#!/usr/bin/env python3
"""Where two greedy texts part: what the model's formula says of the two tokens, in f64, weights as the file has them.

usage: exact.py MODEL.gguf TEXTS.json [--tie 0.1]       (needs numpy and gguf)

TEXTS.json is what compare_texts.py wrote. The CPU's kernels round activations to int8 and the GPU's to bf16, so that both
may leave the exact text where two tokens are nearly as likely; the second device's token may be at most --tie nats less
likely than the likeliest one.
"""

import argparse
import json
import sys

import numpy
from gguf import GGUFReader
from gguf.quants import dequantize


class Llama:
    """A decoder as its file describes it; heads turn in neighbouring pairs, as GGUF orders them."""

    def __init__(self, path):
        reader = GGUFReader(path)
        value = lambda key: reader.fields[f"llama.{key}"].parts[reader.fields[f"llama.{key}"].data[0]][0]
        self.layers = int(value("block_count"))
        self.heads, self.kv_heads = int(value("attention.head_count")), int(value("attention.head_count_kv"))
        self.base, self.eps = float(value("rope.freq_base")), float(value("attention.layer_norm_rms_epsilon"))
        self.tensors = {t.name: dequantize(t.data, t.tensor_type).astype(numpy.float32) for t in reader.tensors}
        tokens = reader.fields["tokenizer.ggml.tokens"]
        self.ids = {}
        for index, place in enumerate(tokens.data):
            self.ids.setdefault(plain(bytes(tokens.parts[place]).decode()), index)

    def norm(self, x, name):
        return x / numpy.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * self.tensors[name]

    def log_probs(self, tokens):
        """Of the token after `tokens`."""
        get, embedding = self.tensors.get, self.tensors["token_embd.weight"]
        x = embedding[tokens].astype(numpy.float64)
        count, dim = len(tokens), embedding.shape[1] // self.heads
        angles = numpy.arange(count)[:, None] * self.base ** (-numpy.arange(0, dim, 2) / dim)
        cos, sin = numpy.cos(angles)[:, None], numpy.sin(angles)[:, None]
        hidden = numpy.triu(numpy.ones((count, count), bool), 1)

        def turned(heads):
            even, odd, out = heads[..., 0::2], heads[..., 1::2], numpy.empty_like(heads)
            out[..., 0::2], out[..., 1::2] = even * cos - odd * sin, even * sin + odd * cos
            return out

        for layer in range(self.layers):
            name = lambda part: f"blk.{layer}.{part}.weight"
            times = lambda h, part: h @ get(name(part)).T
            h = self.norm(x, name("attn_norm"))
            q = turned(times(h, "attn_q").reshape(count, self.heads, dim))
            k = turned(times(h, "attn_k").reshape(count, self.kv_heads, dim))
            v = times(h, "attn_v").reshape(count, self.kv_heads, dim)
            mixed = numpy.empty_like(q)
            for head in range(self.heads):
                own = head * self.kv_heads // self.heads
                scores = numpy.where(hidden, -numpy.inf, q[:, head] @ k[:, own].T / numpy.sqrt(dim))
                weights = numpy.exp(scores - scores.max(-1, keepdims=True))
                mixed[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, own]
            x = x + times(mixed.reshape(count, -1), "attn_output")
            h = self.norm(x, name("ffn_norm"))
            gate = times(h, "ffn_gate")
            x = x + times(gate / (1 + numpy.exp(-gate)) * times(h, "ffn_up"), "ffn_down")
        logits = self.norm(x[-1], "output_norm.weight") @ get("output.weight", embedding).T
        logits -= logits.max()
        return logits - numpy.log(numpy.exp(logits).sum())


def plain(token):
    """A byte-level token as text; `None` where its bytes are none."""
    if not hasattr(plain, "bytes"):
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in shown]
        plain.bytes = {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(others)}
    try:
        return bytes(plain.bytes[character] for character in token).decode()
    except (KeyError, UnicodeDecodeError):
        return None


def judge(path, report, tie):
    """Prints what the formula says of each text that parts; how often the second device's token is more than `tie` off."""
    model, likeliest, far, parted = Llama(path), 0, 0, 0
    for entry in report:
        if "tokens" not in entry:
            continue
        before = entry["prompt_ids"] + [model.ids[token] for token in entry["before"]]
        log_probs = model.log_probs(before)
        first, second = (float(log_probs[model.ids[token]]) for token in entry["tokens"])
        below = float(log_probs.max()) - second
        parted, likeliest, far = parted + 1, likeliest + (below == 0), far + (below > tie)
        shown = {"prompt": entry["prompt"], "tokens": entry["tokens"], "second_minus_first": second - first}
        print(json.dumps(shown | {"second_below_best": below}))
    print(f"{parted} texts part; {likeliest} times the second device takes the exact text's token, ", end="")
    print(f"{far} times one that is more than {tie} nats below it")
    return far


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("texts")
    parser.add_argument("--tie", type=float, default=0.1)
    options = parser.parse_args()
    report = json.load(open(options.texts, encoding="utf-8"))
    sys.exit(judge(options.model, report, options.tie) > 0)


if __name__ == "__main__":
    main()
