"""Small models of unmodified upstream code (fish-speech's S1 line), and the one way in which tests make them speak."""

import torch
from fish_speech.models.text2semantic import inference, llama

SEMANTIC_BEGIN, CODES = 100, 40

CONFIGS = {
    "s1_like": dict(attention_qk_norm=True, fast_attention_qk_norm=False, fast_head_dim=10),
    "no_qk_norm": dict(attention_qk_norm=False),
    "fast_qk_norm_only": dict(attention_qk_norm=False, fast_attention_qk_norm=True),
    "tied": dict(tie_word_embeddings=True),
    "biases": dict(attention_qkv_bias=True, attention_o_bias=True),
    "fast_bias_only": dict(fast_attention_qkv_bias=True, fast_attention_o_bias=True),
    "scaled_embeddings": dict(scale_codebook_embeddings=True),
    "projected": dict(fast_dim=32, fast_n_head=4, fast_n_local_heads=1, fast_head_dim=12, fast_intermediate_size=50),
    "many_query_heads": dict(n_head=12, n_local_heads=1, head_dim=8),
    "plain_heads": dict(n_head=4, n_local_heads=4, head_dim=12),
}


class Tokenizer:
    semantic_begin_id, semantic_end_id = SEMANTIC_BEGIN, SEMANTIC_BEGIN + CODES - 1

    def __init__(self, end_token: int = 3) -> None:
        self.semantic_id_to_token_id = {i: SEMANTIC_BEGIN + i for i in range(CODES)}
        self.end_token = end_token

    def get_token_id(self, token: str) -> int:
        assert token == "<|im_end|>"
        return self.end_token


def build(dtype=torch.float32, seed=0, end_token=3, **overrides):
    """A small DualARTransformer with lively weights (the norms' and biases' too)."""
    args = dict(
        vocab_size=SEMANTIC_BEGIN + CODES, n_layer=3, n_head=6, n_local_heads=2, head_dim=16, dim=48,
        intermediate_size=72,
        max_seq_len=1024, codebook_size=CODES, num_codebooks=4, n_fast_layer=2, tie_word_embeddings=False,
        attention_qk_norm=True,
        norm_eps=1e-6, rope_base=1e4, initializer_range=0.15, use_gradient_checkpointing=False,
    ) | overrides  # fmt: skip
    torch.manual_seed(seed)
    model = llama.DualARTransformer(llama.DualARModelArgs(**args), Tokenizer(end_token)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0, 0.2)
    return model.to(dtype)


def prompt(length=20, seed=1, codebooks=4):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, CODES, (codebooks, length), generator=generator)
    return torch.cat([torch.randint(0, SEMANTIC_BEGIN + CODES, (1, length), generator=generator), codes])


def generate(model, frames=64, seed=5, length=20, top_p=0.9, temperature=0.8, repetition_penalty=1.2, module=inference):
    """Upstream's own generate(): the new frames only, [N+1, n]."""
    torch.manual_seed(seed)
    out = module.generate(
        model=model, prompt=prompt(length, codebooks=model.config.num_codebooks), max_new_tokens=frames,
        audio_masks=None,
        audio_parts=None, temperature=temperature, top_p=top_p, repetition_penalty=repetition_penalty,
    )  # fmt: skip
    return out[:, length:].clone()


def greedy(model, **options):
    """generate() without chance: the nucleus holds one token."""
    return generate(model, top_p=1e-6, **options)
