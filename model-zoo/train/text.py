"""The base's tokenizer, and how a question becomes tokens."""

from functools import lru_cache

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

IMAGE_TOKEN = 16
END = 2
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
PREFIX = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
# Tokens of a question with its answer, at most.
SLOT = 24


def build_tokenizer(metadata: dict) -> Tokenizer:
    """SmolLM2's tokenizer out of a GGUF's metadata."""
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, metadata["tokenizer.ggml.token_type"]) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer


class Slots:
    """Questions as rows of `SLOT` tokens, and where their answers lie."""

    def __init__(self, tokenizer: Tokenizer):
        self.encode = lru_cache(maxsize=100_000)(lambda text: tokenizer.encode(text).ids)

    def fill(self, asked: list) -> tuple[np.ndarray, np.ndarray]:
        """`[questions, SLOT]` token ids, and a mask of the positions whose next token is the answer's."""
        ids = np.full((len(asked), SLOT), END, np.int64)
        wanted = np.zeros((len(asked), SLOT), bool)
        for row, (_kind, question, answer) in enumerate(asked):
            head, tail = self.encode(f"\n{question}{SUFFIX}"), self.encode(f"{answer}<|im_end|>")
            ids[row, : len(head) + len(tail)] = head + tail
            wanted[row, len(head) - 1 : len(head) + len(tail) - 1] = True
        return ids, wanted
