"""A small vision transformer that names the digit in the middle of a cluttered 16x16 picture.

Overlapping 6x6 patches at stride 4 (a Conv) make 16 tokens; a class token and learned positions join them. Four
pre-norm blocks of width 64: LayerNormalization, attention with 4 heads, LayerNormalization, an MLP of 192 with erf
GELU. The class token, normalized once more, goes into a linear head. Normalization gains start widely spread, which
gives activations the outlier channels of large transformers.

`python -m models.train_vit` makes the file and this card anew.
"""

from __future__ import annotations

import torch
from torch import nn

from models.training import Plan, prepare_torch, publish, train

NAME = "vit_digits"
PLAN = Plan(epochs=50, peak_rate=2e-3, batch=64, gain_spread=0.85)


class Attention(nn.Module):
    """Multi-head self-attention, [N, T, width] to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(count, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5, dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(count, tokens, width))


class Mlp(nn.Module):
    """Two linear layers with an erf GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Logits [N, 10] of pictures x [N, 1, 16, 16]."""

    def __init__(self, width: int = 64, heads: int = 4, hidden: int = 192, depth: int = 4) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, width, 6, stride=4, padding=1)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)
        for linear in (module for module in self.modules() if isinstance(module, nn.Linear)):
            nn.init.trunc_normal_(linear.weight, std=0.05)
            nn.init.zeros_(linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def main() -> None:
    prepare_torch(PLAN)
    publish(train(VisionTransformer(), PLAN), PLAN, name=NAME, text=__doc__)


if __name__ == "__main__":
    main()
