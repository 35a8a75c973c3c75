"""Hand-written sequence models: transformers of many styles, recurrent and convolutional text models."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import VOCAB, Entry, dense, entry, images, integers, tokens

CLASSES = 8
DIM = 32
HEADS = 4


class FeedForward(nn.Sequential):
    """The perceptron of a transformer block."""

    def __init__(self, dim: int, hidden: int, p: float = 0.0) -> None:
        super().__init__(
            nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(p), nn.Linear(hidden, dim), nn.Dropout(p)
        )


# ---------------------------------------------------------------------------------------------------------
# Vision transformers


class FusedAttention(nn.Module):
    """Attention whose fused projection is reshaped to (3, batch, heads, length, depth)."""

    def __init__(self, dim: int, heads: int, fused: bool, p: float = 0.0) -> None:
        super().__init__()
        self.num_heads = heads
        self.scale = (dim // heads) ** -0.5
        self.fused = fused
        self.qkv = nn.Linear(dim, dim * 3)
        self.attn_drop = nn.Dropout(p)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            attn = self.attn_drop(attn.softmax(dim=-1))
            x = attn @ v
        x = x.transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))


class ViTBlock(nn.Module):
    """A pre-norm block of attention and perceptron."""

    def __init__(self, dim: int, heads: int, fused: bool, p: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = FusedAttention(dim, heads, fused, p)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, 2 * dim, p)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer with a class token."""

    def __init__(self, fused: bool = False, p: float = 0.0) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, DIM, kernel_size=8, stride=8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, DIM) * 0.1)
        self.pos_embed = nn.Parameter(torch.randn(1, 17, DIM) * 0.1)
        self.blocks = nn.Sequential(*[ViTBlock(DIM, HEADS, fused, p) for _ in range(2)])
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = x + self.pos_embed
        x = self.norm(self.blocks(x))
        return self.head(x[:, 0])


class MixerBlock(nn.Module):
    """A perceptron over the tokens and one over the channels."""

    def __init__(self, patches: int, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.tokens = FeedForward(patches, 2 * patches)
        self.norm2 = nn.LayerNorm(dim)
        self.channels = FeedForward(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """An MLP-Mixer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, DIM, kernel_size=8, stride=8)
        self.blocks = nn.Sequential(MixerBlock(16, DIM), MixerBlock(16, DIM))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


class SpatialGatingBlock(nn.Module):
    """The block of gMLP: one half of the channels gates the other after mixing the tokens."""

    def __init__(self, patches: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 2 * hidden)
        self.gate_norm = nn.LayerNorm(hidden)
        self.spatial = nn.Conv1d(patches, patches, kernel_size=1)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        u, v = F.gelu(self.up(self.norm(x))).chunk(2, dim=-1)
        return x + self.down(u * self.spatial(self.gate_norm(v)))


class GMLP(nn.Module):
    """A gMLP on patches."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, DIM, kernel_size=8, stride=8)
        self.blocks = nn.Sequential(SpatialGatingBlock(16, DIM, 32), SpatialGatingBlock(16, DIM, 32))
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.blocks(x).mean(dim=1))


def window_partition(x: Tensor, window: int) -> Tensor:
    """Return the windows of a channels-last image, one after another."""
    B, H, W, C = x.shape
    x = x.view(B, H // window, window, W // window, window, C)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, window * window, C)


def window_reverse(windows: Tensor, window: int, H: int, W: int) -> Tensor:
    """Return the image that was cut into these windows."""
    B = windows.shape[0] // ((H // window) * (W // window))
    x = windows.view(B, H // window, W // window, window, window, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(B, H, W, -1)


class WindowAttention(nn.Module):
    """Attention within windows, with a relative position bias for each head."""

    relative_position_index: Tensor

    def __init__(self, dim: int, window: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.1)
        coords = torch.stack(
            torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        ).flatten(1)
        relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0) + window - 1
        index = relative[:, :, 0] * (2 * window - 1) + relative[:, :, 1]
        self.register_buffer("relative_position_index", index)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        B_, N, C = x.shape
        qkv = self.qkv(x).reshape(B_, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)].view(N, N, -1)
        attn = attn + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            windows = mask.shape[0]
            attn = attn.view(B_ // windows, windows, self.num_heads, N, N) + mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.num_heads, N, N)
        x = (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(B_, N, C)
        return self.proj(x)


class SwinBlock(nn.Module):
    """A block of window attention, of which every second one is shifted."""

    attn_mask: Tensor | None

    def __init__(self, dim: int, size: int, window: int, shift: int, heads: int) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim, 2 * dim)
        mask = None
        if shift:
            image = torch.zeros((1, size, size, 1))
            slices = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
            for i, rows in enumerate(slices):
                for j, columns in enumerate(slices):
                    image[:, rows, columns, :] = 3 * i + j
            areas = window_partition(image, window).squeeze(-1)
            mask = (areas.unsqueeze(1) != areas.unsqueeze(2)).float() * -100.0
        self.register_buffer("attn_mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        shortcut = x
        x = self.norm1(x)
        if self.shift > 0:
            x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2))
        windows = self.attn(window_partition(x, self.window), self.attn_mask)
        x = window_reverse(windows, self.window, H, W)
        if self.shift > 0:
            x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2))
        x = shortcut + x
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """Four neighbours joined and projected."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x0, x1 = x[:, 0::2, 0::2, :], x[:, 1::2, 0::2, :]
        x2, x3 = x[:, 0::2, 1::2, :], x[:, 1::2, 1::2, :]
        return self.reduction(self.norm(torch.cat([x0, x1, x2, x3], -1)))


class Swin(nn.Module):
    """A transformer of shifted windows."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 16, kernel_size=4, stride=4)
        self.norm0 = nn.LayerNorm(16)
        self.stage1 = nn.Sequential(SwinBlock(16, 8, 4, 0, HEADS), SwinBlock(16, 8, 4, 2, HEADS))
        self.merge = PatchMerging(16)
        self.stage2 = nn.Sequential(SwinBlock(32, 4, 4, 0, HEADS))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(self.patch_embed(x).permute(0, 2, 3, 1))
        x = self.stage2(self.merge(self.stage1(x)))
        return self.head(self.norm(x).mean(dim=(1, 2)))


# ---------------------------------------------------------------------------------------------------------
# Decoders


class CausalSelfAttention(nn.Module):
    """The attention of nanoGPT."""

    bias: Tensor

    def __init__(self, dim: int, heads: int, block_size: int, flash: bool, p: float) -> None:
        super().__init__()
        self.c_attn = nn.Linear(dim, 3 * dim, bias=False)
        self.c_proj = nn.Linear(dim, dim, bias=False)
        self.attn_dropout = nn.Dropout(p)
        self.resid_dropout = nn.Dropout(p)
        self.n_head, self.n_embd, self.dropout, self.flash = heads, dim, p, flash
        if not flash:
            mask = torch.tril(torch.ones(block_size, block_size)).view(1, 1, block_size, block_size)
            self.register_buffer("bias", mask)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if self.flash:
            p = self.dropout if self.training else 0
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=p, is_causal=True)
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            att = self.attn_dropout(F.softmax(att, dim=-1))
            y = att @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class GPTBlock(nn.Module):
    """The block of nanoGPT."""

    def __init__(self, dim: int, heads: int, block_size: int, flash: bool, p: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim, bias=False)
        self.attn = CausalSelfAttention(dim, heads, block_size, flash, p)
        self.ln_2 = nn.LayerNorm(dim, bias=False)
        self.mlp = FeedForward(dim, 4 * dim, p)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """NanoGPT: its token embedding is also its head; with targets it returns the loss as well."""

    def __init__(self, flash: bool = True, p: float = 0.0, block_size: int = 16) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, DIM),
                "wpe": nn.Embedding(block_size, DIM),
                "drop": nn.Dropout(p),
                "h": nn.ModuleList([GPTBlock(DIM, HEADS, block_size, flash, p) for _ in range(2)]),
                "ln_f": nn.LayerNorm(DIM, bias=False),
            }
        )
        self.lm_head = nn.Linear(DIM, VOCAB, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        pos = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.transformer["drop"](self.transformer["wte"](idx) + self.transformer["wpe"](pos))
        for block in self.transformer["h"]:  # type: ignore[attr-defined]
            x = block(x)
        logits = self.lm_head(self.transformer["ln_f"](x))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        return logits, loss


class Head(nn.Module):
    """One head of causal attention with projections of its own."""

    tril: Tensor

    def __init__(self, dim: int, head_size: int, block_size: int) -> None:
        super().__init__()
        self.key = nn.Linear(dim, head_size, bias=False)
        self.query = nn.Linear(dim, head_size, bias=False)
        self.value = nn.Linear(dim, head_size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)))

    def forward(self, x: Tensor) -> Tensor:
        _, T, _ = x.shape
        k, q = self.key(x), self.query(x)
        weights = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        weights = weights.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return F.softmax(weights, dim=-1) @ self.value(x)


class HeadListGPT(nn.Module):
    """A language model whose heads are a list of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding_table = nn.Embedding(VOCAB, DIM)
        self.position_embedding_table = nn.Embedding(16, DIM)
        self.heads = nn.ModuleList([Head(DIM, DIM // HEADS, 16) for _ in range(HEADS)])
        self.proj = nn.Linear(DIM, DIM)
        self.ffwd = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.ReLU(), nn.Linear(4 * DIM, DIM))
        self.ln1, self.ln2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.lm_head = nn.Linear(DIM, VOCAB)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.token_embedding_table(idx) + self.position_embedding_table(torch.arange(idx.shape[1]))
        normed = self.ln1(x)
        x = x + self.proj(torch.cat([h(normed) for h in self.heads], dim=-1))
        x = x + self.ffwd(self.ln2(x))
        return self.lm_head(x)


@dataclass(frozen=True)
class LlamaConfig:
    """What tells the rotary decoders apart."""

    kv_heads: int = 2
    expand: bool = False
    complex_rotary: bool = False
    qk_norm: bool = False
    parallel: bool = False
    grouped_sdpa: bool = False


class RMSNorm(nn.Module):
    """Norm by the root of the mean square."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return x32.type_as(x) * self.weight


def rotate_half(x: Tensor) -> Tensor:
    """Return the second half, negated, before the first."""
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def rotary_complex(x: Tensor, angles: Tensor) -> Tensor:
    """Return the neighbours rotated as complex numbers."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(3).type_as(x)


class LlamaAttention(nn.Module):
    """Rotary attention in which several query heads share a key head."""

    def __init__(self, dim: int, heads: int, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.depth = heads, config.kv_heads, dim // heads
        self.config = config
        self.wq = nn.Linear(dim, heads * self.depth, bias=False)
        self.wk = nn.Linear(dim, config.kv_heads * self.depth, bias=False)
        self.wv = nn.Linear(dim, config.kv_heads * self.depth, bias=False)
        self.wo = nn.Linear(heads * self.depth, dim, bias=False)
        self.q_norm = RMSNorm(self.depth) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.depth) if config.qk_norm else nn.Identity()

    def _rotate(self, x: Tensor, angles: Tensor) -> Tensor:
        if self.config.complex_rotary:
            return rotary_complex(x, angles)
        doubled = torch.cat((angles, angles), dim=-1)
        return x * doubled.cos() + rotate_half(x) * doubled.sin()

    def _repeat(self, x: Tensor) -> Tensor:
        groups = self.heads // self.kv_heads
        if not self.config.expand:
            return torch.repeat_interleave(x, groups, dim=1)
        B, H, T, D = x.shape
        return x[:, :, None, :, :].expand(B, H, groups, T, D).reshape(B, H * groups, T, D)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        B, T, _ = x.shape
        q = self.q_norm(self.wq(x).view(B, T, self.heads, self.depth)).transpose(1, 2)
        k = self.k_norm(self.wk(x).view(B, T, self.kv_heads, self.depth)).transpose(1, 2)
        v = self.wv(x).view(B, T, self.kv_heads, self.depth).transpose(1, 2)
        q, k = self._rotate(q, angles), self._rotate(k, angles)
        if self.config.grouped_sdpa:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            k, v = self._repeat(k), self._repeat(v)
            mask = torch.full((T, T), float("-inf"), device=x.device).triu(diagonal=1)
            scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.depth) + mask
            out = torch.matmul(F.softmax(scores.float(), dim=-1).type_as(q), v)
        return self.wo(out.transpose(1, 2).reshape(B, T, -1))


class LlamaBlock(nn.Module):
    """Rotary attention and a gated perceptron, one after the other or side by side."""

    def __init__(self, dim: int, heads: int, config: LlamaConfig) -> None:
        super().__init__()
        self.parallel = config.parallel
        self.attention_norm = RMSNorm(dim)
        self.attention = LlamaAttention(dim, heads, config)
        self.ffn_norm = nn.Identity() if config.parallel else RMSNorm(dim)
        self.w1 = nn.Linear(dim, 48, bias=False)
        self.w2 = nn.Linear(48, dim, bias=False)
        self.w3 = nn.Linear(dim, 48, bias=False)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        if self.parallel:
            return x + self.attention(normed, angles) + self._feed_forward(normed)
        x = x + self.attention(normed, angles)
        return x + self._feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """A rotary decoder."""

    inv_freq: Tensor

    def __init__(self, config: LlamaConfig, heads: int = 8, dim: int = 64) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, dim)
        self.layers = nn.ModuleList([LlamaBlock(dim, heads, config) for _ in range(2)])
        self.norm = RMSNorm(dim)
        self.output = nn.Linear(dim, VOCAB, bias=False)
        depth = dim // heads
        inv_freq = 1.0 / (10000.0 ** (torch.arange(0, depth, 2).float() / depth))
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok_embeddings(ids)
        angles = torch.outer(torch.arange(ids.shape[1], device=ids.device).float(), self.inv_freq)
        for layer in self.layers:
            x = layer(x, angles)
        return self.output(self.norm(x))


# ---------------------------------------------------------------------------------------------------------
# Ways to write attention, each in the same encoder


class SeparateAttention(nn.Module):
    """Base of the attentions below: separate projections."""

    def __init__(self, dim: int = DIM, heads: int = HEADS, kv_dim: int | None = None) -> None:
        super().__init__()
        self.h, self.d_k = heads, dim // heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, kv_dim or dim)
        self.value = nn.Linear(dim, kv_dim or dim)
        self.out = nn.Linear(dim, dim)


class SingleQueryHead(SeparateAttention):
    """Attention with a single head."""

    def __init__(self) -> None:
        super().__init__(heads=1)

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.bmm(self.query(x), self.key(x).transpose(1, 2)) / math.sqrt(x.shape[-1])
        return self.out(torch.bmm(torch.softmax(scores, dim=-1), self.value(x)))


class MultiQuery(SeparateAttention):
    """Attention with one key head for all query heads."""

    def __init__(self) -> None:
        super().__init__(kv_dim=DIM // HEADS)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q = self.query(x).view(B, T, self.h, self.d_k).transpose(1, 2)
        k, v = self.key(x).unsqueeze(1), self.value(x).unsqueeze(1)
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(self.d_k)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C))


class FusedMultiQuery(nn.Module):
    """Attention whose fused projection is split into query heads, one key head and one value head."""

    def __init__(self) -> None:
        super().__init__()
        self.d_k = DIM // HEADS
        self.c_attn = nn.Linear(DIM, DIM + 2 * self.d_k)
        self.c_proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.c_attn(x).split((DIM, self.d_k, self.d_k), dim=-1)
        q = q.reshape(B, T * HEADS, self.d_k)
        weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)) * self.d_k**-0.5, dim=-1)
        return self.c_proj(torch.bmm(weights, v).view(B, T, DIM))


class EinsumAttention(SeparateAttention):
    """Attention by einsum."""

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q = self.query(x).reshape(B, T, self.h, self.d_k)
        k = self.key(x).reshape(B, T, self.h, self.d_k)
        v = self.value(x).reshape(B, T, self.h, self.d_k)
        energy = torch.einsum("nqhd,nkhd->nhqk", [q, k])
        attention = torch.softmax(energy / (C ** (1 / 2)), dim=3)
        return self.out(torch.einsum("nhql,nlhd->nqhd", [attention, v]).reshape(B, T, C))


class EinsumWeights(nn.Module):
    """Attention whose weights have a dimension for the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.w_q = nn.Parameter(torch.randn(DIM, HEADS, DIM // HEADS) * 0.2)
        self.w_k = nn.Parameter(torch.randn(DIM, HEADS, DIM // HEADS) * 0.2)
        self.w_v = nn.Parameter(torch.randn(DIM, HEADS, DIM // HEADS) * 0.2)
        self.w_o = nn.Parameter(torch.randn(HEADS, DIM // HEADS, DIM) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        q = torch.einsum("btc,chd->bhtd", x, self.w_q)
        k = torch.einsum("btc,chd->bhtd", x, self.w_k)
        v = torch.einsum("btc,chd->bhtd", x, self.w_v)
        weights = torch.einsum("bhqd,bhkd->bhqk", q, k).mul(self.w_q.shape[-1] ** -0.5).softmax(-1)
        return torch.einsum("bhqd,hdc->bqc", weights @ v, self.w_o)


class MergedAttention(SeparateAttention):
    """Attention by bmm over batch and heads merged."""

    def _shape(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        return x.view(B, T, self.h, self.d_k).transpose(1, 2).reshape(B * self.h, T, self.d_k)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            self._shape(self.query(x) * self.d_k**-0.5),
            self._shape(self.key(x)),
            self._shape(self.value(x)),
        )
        weights = F.softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1)
        out = torch.bmm(weights, v).view(B, self.h, T, self.d_k).transpose(1, 2)
        return self.out(out.reshape(B, T, C))


class BaddbmmAttention(SeparateAttention):
    """Attention in time-first layout, by baddbmm with a position bias for each head."""

    slopes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, HEADS + 1).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        x = x.transpose(0, 1)
        q = self.query(x).contiguous().view(T, B * self.h, self.d_k).transpose(0, 1)
        k = self.key(x).contiguous().view(T, B * self.h, self.d_k).transpose(0, 1)
        v = self.value(x).contiguous().view(T, B * self.h, self.d_k).transpose(0, 1)
        distance = -(torch.arange(T)[None, :] - torch.arange(T)[:, None]).abs()
        bias = (self.slopes.view(-1, 1, 1) * distance).repeat(B, 1, 1)
        weights = torch.baddbmm(bias, q, k.transpose(1, 2), beta=1.0, alpha=self.d_k**-0.5).softmax(-1)
        out = torch.bmm(weights, v).transpose(0, 1).contiguous().view(T, B, C)
        return self.out(out).transpose(0, 1)


class InterleavedAttention(nn.Module):
    """Attention whose fused projection holds query, key and value of one head beside each other."""

    def __init__(self) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(DIM, 3 * DIM)
        self.dense = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.query_key_value(x).view(B, T, HEADS, 3 * C // HEADS)
        q, k, v = (t.permute(0, 2, 1, 3) for t in torch.split(qkv, C // HEADS, dim=-1))
        return self.dense(F.scaled_dot_product_attention(q, k, v).permute(0, 2, 1, 3).flatten(2))


class LinearAttention(SeparateAttention):
    """Attention without softmax over positions, of linear cost."""

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q = F.elu(self.query(x).view(B, T, self.h, self.d_k)) + 1
        k = F.elu(self.key(x).view(B, T, self.h, self.d_k)) + 1
        v = self.value(x).view(B, T, self.h, self.d_k)
        kv = torch.einsum("bthd,bthe->bhde", k, v)
        normalizer = 1 / (torch.einsum("bthd,bhd->bth", q, k.sum(dim=1)) + 1e-6)
        return self.out(torch.einsum("bthd,bhde,bth->bthe", q, kv, normalizer).reshape(B, T, C))


class TalkingHeads(SeparateAttention):
    """Attention whose scores are mixed over the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.mix_before = nn.Linear(HEADS, HEADS, bias=False)
        self.mix_after = nn.Linear(HEADS, HEADS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q = self.query(x).view(B, T, self.h, self.d_k).transpose(1, 2)
        k = self.key(x).view(B, T, self.h, self.d_k).transpose(1, 2)
        v = self.value(x).view(B, T, self.h, self.d_k).transpose(1, 2)
        scores = self.mix_before((q @ k.transpose(-2, -1) * self.d_k**-0.5).permute(0, 2, 3, 1))
        weights = self.mix_after(scores.softmax(dim=2)).permute(0, 3, 1, 2)
        return self.out((weights @ v).transpose(1, 2).reshape(B, T, C))


class FourierMixing(nn.Module):
    """Mixing of positions and channels by the Fourier transform."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real


class AttentionEncoder(nn.Module):
    """A post-norm encoder for classification around one kind of attention."""

    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM, padding_idx=0)
        self.attention = attention()
        self.norm1 = nn.LayerNorm(DIM)
        self.fc1 = nn.Linear(DIM, 64)
        self.fc2 = nn.Linear(64, DIM)
        self.norm2 = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) * math.sqrt(DIM)
        x = self.norm1(x + self.attention(x))
        x = self.norm2(x + self.fc2(F.relu(self.fc1(x))))
        return self.head(x.mean(dim=1))


# ---------------------------------------------------------------------------------------------------------
# Attention to another sequence


class MultiHeadAttention(nn.Module):
    """Attention of one sequence to another, with a mask."""

    def __init__(self, dim: int = DIM, heads: int = HEADS) -> None:
        super().__init__()
        self.h, self.d_k = heads, dim // heads
        self.linears = nn.ModuleList([nn.Linear(dim, dim) for _ in range(4)])
        self.dropout = nn.Dropout(p=0.1)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        batches = query.size(0)
        query, key, value = (
            lin(x).view(batches, -1, self.h, self.d_k).transpose(1, 2)
            for lin, x in zip(self.linears, (query, key, value), strict=False)
        )
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(self.d_k)
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        x = torch.matmul(self.dropout(scores.softmax(dim=-1)), value)
        x = x.transpose(1, 2).contiguous().view(batches, -1, self.h * self.d_k)
        return self.linears[-1](x)


def sinusoids(length: int, dim: int) -> Tensor:
    """Return the table of sines and cosines of positions."""
    position = torch.arange(length).unsqueeze(1)
    frequency = torch.exp(torch.arange(0, dim, 2) * -(math.log(10000.0) / dim))
    table = torch.zeros(length, dim)
    table[:, 0::2] = torch.sin(position * frequency)
    table[:, 1::2] = torch.cos(position * frequency)
    return table


class EncoderDecoder(nn.Module):
    """The original transformer: an encoder, and a decoder that attends to it."""

    positions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.src_embed = nn.Embedding(VOCAB, DIM)
        self.tgt_embed = nn.Embedding(VOCAB, DIM)
        self.register_buffer("positions", sinusoids(16, DIM))
        self.enc_attn = MultiHeadAttention()
        self.enc_ff = FeedForward(DIM, 64, 0.1)
        self.dec_attn = MultiHeadAttention()
        self.cross_attn = MultiHeadAttention()
        self.dec_ff = FeedForward(DIM, 64, 0.1)
        self.norms = nn.ModuleList([nn.LayerNorm(DIM) for _ in range(7)])
        self.generator = nn.Linear(DIM, VOCAB)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        src_mask = (src != 0).unsqueeze(1).unsqueeze(2)
        size = tgt.shape[-1]
        tgt_mask = (tgt != 0).unsqueeze(1).unsqueeze(2) & torch.tril(torch.ones(1, size, size)).bool()
        m = self.src_embed(src) * math.sqrt(DIM) + self.positions[: src.shape[1]]
        n = self.norms[0](m)
        m = m + self.enc_attn(n, n, n, src_mask)
        m = self.norms[2](m + self.enc_ff(self.norms[1](m)))
        y = self.tgt_embed(tgt) * math.sqrt(DIM) + self.positions[:size].requires_grad_(False)
        n = self.norms[3](y)
        y = y + self.dec_attn(n, n, n, tgt_mask)
        y = y + self.cross_attn(self.norms[4](y), m, m, src_mask)
        y = y + self.dec_ff(self.norms[5](y))
        return F.log_softmax(self.generator(self.norms[6](y)), dim=-1)


class DETR(nn.Module):
    """Learned queries that attend to an image, with classes and boxes from each."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 16, kernel_size=8, stride=8)
        self.input_proj = nn.Conv2d(16, DIM, 1)
        self.queries = nn.Embedding(6, DIM)
        self.row_embed = nn.Parameter(torch.rand(4, DIM // 2))
        self.col_embed = nn.Parameter(torch.rand(4, DIM // 2))
        self.cross = nn.MultiheadAttention(DIM, HEADS)
        self.norm = nn.LayerNorm(DIM)
        self.linear_class = nn.Linear(DIM, CLASSES)
        self.linear_bbox = nn.Linear(DIM, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.input_proj(F.relu(self.backbone(x)))
        H, W = h.shape[-2:]
        columns = self.col_embed[:W].unsqueeze(0).repeat(H, 1, 1)
        rows = self.row_embed[:H].unsqueeze(1).repeat(1, W, 1)
        positions = torch.cat([columns, rows], dim=-1).flatten(0, 1).unsqueeze(1)
        memory = positions + h.flatten(2).permute(2, 0, 1)
        queries = self.queries.weight.unsqueeze(1).repeat(1, x.shape[0], 1)
        hidden = self.norm(queries + self.cross(queries, memory, memory)[0]).transpose(0, 1)
        return {"pred_logits": self.linear_class(hidden), "pred_boxes": self.linear_bbox(hidden).sigmoid()}


# ---------------------------------------------------------------------------------------------------------
# The transformer modules of torch


class MultiheadEncoder(nn.Module):
    """An encoder of nn.MultiheadAttention."""

    def __init__(self, batch_first: bool, need_weights: bool, p: float = 0.0) -> None:
        super().__init__()
        self.batch_first, self.need_weights = batch_first, need_weights
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.attention = nn.MultiheadAttention(DIM, HEADS, dropout=p, batch_first=batch_first)
        self.norm = nn.LayerNorm(DIM)
        self.mlp = FeedForward(DIM, 64, p)
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        if not self.batch_first:
            x = x.transpose(0, 1)
        out, _ = self.attention(x, x, x, need_weights=self.need_weights)
        x = self.norm(x + out)
        x = x + self.mlp(x)
        return self.head(x.mean(dim=1 if self.batch_first else 0))


class TorchEncoder(nn.Module):
    """A stack of nn.TransformerEncoderLayer."""

    def __init__(self, norm_first: bool = False, causal: bool = False, p: float = 0.0) -> None:
        super().__init__()
        self.causal = causal
        self.embedding = nn.Embedding(VOCAB, DIM)
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 64, p, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        mask = None
        if self.causal:
            mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.encoder(self.embedding(ids), mask=mask, is_causal=self.causal)[:, -1])


class PositionalEncoding(nn.Module):
    """Sines and cosines of the position in a buffer, added to the first entries."""

    def __init__(self, width: int, length: int = 64) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)
        position = torch.arange(length).unsqueeze(1)
        rate = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
        table = torch.zeros(length, 1, width)
        table[:, 0, 0::2] = torch.sin(position * rate)
        table[:, 0, 1::2] = torch.cos(position * rate)
        self.register_buffer("pe", table)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x + self.pe[: x.size(0)])


class SinusoidalTransformer(nn.Module):
    """The language model of PyTorch's tutorial: positions in a buffer, sequence first."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.positions = PositionalEncoding(DIM)
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 64, 0.1)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.positions(self.embedding(ids.T) * math.sqrt(DIM))
        mask = nn.Transformer.generate_square_subsequent_mask(len(x))
        return self.head(self.encoder(x, mask)).transpose(0, 1)


class TorchTransformer(nn.Module):
    """The nn.Transformer of torch, with padding and causal masks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(DIM, HEADS, 64, 0.0, batch_first=True), 1, enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(DIM, HEADS, 64, 0.0, activation="gelu", batch_first=True), 1
        )
        self.generator = nn.Linear(DIM, VOCAB)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        padding = src == 0
        memory = self.encoder(self.embedding(src), src_key_padding_mask=padding)
        mask = torch.triu(torch.ones(tgt.shape[1], tgt.shape[1], dtype=torch.bool), diagonal=1)
        out = self.decoder(
            self.embedding(tgt), memory, tgt_mask=mask, memory_key_padding_mask=padding, tgt_is_causal=True
        )
        return self.generator(out)


# ---------------------------------------------------------------------------------------------------------
# Text and signals without attention


class TextCNN(nn.Module):
    """Convolutions of several widths over words, each with its maximum over time."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 24)
        self.convs = nn.ModuleList([nn.Conv1d(24, 16, width) for width in (2, 3, 4)])
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(48, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).permute(0, 2, 1)
        features = [F.relu(conv(x)) for conv in self.convs]
        pooled = [F.max_pool1d(f, f.size(2)).squeeze(2) for f in features]
        return self.fc(self.dropout(torch.cat(pooled, 1)))


class MeanText(nn.Module):
    """A text classifier on the mean of its word embeddings, without the padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 32, padding_idx=0)
        self.fc1 = nn.Linear(32, 48)
        self.fc2 = nn.Linear(48, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids != 0).unsqueeze(-1).float()
        x = (self.embedding(ids) * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return self.fc2(F.relu(self.fc1(x)))


class Recurrent(nn.Module):
    """A text classifier around a recurrent module."""

    def __init__(
        self, recurrent: Callable[..., nn.RNNBase], layers: int = 1, bidirectional: bool = False
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 24)
        self.rnn = recurrent(24, 32, num_layers=layers, bidirectional=bidirectional, batch_first=True)
        self.fc = nn.Linear(64 if bidirectional else 32, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        out, _ = self.rnn(self.embedding(ids))
        return self.fc(out[:, -1, :])


class LSTMFinalState(nn.Module):
    """A classifier on the last hidden states of both directions of an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 24)
        self.lstm = nn.LSTM(24, 16, bidirectional=True)
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(self.embedding(ids).transpose(0, 1))
        return self.fc(torch.cat((hidden[-2], hidden[-1]), dim=1))


class CellLoop(nn.Module):
    """A loop over the cells of an LSTM, written by hand, with the states as outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(16 + 24, 4 * 24)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = x.new_zeros(x.shape[0], 24)
        c = torch.zeros_like(h)
        for t in range(x.shape[1]):
            i, f, g, o = self.gates(torch.cat([x[:, t], h], dim=1)).chunk(4, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.head(h), h, c


class WaveNet(nn.Module):
    """Dilated causal convolutions with gates, residuals and skips."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv1d(4, 16, 1)
        self.filters = nn.ModuleList([nn.Conv1d(16, 16, 2, dilation=2**i) for i in range(3)])
        self.gates = nn.ModuleList([nn.Conv1d(16, 16, 2, dilation=2**i) for i in range(3)])
        self.residuals = nn.ModuleList([nn.Conv1d(16, 16, 1) for _ in range(3)])
        self.skips = nn.ModuleList([nn.Conv1d(16, 32, 1) for _ in range(3)])
        self.end = nn.Conv1d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        skip: Tensor | None = None
        for i in range(3):
            padded = F.pad(x, (2**i, 0))
            gated = torch.tanh(self.filters[i](padded)) * torch.sigmoid(self.gates[i](padded))
            s = self.skips[i](gated)
            skip = s if skip is None else skip + s
            x = x + self.residuals[i](gated)
        assert skip is not None
        return self.end(F.relu(skip))


class StateSpace(nn.Module):
    """A selective state space block: gates, depthwise convolution, and a scan over time."""

    def __init__(self, dim: int = 16, states: int = 4) -> None:
        super().__init__()
        inner = 2 * dim
        self.embedding = nn.Embedding(VOCAB, dim)
        self.norm = nn.LayerNorm(dim)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.x_proj = nn.Linear(inner, 4 + 2 * states, bias=False)
        self.dt_proj = nn.Linear(4, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1, states + 1).float().repeat(inner, 1)))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.head = nn.Linear(dim, VOCAB, bias=False)
        self.states = states

    def forward(self, ids: Tensor) -> Tensor:
        residual = self.embedding(ids)
        T = ids.shape[1]
        x, z = self.in_proj(self.norm(residual)).chunk(2, dim=-1)
        x = F.silu(self.conv1d(x.transpose(1, 2))[..., :T].transpose(1, 2))
        dt, B, C = torch.split(self.x_proj(x), [4, self.states, self.states], dim=-1)
        dt = F.softplus(self.dt_proj(dt))
        decay = torch.exp(dt.unsqueeze(-1) * -torch.exp(self.A_log))
        update = dt.unsqueeze(-1) * B.unsqueeze(2) * x.unsqueeze(-1)
        state = torch.zeros_like(update[:, 0])
        ys = []
        for t in range(T):
            state = decay[:, t] * state + update[:, t]
            ys.append((state * C[:, t].unsqueeze(1)).sum(-1))
        y = torch.stack(ys, dim=1) + x * self.D
        return self.head(residual + self.out_proj(y * F.silu(z)))


def pair() -> tuple[Tensor, Tensor]:
    """Return a source and a target sequence."""
    return integers(2, 10), integers(2, 7, seed=2)


def padded() -> tuple[Tensor]:
    """Return token ids of which the last ones of one row are padding."""
    ids = integers(2, 10)
    ids[1, 7:] = 0
    return (ids,)


def llama(**options: int | bool) -> Callable[[], nn.Module]:
    """Return the maker of a rotary decoder."""
    return lambda: Llama(LlamaConfig(**options))  # type: ignore[arg-type]


def encoder(attention: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return the maker of an encoder around this attention."""
    return partial(AttentionEncoder, attention)


TRANSFORMER = "transformer"
RECURRENT = "recurrent"
TEXT = "text"

ENTRIES: tuple[Entry, ...] = (
    entry("vit", ViT, images(), TRANSFORMER),
    entry("vit_sdpa_dropout", lambda: ViT(fused=True, p=0.1), images(), TRANSFORMER),
    entry("mlp_mixer", Mixer, images(), TRANSFORMER),
    entry("gmlp", GMLP, images(), TRANSFORMER),
    entry("swin", Swin, images(), TRANSFORMER),
    entry("gpt", GPT, tokens(), TRANSFORMER),
    entry("gpt_dropout", lambda: GPT(p=0.1), tokens(), TRANSFORMER),
    entry("gpt_masked", lambda: GPT(flash=False), tokens(), TRANSFORMER),
    entry("gpt_loss", GPT, lambda: {"idx": integers(2, 10), "targets": integers(2, 10, seed=2)}, TRANSFORMER),
    entry("gpt_head_list", HeadListGPT, tokens(), TRANSFORMER),
    entry("llama_repeat", llama(kv_heads=4), tokens(), TRANSFORMER),
    entry("llama_expand", llama(kv_heads=4, expand=True), tokens(), TRANSFORMER),
    entry("llama_two_kv_heads", llama(kv_heads=2), tokens(), TRANSFORMER, (2,)),
    entry("llama_complex_rotary", llama(kv_heads=4, complex_rotary=True), tokens(), TRANSFORMER),
    entry("llama_qk_norm", llama(kv_heads=4, qk_norm=True), tokens(), TRANSFORMER),
    entry("llama_parallel", llama(kv_heads=8, parallel=True), tokens(), TRANSFORMER),
    entry("llama_grouped_sdpa", llama(kv_heads=4, grouped_sdpa=True), tokens(), TRANSFORMER),
    entry("attention_single_head", encoder(SingleQueryHead), tokens(), TRANSFORMER),
    entry("attention_multi_query", encoder(MultiQuery), tokens(), TRANSFORMER),
    entry("attention_fused_multi_query", encoder(FusedMultiQuery), tokens(), TRANSFORMER),
    entry("attention_einsum", encoder(EinsumAttention), tokens(), TRANSFORMER),
    entry("attention_einsum_weights", encoder(EinsumWeights), tokens(), TRANSFORMER),
    entry("attention_merged_bmm", encoder(MergedAttention), tokens(), TRANSFORMER),
    entry("attention_baddbmm_alibi", encoder(BaddbmmAttention), tokens(), TRANSFORMER),
    entry("attention_interleaved", encoder(InterleavedAttention), tokens(), TRANSFORMER),
    entry("attention_linear", encoder(LinearAttention), tokens(), TRANSFORMER),
    entry("attention_talking_heads", encoder(TalkingHeads), tokens(), TRANSFORMER),
    entry("fourier_mixing", encoder(FourierMixing), tokens(), TRANSFORMER),
    entry("encoder_decoder", EncoderDecoder, pair, TRANSFORMER),
    entry("detr", DETR, images(), TRANSFORMER),
    entry("torch_mha", lambda: MultiheadEncoder(True, False), tokens(), TRANSFORMER),
    entry("torch_mha_weights", lambda: MultiheadEncoder(False, True, 0.1), tokens(), TRANSFORMER),
    entry("torch_encoder", TorchEncoder, tokens(), TRANSFORMER),
    entry("torch_encoder_dropout", lambda: TorchEncoder(norm_first=True, p=0.1), tokens(), TRANSFORMER),
    entry("torch_encoder_causal", lambda: TorchEncoder(causal=True), tokens(), TRANSFORMER),
    entry("torch_transformer", TorchTransformer, pair, TRANSFORMER),
    entry("transformer_sinusoidal", SinusoidalTransformer, tokens(), TRANSFORMER),
    entry("text_cnn", TextCNN, tokens(), TEXT),
    entry("text_mean", MeanText, padded, TEXT),
    entry("wavenet", WaveNet, dense(2, 4, 12), TEXT),
    entry("lstm", lambda: Recurrent(nn.LSTM), tokens(), RECURRENT),
    entry("lstm_stacked", lambda: Recurrent(nn.LSTM, layers=2), tokens(), RECURRENT),
    entry("lstm_bidirectional", LSTMFinalState, tokens(), RECURRENT),
    entry("gru", lambda: Recurrent(nn.GRU), tokens(), RECURRENT),
    entry("gru_bidirectional", lambda: Recurrent(nn.GRU, bidirectional=True), tokens(), RECURRENT),
    entry("rnn", lambda: Recurrent(nn.RNN), tokens(), RECURRENT),
    entry("lstm_loop", CellLoop, dense(2, 6, 16), RECURRENT),
    entry("state_space", StateSpace, tokens(8), RECURRENT),
)
