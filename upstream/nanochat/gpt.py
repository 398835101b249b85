"""
The transformer: rotary positions, QK norm, sliding windows, relu² MLP, value embeddings, per-layer mixing with the first
residual state, smear (each embedding takes in a little of the one before), backout, untied embeddings, soft-capped logits.

B rows, T positions, V vocabulary, Vp vocabulary padded to a multiple of 64, n width, L layers, H query heads,
Hkv key/value heads, D = n / H head dim. Parameters are float32 masters (embedding tables: COMPUTE_DTYPE), activations COMPUTE_DTYPE.
"""
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.common import COMPUTE_DTYPE, print0
from nanochat.flash_attention import flash_attn
from nanochat.optim import MuonAdamW

VE_GATE_CHANNELS = 12  # channels of the residual stream that a value embedding's gate reads
SMEAR_CHANNELS = 24  # the same for the smear gate; the width must be at least this
QK_SCALE = 1.2  # sharpens attention after the QK norm
SOFTCAP = 15.0


@dataclass
class GPTConfig:
    sequence_len: int = 2048  # training context; sizes the windows and the rotary tables
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6  # query heads
    n_kv_head: int = 6  # key/value heads; must divide n_head
    n_embd: int = 768
    window_pattern: str = "SSSL"  # one letter per layer, repeated: S a quarter of the context, L all of it; the last layer is always L


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMS norm over the last dim, without a gain."""
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """Casts its weight to the dtype of the input (there is no autocast). A bias is never added."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def has_ve(layer_idx: int, n_layer: int) -> bool:
    """Every other layer has a value embedding, the last one always."""
    return layer_idx % 2 == (n_layer - 1) % 2


def apply_rotary_emb(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B,T,heads,D); cos and sin (1,T,1,D/2). Pairs are channel j and j + D/2, turned by minus the angle."""
    assert x.ndim == 4, f"expected (B, T, heads, D), got shape {tuple(x.shape)}"
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer_idx: int):
        super().__init__()
        assert config.n_embd % config.n_head == 0, f"n_embd {config.n_embd} must be a multiple of n_head {config.n_head}"
        assert config.n_kv_head <= config.n_head and config.n_head % config.n_kv_head == 0, (
            f"n_kv_head {config.n_kv_head} must divide n_head {config.n_head}")
        self.layer_idx = layer_idx
        self.n_head, self.n_kv_head, self.n_embd = config.n_head, config.n_kv_head, config.n_embd
        self.head_dim = self.n_embd // self.n_head
        self.c_q = Linear(self.n_embd, self.n_head * self.head_dim, bias=False)
        self.c_k = Linear(self.n_embd, self.n_kv_head * self.head_dim, bias=False)
        self.c_v = Linear(self.n_embd, self.n_kv_head * self.head_dim, bias=False)
        self.c_proj = Linear(self.n_embd, self.n_embd, bias=False)
        self.ve_gate_channels = VE_GATE_CHANNELS
        self.ve_gate = Linear(self.ve_gate_channels, self.n_kv_head, bias=False) if has_ve(layer_idx, config.n_layer) else None

    def forward(self, x, ve, cos_sin, window_size, kv_cache):
        """x (B,T,n), normalised; ve (B,T,Hkv*D) or None -> (B,T,n)."""
        B, T, _ = x.shape
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)
        if ve is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :self.ve_gate_channels]))  # (B, T, Hkv)
            v = v + gate.unsqueeze(-1) * ve.view(B, T, self.n_kv_head, self.head_dim)
        cos, sin = cos_sin
        q = norm(apply_rotary_emb(q, cos, sin)) * QK_SCALE
        k = norm(apply_rotary_emb(k, cos, sin)) * QK_SCALE
        if kv_cache is None:
            y = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=window_size)
        else:
            k_cache, v_cache = kv_cache.get_layer_cache(self.layer_idx)
            y = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k=k, v=v, cache_seqlens=kv_cache.cache_seqlens,
                                                   causal=True, window_size=window_size)
            if self.layer_idx == kv_cache.n_layers - 1:
                kv_cache.advance(T)
        return self.c_proj(y.contiguous().view(B, T, self.n_embd))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer_idx: int):
        super().__init__()
        self.attn = CausalSelfAttention(config, layer_idx)
        self.mlp = MLP(config)

    def forward(self, x, ve, cos_sin, window_size, kv_cache):
        x = x + self.attn(norm(x), ve, cos_sin, window_size, kv_cache)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """Built on the meta device (shapes and dtypes only): then `to_empty(device=...)` and `init_weights()` or a checkpoint."""

    def __init__(self, config: GPTConfig, pad_vocab_size_to: int = 64):
        super().__init__()
        self.config = config
        self.window_sizes = self._compute_window_sizes(config)
        padded = math.ceil(config.vocab_size / pad_vocab_size_to) * pad_vocab_size_to
        if padded != config.vocab_size:
            print0(f"Padding vocab_size from {config.vocab_size} to {padded}")
        kv_dim = config.n_kv_head * (config.n_embd // config.n_head)
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(padded, config.n_embd),
            "h": nn.ModuleList([Block(config, i) for i in range(config.n_layer)]),
        })
        self.lm_head = Linear(config.n_embd, padded, bias=False)
        self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        self.smear_gate = Linear(SMEAR_CHANNELS, 1, bias=False)
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.backout_lambda = nn.Parameter(torch.zeros(1))
        self.value_embeds = nn.ModuleDict({
            str(i): nn.Embedding(padded, kv_dim) for i in range(config.n_layer) if has_ve(i, config.n_layer)})
        self.rotary_seq_len = 10 * config.sequence_len  # room for generating beyond the training context
        cos, sin = self._precompute_rotary_embeddings(self.rotary_seq_len, config.n_embd // config.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fills every parameter and the rotary tables. The order of the draws from torch's global generator is part of the contract."""
        n_layer, bound = self.config.n_layer, 3 ** 0.5 * self.config.n_embd ** -0.5  # U(-bound, bound) has std 1/sqrt(n)
        nn.init.normal_(self.transformer.wte.weight, mean=0.0, std=0.8)
        nn.init.normal_(self.lm_head.weight, mean=0.0, std=0.001)
        for block in self.transformer.h:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                nn.init.uniform_(linear.weight, -bound, bound)
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.uniform_(block.mlp.c_fc.weight, -0.4 * bound, 0.4 * bound)
            nn.init.zeros_(block.mlp.c_proj.weight)
        for i in range(n_layer):
            self.resid_lambdas[i] = 1.15 - 0.10 * i / max(n_layer - 1, 1)
            self.x0_lambdas[i] = 0.20 - 0.15 * i / max(n_layer - 1, 1)
        self.smear_lambda.fill_(0.0)
        self.backout_lambda.fill_(0.2)
        nn.init.uniform_(self.smear_gate.weight, 0.0, 0.02)
        for ve in self.value_embeds.values():
            nn.init.uniform_(ve.weight, -bound, bound)
        for block in self.transformer.h:
            if block.attn.ve_gate is not None:
                nn.init.uniform_(block.attn.ve_gate.weight, 0.0, 0.02)
        head_dim = self.config.n_embd // self.config.n_head
        self.cos, self.sin = self._precompute_rotary_embeddings(self.rotary_seq_len, head_dim, device=self.get_device())
        if COMPUTE_DTYPE != torch.float16:  # float16 needs a gradient scaler, and that needs float32 gradients
            self.transformer.wte.to(dtype=COMPUTE_DTYPE)
            self.value_embeds.to(dtype=COMPUTE_DTYPE)

    def _precompute_rotary_embeddings(self, seq_len: int, head_dim: int, base: float = 100000,
                                      device: torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each (1, seq_len, 1, head_dim / 2) in COMPUTE_DTYPE."""
        device = device or self.get_device()
        channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
        positions = torch.arange(seq_len, dtype=torch.float32, device=device)
        angles = torch.outer(positions, 1.0 / base ** (channels / head_dim))[None, :, None, :]
        return angles.cos().to(COMPUTE_DTYPE), angles.sin().to(COMPUTE_DTYPE)

    def _compute_window_sizes(self, config: GPTConfig) -> list[tuple[int, int]]:
        """(left, right) per layer: how many positions before its own a query sees."""
        pattern = config.window_pattern.upper()
        assert pattern and set(pattern) <= set("SL"), f"window_pattern is made of S and L, got {config.window_pattern!r}"
        sizes = {"L": config.sequence_len, "S": 128 * math.ceil(math.ceil(config.sequence_len / 4) / 128)}  # S: whole FA3 tiles
        letters = [pattern[i % len(pattern)] for i in range(config.n_layer - 1)] + ["L"]
        return [(sizes[letter], 0) for letter in letters]

    def get_device(self) -> torch.device:
        return self.transformer.wte.weight.device

    def _smear(self, x: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        """
        Adds to each embedding of x (B,T,n) a gated part of the one before it; `before` (B,1,n) precedes the first one, None:
        nothing does. (Upstream leaves the first position alone whenever T > 1, so its chunked prefill differs from one forward; and
        it refuses a single token without a cache.)
        """
        into, source = (x[:, 1:], x[:, :-1]) if before is None else (x, torch.cat([before, x[:, :-1]], dim=1))
        gate = self.smear_lambda.to(x.dtype) * torch.sigmoid(self.smear_gate(into[..., :SMEAR_CHANNELS]))
        smeared = into + gate * source
        return smeared if before is not None else torch.cat([x[:, :1], smeared], dim=1)

    def forward(self, idx, targets=None, kv_cache=None, loss_reduction="mean"):
        """
        idx (B,T) -> logits (B,T,V) float32; with targets (B,T), -1 = ignored, the cross entropy: a scalar, or (B*T,) for "none".
        With a KV cache idx continues what the cache holds.
        """
        T, T0 = idx.size(1), 0 if kv_cache is None else kv_cache.get_pos()
        assert T0 + T <= self.cos.size(1), f"{T0 + T} positions, but the rotary tables end at {self.cos.size(1)}"
        assert idx.device == self.cos.device, f"tokens are on {idx.device}, the rotary tables on {self.cos.device}"
        assert self.cos.dtype == COMPUTE_DTYPE, f"rotary tables must be {COMPUTE_DTYPE}, are {self.cos.dtype}"
        cos_sin = self.cos[:, T0:T0 + T], self.sin[:, T0:T0 + T]

        x = norm(self.transformer.wte(idx).to(COMPUTE_DTYPE))
        before = kv_cache.prev_embedding if kv_cache is not None else None
        if kv_cache is not None:
            kv_cache.prev_embedding = x[:, -1:, :]
        x = self._smear(x, before)
        x0 = x
        for i, block in enumerate(self.transformer.h):
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            ve = self.value_embeds[str(i)](idx).to(x.dtype) if str(i) in self.value_embeds else None
            x = block(x, ve, cos_sin, self.window_sizes[i], kv_cache)
            if i == self.config.n_layer // 2:
                middle = x
        x = norm(x - self.backout_lambda.to(x.dtype) * middle)

        logits = self.lm_head(x)[..., :self.config.vocab_size].float()
        logits = SOFTCAP * torch.tanh(logits / SOFTCAP)
        if targets is None:
            return logits
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1, reduction=loss_reduction)

    def num_matmul_params(self) -> int:
        """Weights of all linears. (Upstream counts its own class only, so fp8 linears, which are not of that class, go missing there.)"""
        return sum(m.weight.numel() for m in self.modules() if isinstance(m, (Linear, nn.Linear)))

    def _windows(self, limit: int) -> list[int]:
        """Keys that a query sees in each layer, at most `limit`."""
        return [min(left if left >= 0 else self.config.sequence_len, limit) for left, _ in self.window_sizes]

    def estimate_flops(self) -> int:
        """Training FLOPs per token, forward and backward: 6 per matmul weight, 12 n per key in the window of each layer."""
        return 6 * self.num_matmul_params() + sum(12 * self.config.n_embd * w for w in self._windows(self.config.sequence_len))

    def estimate_decode_flops(self, context_len: int) -> int:
        """FLOPs of one more token after `context_len` tokens."""
        return 2 * self.num_matmul_params() + sum(4 * self.config.n_embd * w for w in self._windows(context_len))

    def estimate_prefill_flops(self, num_tokens: int) -> int:
        """FLOPs of a prompt of `num_tokens`: the window of a query grows to w and stays there."""
        attention = sum(4 * self.config.n_embd * (w * (w + 1) // 2 + (num_tokens - w) * w) for w in self._windows(num_tokens))
        return 2 * self.num_matmul_params() * num_tokens + attention

    def kv_bytes_per_token(self) -> int:
        return self.config.n_layer * self._kv_bytes()

    def kv_read_bytes(self, context_len: int) -> int:
        """Bytes of the cache that decoding one token after `context_len` reads."""
        return sum(self._kv_bytes() * w for w in self._windows(context_len))

    def _kv_bytes(self) -> int:
        return 2 * self.config.n_kv_head * (self.config.n_embd // self.config.n_head) * COMPUTE_DTYPE.itemsize

    def num_scaling_params(self) -> dict[str, int]:
        """Parameters by role; scaling laws use transformer_matrices + lm_head."""
        def count(*parts: nn.Module | nn.Parameter) -> int:
            return sum(p.numel() for part in parts for p in ([part] if isinstance(part, nn.Parameter) else part.parameters()))

        counts = {
            "wte": count(self.transformer.wte), "value_embeds": count(self.value_embeds), "lm_head": count(self.lm_head),
            "transformer_matrices": count(self.transformer.h),
            "scalars": count(self.resid_lambdas, self.x0_lambdas, self.smear_gate, self.smear_lambda, self.backout_lambda),
        }
        total = count(self)
        assert sum(counts.values()) == total, f"parameters by role add up to {sum(counts.values()):,}, the model has {total:,}"
        return {**counts, "total": total}

    def setup_optimizer(self, unembedding_lr: float = 0.004, embedding_lr: float = 0.2, matrix_lr: float = 0.02,
                        weight_decay: float = 0.0, scalar_lr: float = 0.5):
        """Muon for the matrices in the blocks, one group per shape; AdamW for the rest. Learning rates are tuned at width 768."""
        scale = (self.config.n_embd / 768) ** -0.5
        print0(f"Scaling the learning rates of the embeddings by {scale:.6f} = (n_embd {self.config.n_embd} / 768)^-0.5")

        def adamw(params, lr, betas, weight_decay):
            return dict(kind="adamw", params=list(params), lr=lr, betas=betas, eps=1e-10, weight_decay=weight_decay)

        groups = [
            adamw(self.lm_head.parameters(), unembedding_lr * scale, (0.8, 0.96), 0.01),
            adamw(self.transformer.wte.parameters(), embedding_lr * scale, (0.8, 0.995), 0.001),
            adamw(self.value_embeds.parameters(), embedding_lr * scale * 0.5, (0.8, 0.995), 0.01),
            adamw([self.resid_lambdas], scalar_lr * 0.01, (0.8, 0.95), 0.05),
            adamw([self.x0_lambdas], scalar_lr, (0.96, 0.95), 0.0),
            adamw([self.smear_gate.weight, self.smear_lambda, self.backout_lambda], 0.2, (0.8, 0.95), 0.0),
        ]
        by_shape = defaultdict(list)
        for p in self.transformer.h.parameters():
            by_shape[tuple(p.shape)].append(p)
        groups += [dict(kind="muon", params=by_shape[shape], lr=matrix_lr, momentum=0.95, ns_steps=5, beta2=0.9, weight_decay=weight_decay)
                   for shape in sorted(by_shape)]
        grouped, total = sum(len(g["params"]) for g in groups), len(list(self.parameters()))
        assert grouped == total, f"{grouped} parameter tensors are in optimizer groups, the model has {total}"
        for group in groups:
            group["initial_lr"] = group["lr"]
        return MuonAdamW(groups)

    @torch.inference_mode()
    def generate(self, tokens: list[int], max_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 seed: int = 42) -> Iterator[int]:
        """The plain version, one full forward per token (see engine.Engine for the fast one): yields `max_tokens` ids."""
        assert isinstance(tokens, list)
        device = self.get_device()
        rng = torch.Generator(device=device).manual_seed(seed) if temperature > 0 else None
        ids = torch.tensor([tokens], dtype=torch.long, device=device)
        for _ in range(max_tokens):
            logits = self.forward(ids)[:, -1, :]  # (1, V)
            if top_k is not None and top_k > 0:
                kth = torch.topk(logits, min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < kth, float("-inf"))
            chosen = (logits.argmax(dim=-1, keepdim=True) if rng is None else
                      torch.multinomial(F.softmax(logits / temperature, dim=-1), num_samples=1, generator=rng))
            ids = torch.cat([ids, chosen], dim=1)
            yield chosen.item()
