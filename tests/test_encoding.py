"""Both passes of a score read exactly the same target tokens, whatever the tokenizer does at the boundary."""

import pytest
from tiny import BOS, TOKENIZERS, save_tiny_tokenizer
from tokenizers import processors
from transformers import AutoTokenizer

from hf_reflect.student.encoding import Encoder, Passes, prepended_bos
from hf_reflect.student.templates import Scored


TEXTS = {
    "plain": ("What is the capital of France?\n", "The capital of France is Paris."),
    "target starts with a line break": ("What is the capital of France?\n", "\nParis"),
    "target starts with line breaks": ("Name a prime number\n", "\n\n13"),
    "target starts with a space": ("What is the capital of France?\n", " Paris is"),
    "target starts with spaces": ("Write a function.\n", "    return a + b"),
    "target starts with an emoji": ("How are you?\n", "🙂 thank you"),
    "emoji that no merge knows": ("How are you?\n", "🦊🦊"),
    "emoji on both sides": ("I am fine 👩\n", "👩\u200d🚀 and you?"),
    "space before the boundary": ("thank you ", "🦊 and you"),
    "word cut by the boundary": ("The capi", "tal of France"),
    "target starts with a combining accent": ("cafe\n", "\u0301 and you?"),
    "prefix that gets shorter when normalised": ("e\u0301e\u0301e\u0301e\u0301\n", "two numbers"),
    "target repeated in the prompt": ("Paris\nIs Paris the capital? Paris\n", "Paris is"),
    "target like the end of the prompt": ("tips\ntips\n", "tips\ntips\n"),
    "Windows line breaks": ("How are you?\r\n", "\r\nfine\r\n"),
    "other scripts": ("Перевод: 你好\n", "こんにちは、世界。"),
    "looks like a byte token": ("a\n", "<0x0A><0x0A>"),
    "no prefix": ("", "Hello, world!"),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(kind, tmp_path_factory):
    return load_tokenizer(kind, tmp_path_factory.mktemp(kind))


@pytest.fixture(scope="module")
def front(kind, tokenizer):
    """What the family puts in front of every text."""
    return (tokenizer.convert_tokens_to_ids(BOS[kind]),) if kind in ("llama", "sentencepiece") else ()


def load_tokenizer(kind, folder):
    save_tiny_tokenizer(folder, kind)
    return AutoTokenizer.from_pretrained(folder)


def encode(tokenizer, front, prefix, target, max_length=1000) -> Passes:
    return Encoder(tokenizer, front[0] if front else None, max_length).encode([Scored(prefix, target)])[0]


def joint_and_start(tokenizer, prefix, target):
    """The joint ids, and where among them the first character of the target is."""
    encoding = tokenizer.backend_tokenizer.encode(prefix + target, add_special_tokens=False)
    return tuple(encoding.ids), encoding.char_to_token(len(prefix))


def scored_ids(tokens):
    return tokens.ids[tokens.first :]


@pytest.mark.parametrize("name", TEXTS)
def test_both_passes_read_the_target_as_it_stands_in_the_joint_text(name, tokenizer, front):
    ids, start = joint_and_start(tokenizer, *TEXTS[name])
    passes = encode(tokenizer, front, *TEXTS[name])
    assert passes.status == "ok"
    assert passes.conditioned.ids == front + ids
    assert passes.direct.ids == front + ids[start:]


@pytest.mark.parametrize("name", TEXTS)
def test_both_passes_score_all_target_tokens_or_all_but_the_first_where_there_is_no_bos(name, tokenizer, front):
    ids, start = joint_and_start(tokenizer, *TEXTS[name])
    expected = ids[start:] if front else ids[start + 1 :]
    passes = encode(tokenizer, front, *TEXTS[name])
    assert scored_ids(passes.conditioned) == scored_ids(passes.direct) == expected
    assert passes.conditioned.scored == passes.direct.scored == len(expected)


@pytest.mark.parametrize(
    ("kind", "prefix", "target", "tokens"),
    [
        ("llama", "How are you?\n", "\na", ["?ĊĊ", "a"]),
        ("qwen", "How are you?\n", "\na", ["?ĊĊ", "a"]),
        ("gpt2", "How are you\n", "\n\na", ["ĊĊ", "Ċ", "a"]),
        ("llama", "thank you ", "🦊", ["ĠðŁ", "¦", "Ĭ"]),
        ("gpt2", "thank you ", "🦊", ["ĠðŁ", "¦", "Ĭ"]),
        ("qwen", "thank you ", "🦊", ["ĠðŁ", "¦", "Ĭ"]),
        ("sentencepiece", "The capi", "tal of", ["▁capital", "▁of"]),
    ],
)
def test_a_token_that_straddles_the_boundary_belongs_to_the_target(kind, prefix, target, tokens, tmp_path):
    tokenizer = load_tokenizer(kind, tmp_path)
    bos = prepended_bos(tokenizer)
    passes = encode(tokenizer, () if bos is None else (bos,), prefix, target)
    assert tokenizer.convert_ids_to_tokens(passes.direct.ids[0 if bos is None else 1 :]) == tokens


@pytest.mark.parametrize(
    ("kind", "target", "tokens"),
    [
        ("llama", " Paris", ["ĠParis"]),
        ("gpt2", " Paris", ["ĠParis"]),
        ("qwen", " Paris", ["ĠParis"]),
        ("sentencepiece", " Paris.", ["▁Paris."]),
        ("sentencepiece", "tips", ["t", "ip", "s"]),
        ("sentencepiece", "🙂", ["<0xF0>", "<0x9F>", "<0x99>", "<0x82>"]),
    ],
)
def test_after_a_line_of_its_own_the_target_keeps_its_own_space_and_gets_no_other(kind, target, tokens, tmp_path):
    tokenizer = load_tokenizer(kind, tmp_path)
    passes = encode(tokenizer, (0,), "thank you\n", target)
    assert tokenizer.convert_ids_to_tokens(passes.direct.ids[1:]) == tokens


def test_a_target_that_recurs_in_the_prompt_is_scored_once_at_its_own_place(tokenizer, front):
    passes = encode(tokenizer, front, "Hello, world! Hello, world!\n", "Hello, world!")
    assert tokenizer.decode(passes.direct.ids[len(front) :]) == "Hello, world!"
    assert passes.conditioned.ids[-len(passes.direct.ids) + len(front) :] == passes.direct.ids[len(front) :]


def test_a_target_of_one_token_is_scored_after_a_bos_and_too_short_without_one(tokenizer, front):
    passes = encode(tokenizer, front, "Name a number\n", "a")
    if front:
        assert (passes.status, passes.conditioned.scored, passes.direct.scored) == ("ok", 1, 1)
    else:
        assert passes == Passes("too_short", None, None)


@pytest.mark.parametrize("target", ["", " ", "\n", " \t\r\n", "\u3000\u00a0"])
def test_a_target_without_a_visible_character_is_empty(target, tokenizer, front):
    assert encode(tokenizer, front, "How are you?\n", target) == Passes("empty", None, None)


@pytest.mark.parametrize("name", ["plain", "target starts with a line break", "space before the boundary"])
def test_truncation_cuts_the_same_end_off_the_target_in_both_passes(name, tokenizer, front):
    ids, start = joint_and_start(tokenizer, *TEXTS[name])
    unscored = 0 if front else 1
    for kept in range(unscored + 1, len(ids) - start):
        passes = encode(tokenizer, front, *TEXTS[name], max_length=len(front) + start + kept)
        assert passes.status == "truncated"
        assert passes.conditioned.ids == front + ids[: start + kept]
        assert passes.direct.ids == front + ids[start : start + kept]
        assert scored_ids(passes.conditioned) == scored_ids(passes.direct) == ids[start + unscored : start + kept]


def test_a_sequence_just_as_long_as_the_limit_is_whole(tokenizer, front):
    ids, _ = joint_and_start(tokenizer, *TEXTS["plain"])
    assert encode(tokenizer, front, *TEXTS["plain"], max_length=len(front) + len(ids)).status == "ok"
    assert encode(tokenizer, front, *TEXTS["plain"], max_length=len(front) + len(ids) - 1).status == "truncated"


def test_where_the_prompt_leaves_no_room_there_is_nothing_to_score(tokenizer, front):
    _, start = joint_and_start(tokenizer, *TEXTS["plain"])
    room = len(front) + start + (0 if front else 1)
    for max_length in (1, start - 1, room):
        assert encode(tokenizer, front, *TEXTS["plain"], max_length=max_length) == Passes("truncated", None, None)


def test_a_text_is_encoded_alike_alone_and_among_others(tokenizer, front):
    texts = [Scored(*text) for text in TEXTS.values()] + [Scored("a\n", ""), Scored("tips " * 50, "a b")]
    encoder = Encoder(tokenizer, front[0] if front else None, 60)
    assert encoder.encode(texts) == [encoder.encode([text])[0] for text in texts]
    assert encoder.encode(texts[::-1]) == encoder.encode(texts)[::-1]


def test_no_texts_give_no_passes(tokenizer):
    assert Encoder(tokenizer, None, 100).encode([]) == []


def test_a_bos_is_what_the_tokenizer_prepends_not_what_it_defines(kind, tokenizer):
    prepends = {"llama": "<|begin_of_text|>", "gpt2": None, "qwen": None, "sentencepiece": "<s>"}[kind]
    bos = prepended_bos(tokenizer)
    assert prepends == (None if bos is None else tokenizer.convert_ids_to_tokens(bos))


@pytest.mark.parametrize(("single", "expected"), [("$A </s>", None), ("<s> $A </s>", "<s>"), ("<s> $A", "<s>")])
def test_an_eos_that_the_tokenizer_appends_is_no_bos(single, expected, tmp_path):
    raw = save_tiny_tokenizer(tmp_path, "sentencepiece")
    specials = [(token, raw.token_to_id(token)) for token in ("<s>", "</s>")]
    raw.post_processor = processors.TemplateProcessing(single=single, pair="$A $B", special_tokens=specials)
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    bos = prepended_bos(tokenizer)
    assert expected == (None if bos is None else tokenizer.convert_ids_to_tokens(bos))
