"""From text to tokens: cleaned, split, encoded and laid out as upstream does it."""

import dataclasses
import random
import re
import sys

import pytest
import torch
from checkpoint_files import CODES
from fish_speech.content_sequence import ContentSequence, TextPart, VQPart
from fish_speech.text import clean_text
from fish_speech.tokenizer import ALL_SPECIAL_TOKENS, FishTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from speech_files import save_s1, train

from s1kernels.model import checkpoint
from s1kernels.model.config import DualARConfig, StackConfig
from s1kernels.speech import Voice, text, tokenizer
from s1kernels.speech.prompt import Prompt

WORDS = [
    "Hello", "isn't", "it's", "IT'S", "12,345.67", "naïve", "Größe", "你好", "世界", "。", "，", "！",
    "こんにちは", "カタカナ", "안녕하세요", "สวัสดี", "नमस्ते।", "مرحبا؟", "שלום", "Привет", "👩‍👩‍👧", "🙂", "🇫🇷",
    "é", "e\u0301", "...", "?!", "?!x", "  ",
    "\n", "\r\n", "\t", " ", "-", "—", "‘quoted’", ",,,,", "(laughing)", "<|im_end|>", "<|semantic:7|>",
    "<|speaker:0|>", "<|interleave|>", "<|im_end", "|>", "<|", "<|nothing|>", "a" * 50, "\u200b", "½", "x²", "$5", "https://a.b/c?d=e",
]  # fmt: skip
CLEAR = re.compile(r"tokenizer: .+ must (be|have) .+, got .*; .+", re.DOTALL)


def corpus():
    draw = random.Random(0)
    texts = ["", " ", "\n", "?!", "  ?!x", *WORDS]
    while len(texts) < 1100:
        words = draw.choices(WORDS, k=draw.randint(1, 12))
        texts.append(draw.choice(["", " "]).join(words))
    return texts


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_s1(tmp_path_factory.mktemp("s1"))


@pytest.fixture(scope="module")
def config(directory):
    return checkpoint.read_config(directory)


@pytest.fixture(scope="module")
def ours(directory, config):
    return tokenizer.load(directory, config)


@pytest.fixture(scope="module")
def theirs(directory):
    return FishTokenizer.from_pretrained(directory)


def test_token_ids_are_upstreams_and_no_text_is_a_special_token(ours, theirs):
    texts = corpus()
    assert len(texts) >= 1000
    looks = 0
    for one in texts:
        assert ours.plain(one) == theirs.encode(one, allowed_special=False), one
        if any(token in one for token in ours.specials):
            looks += 1
            assert ours.plain(one) != theirs.encode(one) and not set(ours.plain(one)) & set(ours.specials.values())
        else:
            assert ours.plain(one) == theirs.encode(one), one
    assert looks > 100
    assert ours.specials == theirs.all_special_tokens_with_ids


def test_without_special_tokens_json_they_are_upstreams_own(directory, tmp_path):
    (tmp_path / tokenizer.TIKTOKEN).write_bytes((directory / tokenizer.TIKTOKEN).read_bytes())
    assert tokenizer.UPSTREAM_SPECIALS == ALL_SPECIAL_TOKENS
    found, _ = tokenizer._load_s1(tmp_path)
    assert found.specials == FishTokenizer(tmp_path / tokenizer.TIKTOKEN).all_special_tokens_with_ids


def test_texts_are_cleaned_as_upstream_does():
    for one in corpus():
        assert text.clean(one) == clean_text(one), one
    assert text.clean("\ufeffa\x00b\x0cc\x1b[1md\ud800e") == "ab c[1mde"


def upstream_prompt(theirs, said, spoken, codebooks):
    """Upstream's prompt; what users type comes as tokens, so that nothing of it is interpreted."""
    sequence = ContentSequence(modality="interleave")

    def part(one):
        return TextPart(tokens=theirs.tkt_model.encode_ordinary(one))

    for one, codes in said:
        sequence.append([part(one), VQPart(codes=codes)], add_end=True, speaker=0)
    sequence.append([part(spoken)], add_end=False, speaker=0)
    return sequence.encode_for_inference(theirs, num_codebooks=codebooks)[0]


def test_prompts_are_upstreams(ours, theirs, config):
    prompt, draw = Prompt(config, ours), torch.Generator().manual_seed(0)
    for i, one in enumerate(corpus()):
        said = [
            (text.clean(reference) or "a", torch.randint(0, CODES, (config.codebooks, frames + 1), generator=draw))
            for frames, reference in enumerate(random.Random(i).choices(WORDS, k=i % 3))
        ]
        references = [Voice(*reference) for reference in said]
        one = text.clean(one)
        expected = upstream_prompt(theirs, said, one, config.codebooks)
        assert torch.equal(torch.cat([prompt.opening(references), prompt.turn(one)], dim=1), expected), one
        if said:  # what has been spoken reads as a reference does
            spoken = torch.cat([prompt.opening(references[:-1]), prompt.spoken(*said[-1]), prompt.turn(one)], dim=1)
            assert torch.equal(spoken, expected)


OMNI_SPECIALS = ["<|im_start|>", "<|im_end|>", "<|voice|>", *(f"<|semantic:{code}|>" for code in range(CODES))]


def omni(path, specials):
    """A 2.0 tokenizer.json with these added tokens, and a config that fits."""
    file = train()
    file.add_special_tokens(specials[: len(specials) // 2])
    file.add_tokens(specials[len(specials) // 2 :])  # not all are marked as special in published files either
    file.save(str(path / tokenizer.JSON))
    stack = StackConfig(1, 8, 2, 1, 4, 8)
    ids = {name: file.token_to_id(name) for name in specials}
    return file, ids, DualARConfig(
        stack, stack, file.get_vocab_size(), 3, CODES, 64, 1e-6, 1e4, True, True, True, ids["<|semantic:0|>"],
        ids[f"<|semantic:{CODES - 1}|>"], ids["<|im_end|>"], "2.0",
    )  # fmt: skip


def test_the_2_0_lines_tokenizer(tmp_path):
    file, ids, config = omni(tmp_path, OMNI_SPECIALS)
    found, base = tokenizer.load(tmp_path, config), train()
    looks = 0
    for one in corpus():
        assert found.plain(one) == base.encode(one, add_special_tokens=False).ids, one
        looks += found.plain(one) != file.encode(one, add_special_tokens=False).ids
    assert looks > 50
    assert found.specials == ids


@pytest.mark.parametrize("tags", [[], ["<|speaker:0|>", "<|speaker:1|>"]])
def test_the_2_0_lines_layout(tags, tmp_path):
    file, ids, config = omni(tmp_path, [*tags, *OMNI_SPECIALS])
    prompt = Prompt(config, tokenizer.load(tmp_path, config))
    codes = torch.tensor([[1, 2], [3, 4], [5, 6]])

    def encoded(template):
        return file.encode(template, add_special_tokens=False).ids

    ask = encoded("<|im_start|>user\nHi.") + encoded("<|im_end|>\n") + encoded("<|im_start|>assistant\n<|voice|>")
    alone = encoded("<|im_start|>system\n") + encoded("convert the provided text to speech") + encoded("<|im_end|>\n")
    assert torch.cat([prompt.opening(), prompt.turn("Hi.")], dim=1)[0].tolist() == alone + ask
    heard = prompt.opening([Voice("One.", codes), Voice("Two?", codes + 1)])
    semantic = [ids["<|semantic:0|>"] + code for code in (1, 2, 2, 3)]
    before = encoded("<|im_start|>system\n")
    before += encoded("convert the provided text to speech reference to the following:\n\nText:\n")
    before += encoded("<|speaker:0|>One.\n<|speaker:1|>Two?") + encoded("\n\nSpeech:\n")
    assert heard[0].tolist() == before + semantic + encoded("<|im_end|>\n")
    assert torch.equal(heard[1:, len(before) : len(before) + 4], torch.cat([codes, codes + 1], dim=1))
    assert not heard[1:, : len(before)].any() and not heard[1:, len(before) + 4 :].any()
    spoken = prompt.spoken("Hi.", codes)
    assert spoken[0].tolist() == ask + semantic[:2] + encoded("<|im_end|>\n")
    assert torch.equal(prompt.closing(), spoken[:, -1:])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*WORDS, ". ", "。", "! ", ", "]), max_size=60).map("".join), st.integers(1, 9))
def test_split_texts_are_whole_and_short(given_text, limit):
    parts = text.split(given_text, limit)
    assert "".join("".join(parts).split()) == "".join(given_text.split())
    assert all(part == part.strip() and 0 < text.usual_seconds(part) < limit + 1e-6 for part in parts)


def test_texts_are_split_where_sentences_end():
    english = "Dr. Smith paid $3.50 for it. Did he? Yes! "
    assert text.split(english * 2, 6) == [english.strip(), english.strip()]
    assert text.split(english * 2, 3.5) == ["Dr. Smith paid $3.50 for it.", "Did he? Yes!"] * 2
    chinese = "今天天气很好。我们去公园吧！"
    assert text.split(chinese * 3, 4) == [chinese, chinese, chinese]
    assert text.split("one two, three four, five six seven", 1.5) == ["one two, three four,", "five six seven"]
    assert text.split("a" * 40, 1) == ["a" * 14, "a" * 14, "a" * 12]
    assert text.split("e\u0301" * 20, 1.41) == ["e\u0301" * 10] * 2  # marks stay with their letters
    assert len(text.split("A sentence of some words. " * 4000)) > 300  # 100,000 characters


def test_a_texts_time():
    assert 10 < text.usual_seconds("a" * 233) < 25 and 5 < text.usual_seconds("好" * 30) < 10
    assert text.most_seconds("") == text.PAUSES and text.most_seconds("1984") > 3


def refused(directory, config, kind, message):
    with pytest.raises(kind, match=message) as caught:
        tokenizer.load(directory, config)
    assert CLEAR.fullmatch(str(caught.value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t + "!!! 336\n", "lines of a token in base64 and its rank"),
        (lambda t: t + "YQ==\n", "lines of a token in base64 and its rank"),
        (lambda t: t.replace(" 3\n", " 4\n", 1), "ranks in tokenizer.tiktoken must be 0, 1, 2"),
        (lambda t: "".join(t.splitlines(True)[:-1]), r"<\|im_end\|> in special_tokens.json must be the model's, got"),
        (lambda t: "YQ== 0\n", "a token for every byte, got none for byte 0"),
    ],
)
def test_damaged_tiktoken_files(change, message, directory, config, tmp_path):
    for file in (tokenizer.TIKTOKEN, tokenizer.SPECIAL_TOKENS):
        (tmp_path / file).write_bytes((directory / file).read_bytes())
    path = tmp_path / tokenizer.TIKTOKEN
    path.write_text(change(path.read_text()))
    refused(tmp_path, config, ValueError, message)


def test_missing_and_mismatched_files(directory, config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer.tiktoken must be in .*, got no such file; download it"):
        tokenizer.load(tmp_path, config)
    _, _, omni_config = omni(tmp_path, OMNI_SPECIALS)
    (tmp_path / tokenizer.JSON).unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json must be in"):
        tokenizer.load(tmp_path, omni_config)
    (tmp_path / tokenizer.JSON).write_text('{"model": 7}')
    refused(tmp_path, omni_config, ValueError, "tokenizer.json must be a file of the tokenizers library")
    (tmp_path / tokenizer.JSON).write_text("[]")
    refused(tmp_path, omni_config, ValueError, "tokenizer.json must be a JSON object")
    train().save(str(tmp_path / tokenizer.JSON))
    refused(tmp_path, omni_config, ValueError, r"<\|im_end\|> must be in tokenizer.json, got nothing")
    small = dataclasses.replace(config, vocab_size=config.vocab_size - 1, semantic_end=config.semantic_end - 1)
    refused(directory, small, ValueError, "token ids in special_tokens.json must be below the model's vocab_size")


def test_a_missing_package_is_named(directory, config, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'tiktoken must be installed, .*; run `pip install "s1kernels\[speech\]"`'
    ):
        tokenizer.load(directory, config)
