"""A stand-in for Fish-Speech's 2.0 line: its structure, names and semantics, in code of our own.

Upstream's 2.0 source may not be copied, so this module was written from a description of what it does.
`s1kernels.patch` recognises models by structure and must serve this module as it would serve upstream's. Everything
follows the dtype of the parameters, float64 included, so that the same module is also the truth.
"""

import math
from collections import namedtuple
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RAS_WINDOW, RAS_TEMPERATURE, RAS_TOP_P = 10, 1.0, 0.9


@dataclass
class BaseTransformerForwardResult:
    logits: Tensor
    hidden_states: Tensor


@dataclass
class DualARModelArgs:
    vocab_size: int
    semantic_begin_id: int
    semantic_end_id: int
    dim: int = 48
    n_layer: int = 2
    n_head: int = 6
    n_local_heads: int = 2
    head_dim: int = 16
    intermediate_size: int = 72
    codebook_size: int = 40
    num_codebooks: int = 4
    max_seq_len: int = 256
    rope_base: float = 1e4
    norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    attention_qkv_bias: bool = False
    attention_o_bias: bool = False
    attention_qk_norm: bool = True
    scale_codebook_embeddings: bool = True
    norm_fastlayer_input: bool = True
    n_fast_layer: int = 1
    fast_dim: int | None = None
    fast_n_head: int | None = None
    fast_n_local_heads: int | None = None
    fast_head_dim: int | None = None
    fast_intermediate_size: int | None = None
    fast_attention_qkv_bias: bool | None = None
    fast_attention_o_bias: bool | None = None
    fast_attention_qk_norm: bool | None = None

    def __post_init__(self):
        for name in [name for name in vars(self) if name.startswith("fast_")]:
            given = getattr(self, name)
            setattr(self, name, getattr(self, name[5:]) if given is None else given)


STACK = tuple(name[5:] for name in DualARModelArgs.__annotations__ if name.startswith("fast_"))
Stack = namedtuple("Stack", [*STACK, "norm_eps"])


def stack_of(config, prefix=""):
    return Stack(*(getattr(config, prefix + name) for name in STACK), config.norm_eps)


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """Rounds before it multiplies with the weight."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        wide = at_least_float32(x)
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class KVCache(nn.Module):
    def __init__(self, batch, positions, heads, head_dim, dtype):
        super().__init__()
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros(batch, heads, positions, head_dim, dtype=dtype))

    def update(self, input_pos, k, v):
        self.k_cache[:, :, input_pos], self.v_cache[:, :, input_pos] = k, v
        return self.k_cache, self.v_cache


def rotary_table(positions, head_dim, base):
    """[positions, head_dim / 2, 2], in bfloat16."""
    angles = torch.arange(positions)[:, None] / base ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return torch.stack((angles.cos(), angles.sin()), dim=-1).bfloat16()


def rotate(x, table):
    """x: [B, T, heads, head_dim]; neighbours form a pair."""
    even, odd = at_least_float32(x).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = at_least_float32(table)[:, None].unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, stack, use_sdpa):
        super().__init__()
        self.stack, self.use_sdpa, self.kv_cache = stack, use_sdpa, None
        rows = (stack.n_head + 2 * stack.n_local_heads) * stack.head_dim
        self.wqkv = nn.Linear(stack.dim, rows, bias=stack.attention_qkv_bias)
        self.wo = nn.Linear(stack.n_head * stack.head_dim, stack.dim, bias=stack.attention_o_bias)
        if stack.attention_qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(stack.head_dim, stack.norm_eps) for _ in range(2))

    def forward(self, x, table, mask, input_pos):
        stack, groups = self.stack, self.stack.n_local_heads
        heads = self.wqkv(x).unflatten(-1, (-1, stack.head_dim))
        q, k, v = heads.split([stack.n_head, groups, groups], dim=2)
        if stack.attention_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = rotate(q, table).transpose(1, 2), rotate(k, table).transpose(1, 2), v.transpose(1, 2)
        k, v = (t.repeat_interleave(stack.n_head // groups, dim=1) for t in self.kv_cache.update(input_pos, k, v))
        if self.use_sdpa:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:  # every step in the dtype of the model
            scores = (q @ k.transpose(-1, -2) / math.sqrt(stack.head_dim)).masked_fill(~mask, -math.inf)
            y = scores.softmax(-1) @ v
        return self.wo(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, stack):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(stack.dim, stack.intermediate_size, bias=False) for _ in range(2))
        self.w2 = nn.Linear(stack.intermediate_size, stack.dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self, stack, use_sdpa):
        super().__init__()
        self.attention, self.feed_forward = Attention(stack, use_sdpa), FeedForward(stack)
        self.attention_norm, self.ffn_norm = (RMSNorm(stack.dim, stack.norm_eps) for _ in range(2))

    def forward(self, x, table, mask, input_pos):
        x = x + self.attention(self.attention_norm(x), table, mask, input_pos)
        return x + self.feed_forward(self.ffn_norm(x))


class DualARTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.tokenizer = config, None
        self.max_seq_len = self.max_batch_size = -1
        slow, fast = stack_of(config), stack_of(config, "fast_")
        self.embeddings = nn.Embedding(config.vocab_size, slow.dim)
        self.codebook_embeddings = nn.Embedding(config.codebook_size * config.num_codebooks, slow.dim)
        self.layers = nn.ModuleList(TransformerBlock(slow, use_sdpa=True) for _ in range(config.n_layer))
        self.norm = RMSNorm(slow.dim, slow.norm_eps)
        if not config.tie_word_embeddings:
            self.output = nn.Linear(slow.dim, config.vocab_size, bias=False)
        self.fast_project_in = nn.Identity() if fast.dim == slow.dim else nn.Linear(slow.dim, fast.dim)
        self.fast_embeddings = nn.Embedding(config.codebook_size, fast.dim)
        self.fast_layers = nn.ModuleList(TransformerBlock(fast, use_sdpa=False) for _ in range(config.n_fast_layer))
        self.fast_norm = RMSNorm(fast.dim, fast.norm_eps)
        self.fast_output = nn.Linear(fast.dim, config.codebook_size, bias=False)
        for name, table in (
            ("freqs_cis", rotary_table(config.max_seq_len, slow.head_dim, config.rope_base)),
            ("fast_freqs_cis", rotary_table(config.num_codebooks, fast.head_dim, config.rope_base)),
            ("causal_mask", torch.ones(config.max_seq_len, config.max_seq_len, dtype=torch.bool).tril()),
        ):
            self.register_buffer(name, table, persistent=False)

    def setup_caches(self, max_batch_size, max_seq_len, dtype=torch.bfloat16):
        """The fast caches are new at every call, the slow ones only when they must be larger."""
        slow, fast = stack_of(self.config), stack_of(self.config, "fast_")
        if max_seq_len > self.max_seq_len or max_batch_size > self.max_batch_size:
            self.max_seq_len, self.max_batch_size = -(-max_seq_len // 8) * 8, max_batch_size
            for layer in self.layers:
                layer.attention.kv_cache = KVCache(
                    max_batch_size, self.max_seq_len, slow.n_local_heads, slow.head_dim, dtype
                )
        for layer in self.fast_layers:
            layer.attention.kv_cache = KVCache(
                max_batch_size, self.config.num_codebooks, fast.n_local_heads, fast.head_dim, dtype
            )

    def forward_generate(self, x, input_pos=None, audio_masks=None, audio_parts=None):
        config, main = self.config, x[:, 0]
        offsets = torch.arange(config.num_codebooks, device=x.device)[:, None] * config.codebook_size
        semantic = ((main >= config.semantic_begin_id) & (main <= config.semantic_end_id))[..., None]
        codes = self.codebook_embeddings(x[:, 1:] + offsets).sum(dim=1).masked_fill(~semantic, 0)
        h = self.embeddings(main) + codes
        if config.scale_codebook_embeddings:
            h = torch.where(semantic, h / math.sqrt(config.num_codebooks + 1), h)
        mask = self.causal_mask[None, None, input_pos, : self.max_seq_len]
        for layer in self.layers:
            h = layer(h, self.freqs_cis[input_pos], mask, input_pos)
        h = h[:, -1:]
        normed = self.norm(h)
        head = self.output.weight if hasattr(self, "output") else self.embeddings.weight
        hidden = self.fast_project_in(normed if config.norm_fastlayer_input else h)
        return BaseTransformerForwardResult(logits=F.linear(normed, head), hidden_states=hidden)

    def forward_generate_fast(self, x, input_pos=None):
        h = x.view(x.shape[0], 1, -1)
        mask = self.causal_mask[None, None, input_pos, : self.config.num_codebooks]
        for layer in self.fast_layers:
            h = layer(h, self.fast_freqs_cis[input_pos], mask, input_pos)
        return self.fast_output(self.fast_norm(h))


def sample(logits, temperature, top_p, top_k):
    """A draw from [..., V] logits: its index [1], and the probabilities [V]. The nucleus is that of temperature 1."""
    values, order = logits[0, -1].sort(descending=True)
    removed = (values.softmax(-1).cumsum(-1) > top_p) | (torch.arange(len(values), device=values.device) >= top_k)
    removed[0] = False
    kept = torch.full_like(values, -math.inf).scatter(0, order, values.masked_fill(removed, -math.inf))
    probabilities = (kept / temperature.clamp(min=1e-5)).softmax(-1)
    exponential = -torch.rand_like(probabilities).log()
    return (probabilities / exponential).argmax(-1, keepdim=True).int(), probabilities


def redraw_needed(main, window, config):
    """Whether repetition-aware sampling takes the second draw: `main` is semantic and was said lately."""
    semantic = (main >= config.semantic_begin_id) & (main <= config.semantic_end_id)
    return semantic & (window == main).any()


def decode_one_token_ar(
    model, x, input_pos, temperature, top_p, top_k, semantic_logit_bias, audio_masks, audio_parts, previous_tokens=None
):
    """The frame after `x`, [N+1, 1] int32."""
    config = model.config
    result = model.forward_generate(x, input_pos, audio_masks=audio_masks, audio_parts=audio_parts)
    biased = result.logits + semantic_logit_bias
    main = sample(biased, temperature, top_p, top_k)[0]
    high = [torch.tensor(v, dtype=temperature.dtype, device=x.device) for v in (RAS_TEMPERATURE, RAS_TOP_P)]
    second = sample(biased, *high, top_k)[0]  # drawn whether needed or not
    if previous_tokens is not None:
        main = torch.where(redraw_needed(main, previous_tokens[0], config), second, main)
    model.forward_generate_fast(result.hidden_states, torch.tensor([0], device=x.device))
    codes = [main, (main - config.semantic_begin_id).clamp(0, config.codebook_size - 1)]
    for i in range(1, config.num_codebooks):
        logits = model.forward_generate_fast(model.fast_embeddings(codes[-1]), torch.tensor([i], device=x.device))
        codes.append(sample(logits, temperature, top_p, top_k)[0])
    return torch.stack(codes)


def decode_n_tokens(
    model, cur_token, input_pos, num_new_tokens, temperature, top_p, top_k, semantic_logit_bias, audio_masks,
    audio_parts, decode_one_token=decode_one_token_ar,
):  # fmt: skip
    """Up to `num_new_tokens` frames after `cur_token`, [N+1, n] int32; `input_pos` moves on in place."""
    rows = model.config.num_codebooks + 1
    window, frames = torch.zeros(rows, RAS_WINDOW, dtype=torch.int, device=cur_token.device), []
    for _ in range(num_new_tokens):
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            frame = decode_one_token(
                model=model, x=cur_token, input_pos=input_pos, previous_tokens=window, temperature=temperature,
                top_p=top_p, top_k=top_k, semantic_logit_bias=semantic_logit_bias, audio_masks=audio_masks,
                audio_parts=audio_parts,
            ).clone()  # fmt: skip
        frames.append(frame)
        input_pos += 1
        cur_token, window = frame.view(1, rows, 1), torch.cat([window[:, 1:], frame], dim=1)
        if int(frame[0]) == model.tokenizer.get_token_id("<|im_end|>"):
            break
    return torch.cat(frames, dim=1)


@torch.inference_mode()
def generate(
    *, model, prompt, max_new_tokens, audio_masks, audio_parts, decode_one_token=decode_one_token_ar, **sampling
):
    """`prompt` and what follows it, [N+1, T + n]."""
    parameter, (rows, length) = next(model.parameters()), prompt.shape
    options = dict(dtype=parameter.dtype, device=prompt.device)
    if not getattr(model, "_cache_setup_done", False):
        model.setup_caches(max_batch_size=1, max_seq_len=model.config.max_seq_len, dtype=parameter.dtype)
        model._cache_setup_done = True
    bias = torch.full((1, 1, model.config.vocab_size), -math.inf, **options)
    bias[..., model.config.semantic_begin_id : model.config.semantic_end_id + 1] = 0
    bias[..., model.tokenizer.get_token_id("<|im_end|>")] = 0
    numbers = [torch.tensor(sampling[name], **options) for name in ("temperature", "top_p")]
    arguments = [*numbers, sampling["top_k"], bias, audio_masks, audio_parts]
    first = decode_one_token_ar(model, prompt[None], torch.arange(length, device=prompt.device), *arguments)
    position = torch.tensor([length], device=prompt.device, dtype=torch.int)
    rest = decode_n_tokens(
        model, first.view(1, rows, 1), position, max_new_tokens - 1, *arguments, decode_one_token=decode_one_token
    )
    return torch.cat([prompt, first.to(prompt.dtype), rest.to(prompt.dtype)], dim=1)
