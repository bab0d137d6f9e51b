"""The base's decoder with a low-rank adapter, and attention for several questions about one image."""

import torch
import torch.nn.functional as F
from torch import nn

from gguf import Gguf

HIDDEN, HEADS, KV_HEADS, HEAD, FFN, LAYERS = 576, 9, 3, 64, 1536, 30
EPS, THETA, RANK = 1e-5, 100_000.0, 32
# A CPU, for trials, is quicker without bfloat16.
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32
# Hugging Face's name, GGUF's name, outputs, inputs.
OPERATORS = (
    ("self_attn.q_proj", "attn_q", HEADS * HEAD, HIDDEN), ("self_attn.k_proj", "attn_k", KV_HEADS * HEAD, HIDDEN),
    ("self_attn.v_proj", "attn_v", KV_HEADS * HEAD, HIDDEN), ("self_attn.o_proj", "attn_output", HIDDEN, HEADS * HEAD),
    ("mlp.gate_proj", "ffn_gate", FFN, HIDDEN), ("mlp.up_proj", "ffn_up", FFN, HIDDEN),
    ("mlp.down_proj", "ffn_down", HIDDEN, FFN),
)


def hf_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a GGUF's `attn_q` or `attn_k` in Hugging Face's order."""
    return weight.view(heads, HEAD // 2, 2, -1).transpose(1, 2).reshape(heads * HEAD, -1)


class Adapted(nn.Module):
    """A frozen operator and its adapter. The sum is made anew in each step: one product a layer, no side path."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        outputs, inputs = weight.shape
        self.register_buffer("weight", weight, persistent=False)
        self.lora_A = nn.Parameter(torch.randn(RANK, inputs) * inputs**-0.5)
        self.lora_B = nn.Parameter(torch.zeros(outputs, RANK))

    def merged(self) -> torch.Tensor:
        return (self.weight + self.lora_B @ self.lora_A).to(DTYPE)


def rms_norm(x, weight):
    return F.rms_norm(x.float(), (HIDDEN,), weight, EPS).to(x.dtype)


def rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, base: Gguf, index: int):
        super().__init__()
        tensor = lambda name: torch.from_numpy(base.tensor(f"blk.{index}.{name}.weight").copy())
        weights = {gguf: tensor(gguf) for _, gguf, _, _ in OPERATORS}
        weights["attn_q"] = hf_rows(weights["attn_q"], HEADS)
        weights["attn_k"] = hf_rows(weights["attn_k"], KV_HEADS)
        self.operators = nn.ModuleDict({gguf: Adapted(weights[gguf]) for _, gguf, _, _ in OPERATORS})
        self.register_buffer("attn_norm", tensor("attn_norm"), persistent=False)
        self.register_buffer("ffn_norm", tensor("ffn_norm"), persistent=False)

    def forward(self, x, cos, sin, mask):
        merged = {name: operator.merged() for name, operator in self.operators.items()}
        qkv = torch.cat([merged["attn_q"], merged["attn_k"], merged["attn_v"]])
        x = x + F.linear(self.attend(F.linear(rms_norm(x, self.attn_norm), qkv), cos, sin, mask), merged["attn_output"])
        both = F.linear(rms_norm(x, self.ffn_norm), torch.cat([merged["ffn_gate"], merged["ffn_up"]]))
        gate, up = both.chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, merged["ffn_down"])

    def attend(self, qkv, cos, sin, mask):
        batch, tokens, _ = qkv.shape
        heads = qkv.view(batch, tokens, HEADS + 2 * KV_HEADS, HEAD).transpose(1, 2)
        q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], 1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (y.repeat_interleave(HEADS // KV_HEADS, 1) for y in (k, v))
        shared = tokens - mask.shape[0]
        cut = lambda y, a, b: y[:, :, a:b]
        first = F.scaled_dot_product_attention(*(cut(y, 0, shared) for y in (q, k, v)), is_causal=True)
        rest = F.scaled_dot_product_attention(cut(q, shared, tokens), k, v, attn_mask=mask)
        return torch.cat([first, rest], 2).transpose(1, 2).reshape(batch, tokens, HEADS * HEAD)


class Decoder(nn.Module):
    """SmolLM2 with adapters."""

    def __init__(self, base: Gguf):
        super().__init__()
        self.layers = nn.ModuleList(Layer(base, index) for index in range(LAYERS))
        embedding = torch.from_numpy(base.tensor("token_embd.weight").copy())
        self.register_buffer("embedding", embedding.to(DTYPE), persistent=False)
        self.register_buffer("norm", torch.from_numpy(base.tensor("output_norm.weight").copy()), persistent=False)

    def embed(self, ids):
        return F.embedding(ids, self.embedding)

    def forward(self, x, positions, mask):
        """Hidden states of `x` `[batch, tokens, hidden]` at `positions` `[batch, tokens]`; `mask` is that of the
        last tokens, those of the questions."""
        cos, sin = rotary(positions)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return rms_norm(x, self.norm)

    def logits(self, hidden):
        return F.linear(hidden, self.embedding)


def rotary(positions):
    frequencies = THETA ** (-torch.arange(0, HEAD, 2, device=positions.device, dtype=torch.float32) / HEAD)
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(DTYPE), angles.sin().to(DTYPE)


def question_mask(shared: int, questions: int, slot: int, device) -> torch.Tensor:
    """Each question sees what all share, and of the questions only itself, causally."""
    own = torch.arange(questions * slot, device=device)
    same = own[:, None] // slot == own[None, :] // slot
    causal = own[:, None] >= own[None, :]
    everything = torch.ones(len(own), shared, dtype=torch.bool, device=device)
    return torch.cat([everything, same & causal], 1)
