"""The network, in plain PyTorch: Llama, with biases on q, k and v if asked for, and gates on its heads.

Parameter names are those of transformers, so that the state dict is the checkpoint.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the network; `heads` is a multiple of `kv_heads`."""

    vocab: int
    layers: int = 4
    hidden: int = 128
    heads: int = 8
    kv_heads: int = 4
    head_size: int = 32
    intermediate: int = 256
    qkv_bias: bool = False
    rope_theta: float = 1e6
    max_positions: int = 8192
    norm_eps: float = 1e-5


def visible(length: int, sink_size: int, recent_size: int) -> Tensor:
    """[T, T] bool: what a streaming head sees (row: query, column: key)."""
    query, key = torch.arange(length)[:, None], torch.arange(length)[None, :]
    return (key <= query) & ((key < sink_size) | (key > query - recent_size))


class RMSNorm(nn.Module):
    """Root-mean-square norm."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Attention with RoPE; the gates choose between full and streaming heads."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        query, kv = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
        self.q_proj = nn.Linear(shape.hidden, query, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(shape.hidden, kv, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(shape.hidden, kv, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(query, shape.hidden, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], gates: Tensor | None, streaming: Tensor | None
    ) -> Tensor:
        """Attend; see `Needle.forward` for `gates` ([Hkv] here) and `streaming`."""
        batch, length, _ = x.shape
        size, group = self.shape.head_size, self.shape.heads // self.shape.kv_heads
        q, k, v = (
            layer(x).view(batch, length, -1, size).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, heads, T, D]
        q, k = _rotate(q, *rope), _rotate(k, *rope)
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        if gates is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif not gates.requires_grad:  # hard classes: each head once
            full = gates.repeat_interleave(group) >= 0.5
            out = torch.empty_like(q)
            out[:, full] = F.scaled_dot_product_attention(
                q[:, full], k[:, full], v[:, full], is_causal=True
            )
            out[:, ~full] = F.scaled_dot_product_attention(
                q[:, ~full], k[:, ~full], v[:, ~full], attn_mask=streaming
            )
        else:
            alpha = gates.repeat_interleave(group)[:, None, None]
            full = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            near = F.scaled_dot_product_attention(q, k, v, attn_mask=streaming)
            out = alpha * full + (1 - alpha) * near
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and MLP, each after its norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(shape), MLP(shape)
        self.input_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.norm_eps)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], gates: Tensor | None, streaming: Tensor | None
    ) -> Tensor:
        """See `Needle.forward`."""
        x = x + self.self_attn(self.input_layernorm(x), rope, gates, streaming)
        return x + self.mlp(self.post_attention_layernorm(x))


class Needle(nn.Module):
    """Decoder without its output matrix: that is the embedding (`logits`)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden, shape.norm_eps)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.08)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        inverse = shape.rope_theta ** -(torch.arange(0, shape.head_size, 2) / shape.head_size)
        angles = torch.arange(shape.max_positions)[:, None] * inverse.repeat(2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        gates: Tensor | None = None,
        streaming: Tensor | None = None,
    ) -> Tensor:
        """Last hidden states, after the final norm.

        Args:
            ids: [B, T] int64.
            positions: [B, T] int64; None counts from 0.
            gates: [layers, Hkv] float; a head's output is gate * full + (1 - gate) * streaming.
                None leaves all heads full; gates without gradient must be 0 or 1.
            streaming: [T, T] bool, see `visible`; needed with `gates`.

        Returns:
            [B, T, hidden] float32.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1])[None]
        rope = (self.cos[positions][:, None], self.sin[positions][:, None])  # [B, 1, T, D]
        x = self.embed_tokens(ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, rope, None if gates is None else gates[index], streaming)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token, [..., vocab], from hidden states."""
        return F.linear(hidden, self.embed_tokens.weight)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin
