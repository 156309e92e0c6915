"""Real but very small models: a random causal LM with a tokenizer of its own, made offline in a moment.

The tokenizers are small rebuilds of real families. What matters to a scorer is whether a BOS is prepended, whether
one is merely defined, and whether a text gets a dummy space in front.
"""

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
)
from transformers.models.auto import AutoModelForCausalLM


TOKENIZERS = ("llama", "gpt2", "qwen", "sentencepiece")
"""The tokenizer families. `llama` and `sentencepiece` prepend a BOS, `gpt2` only defines one, `qwen` has none."""

BOS = {"llama": "<|begin_of_text|>", "gpt2": "<|endoftext|>", "qwen": None, "sentencepiece": "<s>"}
EOS = {"llama": "<|end_of_text|>", "gpt2": "<|endoftext|>", "qwen": "<|endoftext|>", "sentencepiece": "</s>"}

HEADS = ("gemma2", "granite", "cohere")
"""Models that do something to the logits after the matrix; all with the tokenizer of `llama`."""

KINDS = TOKENIZERS + HEADS

MAX_POSITIONS = 512

TEXT = """\
Give three tips for staying healthy.

Eat a balanced diet, sleep enough and move every day.


What is the capital of France?

The capital of France is Paris.


What instruction was this text written for?

Describe the structure of an atom.

An atom has a nucleus of protons and neutrons; electrons move around it.


Name a prime number between 10 and 20.

11, 13, 17 and 19 are prime.
  - Write a function that adds two numbers.
    def add(a, b):
        return a + b
  - Hello, world! How are you? I am fine 🙂 thank you 🙂 and you?

"""

# As in Llama 3 and Qwen 2, punctuation takes the line breaks that follow it, so "?\n\n" can be one token. GPT-2's own
# split (`use_regex=True`) keeps them apart.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = {"llama": "{1,3}", "qwen": ""}

_VOCABULARY = 600


def save_tiny_model(folder: Path, kind: str = "llama", seed: int = 0) -> Path:
    """Saves a random causal LM and its fast tokenizer for `from_pretrained`.

    Args:
        folder: Where to; it is made if it is not there.
        kind: One of `KINDS`.
        seed: What the weights are drawn with.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = save_tiny_tokenizer(folder, kind if kind in TOKENIZERS else "llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(_config(kind, tokenizer))
    model.eval().save_pretrained(folder)
    return folder


def save_tiny_tokenizer(folder: Path, kind: str) -> Tokenizer:
    """Saves a fast tokenizer of one of `TOKENIZERS` to `folder`."""
    tokenizer = _sentencepiece() if kind == "sentencepiece" else _byte_level(kind)
    tokenizer.save(str(folder / "tokenizer.json"))
    specials = {"bos_token": BOS[kind], "eos_token": EOS[kind]}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
        **{name: token for name, token in specials.items() if token},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return tokenizer


def _byte_level(kind: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if kind == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        split = pre_tokenizers.Split(Regex(_SPLIT.replace("DIGITS", _DIGITS[kind])), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    if kind == "qwen":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[token for token in dict.fromkeys((BOS[kind], EOS[kind])) if token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if kind == "llama":
        tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, _prepend(tokenizer, BOS[kind])])
    return tokenizer


def _sentencepiece() -> Tokenizer:
    # Trained on words that begin with "▁", then given Llama 2's own normalizer, which has no words at all.
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    # By lines: as in Llama 2, a line break is no entry of its own but the byte <0x0A>. An emoji is four bytes.
    tokenizer.train_from_iterator(TEXT.replace("🙂", "").splitlines(), trainer)
    state = json.loads(tokenizer.to_str())
    # The bytes must be plain entries of the vocabulary: as special tokens the text "<0x0A>" would match one.
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in {"<unk>", "<s>", "</s>"}]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = _prepend(tokenizer, "<s>")
    return tokenizer


def _prepend(tokenizer: Tokenizer, bos: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


def _config(kind: str, tokenizer: Tokenizer) -> PretrainedConfig:
    family = kind if kind in TOKENIZERS else "llama"
    common = {
        "vocab_size": tokenizer.get_vocab_size(),
        "bos_token_id": tokenizer.token_to_id(BOS[family]) if BOS[family] else None,
        "eos_token_id": tokenizer.token_to_id(EOS[family]),
        "initializer_range": 0.5,  # large, so that the losses of different tokens differ
    }
    if kind == "gpt2":
        return GPT2Config(**common, n_positions=MAX_POSITIONS, n_embd=32, n_layer=2, n_head=4)
    common |= {
        "pad_token_id": None,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
    }
    match kind:
        case "llama" | "sentencepiece":
            return LlamaConfig(**common)
        case "qwen":
            return Qwen2Config(**common)
        case "gemma2":
            return Gemma2Config(**common, head_dim=8, final_logit_softcapping=5.0, sliding_window=64)
        case "granite":
            return GraniteConfig(**common, logits_scaling=3.0)
        case "cohere":
            return CohereConfig(**common, logit_scale=0.3)
    raise ValueError(f"no tiny model of kind {kind!r}; there are {', '.join(KINDS)}")
