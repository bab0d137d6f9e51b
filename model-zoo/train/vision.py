"""The image encoder, named as Hugging Face names CLIP's, the projector, and the heads of the warm-up."""

import torch
import torch.nn.functional as F
from torch import nn

import font
from scenes import COLOURS, GRID, PATCH, PATTERNS, SHAPES, SIZE

WIDTH, HEADS, LAYERS, FFN = 256, 4, 8, 1024
EPS = 1e-5
# The feature layer, as LLaVA counts: the last layer's output is for the class token alone.
FEATURE_LAYER = -2


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        batch, tokens, _ = x.shape
        split = lambda y: y.view(batch, tokens, HEADS, -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x)))
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, tokens, WIDTH))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(WIDTH, EPS), nn.LayerNorm(WIDTH, EPS)
        self.self_attn, self.mlp = Attention(), Mlp()

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    def __init__(self):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(WIDTH) * 0.02)
        self.patch_embedding = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.position_embedding = nn.Embedding(GRID * GRID + 1, WIDTH)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, pixels):
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.to(patches.dtype).expand(len(pixels), 1, -1)
        return torch.cat([first, patches], 1) + self.position_embedding.weight


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))


class VisionModel(nn.Module):
    """Pixels → patch features and the class token's output."""

    def __init__(self):
        super().__init__()
        self.embeddings, self.encoder = Embeddings(), Encoder()
        self.pre_layrnorm, self.post_layernorm = nn.LayerNorm(WIDTH, EPS), nn.LayerNorm(WIDTH, EPS)

    def forward(self, pixels):
        states = [self.pre_layrnorm(self.embeddings(pixels))]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        return states[FEATURE_LAYER][:, 1:], self.post_layernorm(states[-1][:, 0])


class Projector(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(WIDTH, width), nn.Linear(width, width)
        # Image tokens start about as large as those of words.
        nn.init.normal_(self.linear_2.weight, std=0.13 / width**0.5)
        nn.init.zeros_(self.linear_2.bias)

    def forward(self, x):
        return self.linear_2(F.gelu(self.linear_1(x)))


class Heads(nn.Module):
    """What the encoder is asked directly: per patch shape, colour and character, and of patches of a label its
    whole text; of the class token counts and pattern. Not shipped."""

    def __init__(self):
        super().__init__()
        self.sizes = [len(SHAPES) + 1, len(COLOURS) + 1, len(font.CHARACTERS) + 1]
        self.counts = len(SHAPES) + len(COLOURS)
        self.patch = nn.Linear(WIDTH, sum(self.sizes))
        self.text = nn.Linear(WIDTH, 5 * self.sizes[2])
        self.whole = nn.Linear(WIDTH, self.counts * 7 + len(PATTERNS))

    def forward(self, features, first, batch):
        patches, whole = batch["patches"], batch["whole"]
        found = self.patch(features).float().split(self.sizes, -1)
        loss = sum(F.cross_entropy(f.flatten(0, 1), patches[:, i].flatten().long()) for i, f in enumerate(found))
        image, patch = (patches[:, 2].flatten(1) > 0).nonzero(as_tuple=True)
        read = self.text(features[image, patch]).float().view(-1, self.sizes[2])
        loss = loss + F.cross_entropy(read, batch["texts"][image].flatten().long())
        out = self.whole(first).float()
        counts = out[:, : self.counts * 7].reshape(-1, 7)
        loss = loss + F.cross_entropy(counts, whole[:, : self.counts].flatten().long())
        return loss + 0.3 * F.cross_entropy(out[:, self.counts * 7 :], whole[:, self.counts].long())


def normalise(images):
    """uint8 `[n, h, w, 3]` → `[n, 3, h, w]` with mean and deviation 0.5."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0


assert GRID * PATCH == SIZE
