"""Small tokenizers of every kind that language models have, and what each of them makes of a string."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers as hf
from tiny import GPT2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lmppl import LanguageModel

PADDED = 7  # how many ids the networks know beyond their tokenizers'
SENTENCES = [
    "Tom went to the kitchen. He ate an apple, and then he slept.",
    "The answer is 6 - 4 = 2, isn't it? The cat (a tom) sat on the mat:",
    "def f(x):\n    return x + 1\n\n\nBeginning: tom.\nEnding: the end.\nMiddle: he cut it",
    "Ein Käse, né à Paris; 我们 went 我 to the 🙂 park...",
]
LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
LLAMA_3 = LETTERS + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = [f"<0x{b:02X}>" for b in range(256)]
EXTRA = [  # added to each tokenizer: special and not, with and without the spaces beside them
    AddedToken("<|end|>", special=True, rstrip=True),
    AddedToken("<|user|>", special=True),
    AddedToken("<tool>", special=False, normalized=False),
    AddedToken("<left>", special=False, normalized=False, lstrip=True),
]


def identity(string: str) -> str:
    return string


@dataclass(frozen=True)
class Family:
    """A kind of tokenizer, and what holds for it.

    :param make: a new one.
    :param characters: a regular expression of the characters that it can write.
    :param normal: what its normaliser makes of a string; the string itself where it has none.
    :param spaces: whether it writes every space; else strings come back but for their spaces.
    :param start: what a string has become when it begins a document, decoded.
    """

    make: Callable[[], Any]
    characters: str = r"[^\ud800-\udfff]"
    normal: Callable[[str], str] = identity
    spaces: bool = True
    start: Callable[[str], str] = identity

    def seen(self, string: str) -> str:
        """What is left of a string once it is tokens, to be compared with the same of another."""
        normal = self.normal(string)
        return normal if self.spaces else "".join(normal.split())


def _trained(vocab_size: int, **settings: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and merges of a byte-pair encoding of the sentences."""
    suffix = {"end_of_word_suffix": settings["suffix"]} if "suffix" in settings else {}
    tokenizer = Tokenizer(models.BPE(**suffix))
    tokenizer.pre_tokenizer = settings["pre_tokenizer"]
    tokenizer.normalizer = settings.get("normalizer")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=settings.get("first", []),
        initial_alphabet=settings.get("alphabet", []),
        show_progress=False,
        **suffix,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def byte_level(prefix_space: bool = False) -> hf.GPT2Tokenizer:
    pre = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    vocab, merges = _trained(
        400, pre_tokenizer=pre, first=["<|endoftext|>"], alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    return hf.GPT2Tokenizer(vocab=vocab, merges=merges, add_prefix_space=prefix_space)


def split_bytes(normalizer: Any = None, bos: bool = True) -> hf.PreTrainedTokenizerFast:
    """Byte-level BPE behind a regular expression: Llama-3's (which takes whole words first) and Qwen's (NFC)."""
    pre = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    vocab, merges = _trained(400, pre_tokenizer=pre, alphabet=pre_tokenizers.ByteLevel.alphabet())
    vocab |= {"Ġ🙂": len(vocab), "kitchen": len(vocab) + 1}  # whole words that no merges lead to
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    backend.normalizer, backend.pre_tokenizer, backend.decoder = normalizer, pre, decoders.ByteLevel()
    special = {"bos_token": "<|begin|>"} if bos else {}
    made = hf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eot|>", **special)
    if bos:
        made.add_bos_token = True
        made.update_post_processor()
    return made


def _pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary like SentencePiece's, with all bytes."""
    normalizer = normalizers.Replace(" ", "▁")
    pre = pre_tokenizers.Split("▁", "merged_with_next")
    return _trained(420, pre_tokenizer=pre, normalizer=normalizer, first=["<unk>", "<s>", "</s>", *BYTES])


def llama_2() -> hf.LlamaTokenizer:
    vocab, merges = _pieces()
    return hf.LlamaTokenizer(vocab=vocab, merges=merges)


def llama_2_old() -> hf.PreTrainedTokenizerFast:
    """The layout of older tokenizer.json files: the space comes from a normaliser, before every segment."""
    vocab, merges = _pieces()
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def gemma() -> hf.GemmaTokenizer:
    vocab, merges = _pieces()
    names = {"<s>": "<bos>", "</s>": "<eos>"}
    vocab = {names.get(word, word): i for word, i in vocab.items()}
    vocab |= {word: len(vocab) + i for i, word in enumerate(["<pad>", "<mask>", "▁▁", "▁▁▁", "\n\n"])}
    made = hf.GemmaTokenizer(vocab=vocab, merges=[*merges, ("▁", "▁"), ("▁▁", "▁")])
    made.add_tokens([AddedToken(word, normalized=False) for word in ("▁▁", "▁▁▁", "\n\n")])  # as in its own file
    return made


def _unigram(first: list[str]) -> list[tuple[str, float]]:
    words = sorted({w for s in SENTENCES for w in re.findall(r"[^\W\d_]+", s)})
    marks = sorted({c for s in SENTENCES for c in unicodedata.normalize("NFKC", s) if not c.isspace()})
    letters = [c for c in map(chr, range(33, 127)) if c not in marks]
    pieces = [*(f"▁{w}" for w in words), "▁", *marks, *letters]
    return [(p, 0.0) for p in first] + [(p, -2.0 - len(p) ** -1) for p in dict.fromkeys(pieces)]


def t5() -> hf.T5Tokenizer:
    return hf.T5Tokenizer(vocab=_unigram(["<pad>", "</s>", "<unk>"]), extra_ids=0)


def xlm_roberta() -> hf.XLMRobertaTokenizer:
    made = hf.XLMRobertaTokenizer(vocab=_unigram(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]))
    made.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    return made


def unigram_spaces() -> hf.PreTrainedTokenizerFast:
    """Unigram that keeps its spaces, and newlines."""
    backend = Tokenizer(models.Unigram([*_unigram(["<unk>"]), ("\n", -3.0)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


def word_piece(lower: bool) -> hf.BertTokenizer:
    words = sorted({w for s in SENTENCES for w in re.findall(r"[a-z]+", s.lower())})
    letters = [chr(c) for c in range(33, 127)] + ["我", "们"]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *words, *(f"##{c}" for c in letters)]
    vocab = {p: i for i, p in enumerate(dict.fromkeys([*pieces, "##ing", "##chen"]))}
    made = hf.BertTokenizer(vocab=vocab, do_lower_case=lower)
    made.eos_token = "[SEP]"
    return made


def gpt_1() -> hf.OpenAIGPTTokenizer:
    vocab, merges = _trained(
        500,
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        normalizer=normalizers.BertNormalizer(lowercase=True),
        first=["<unk>"],
        alphabet=[chr(c) for c in range(33, 127)],
        suffix="</w>",
    )
    alone = [f"{chr(c)}</w>" for c in range(33, 127)]
    vocab |= {word: len(vocab) + i for i, word in enumerate(w for w in alone if w not in vocab)}
    made = hf.OpenAIGPTTokenizer(vocab=vocab, merges=merges)
    made.add_special_tokens({"eos_token": "<eos>"})
    return made


def byt5() -> hf.ByT5Tokenizer:
    return hf.ByT5Tokenizer(extra_ids=3)


def characters() -> hf.PreTrainedTokenizerFast:
    """Word-level, one character a word, written without spaces."""
    words = ["<unk>", *map(chr, range(32, 127)), "\n"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")


def words_apart() -> hf.PreTrainedTokenizerFast:
    """Word-level without a decoder: words stand apart."""
    words = ["<unk>", *sorted({w for s in SENTENCES for w in re.findall(r"\w+|[^\w\s]", s)}), *"=0123456789"]
    ids = {w: i for i, w in enumerate(dict.fromkeys(words))}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")


def lower(string: str) -> str:
    return normalizers.BertNormalizer(lowercase=True).normalize_str(string)


def one_space(string: str) -> str:
    return re.sub(" {2,}", " ", unicodedata.normalize("NFKC", string))


ASCII = r"[ -~\n]"
FAMILIES: dict[str, Family] = {
    "gpt-2": Family(lambda: hf.AutoTokenizer.from_pretrained(GPT2)),
    "byte-level": Family(byte_level),
    "byte-level, prefix space": Family(lambda: byte_level(True)),
    "llama-3": Family(split_bytes),
    "qwen": Family(lambda: split_bytes(normalizers.NFC(), bos=False), normal=lambda s: unicodedata.normalize("NFC", s)),
    "llama-2": Family(llama_2),
    "llama-2, old": Family(llama_2_old),
    "gemma": Family(gemma),
    "t5": Family(t5, characters=ASCII, spaces=False),
    "xlm-roberta": Family(xlm_roberta, characters=ASCII, normal=one_space, spaces=False),
    "unigram": Family(unigram_spaces, characters=ASCII),
    "word-piece": Family(lambda: word_piece(False), characters=r"[ -~\n我们]", spaces=False),
    "word-piece, lower": Family(lambda: word_piece(True), characters=r"[ -~\n我们éÄ]", normal=lower, spaces=False),
    "gpt-1": Family(gpt_1, characters=r"[ -~\né]", normal=lower, spaces=False),
    "byt5": Family(byt5),
    "characters": Family(characters, characters=ASCII),
}


@cache
def model_of(name: str, added: bool = False) -> LanguageModel:
    """A tiny network under a family's tokenizer, with added tokens or without."""
    tokenizer = FAMILIES[name].make()
    if added:
        tokenizer.add_tokens(EXTRA)
    size = max(tokenizer.get_vocab().values()) + 1 + PADDED
    config = hf.LlamaConfig(
        vocab_size=size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=1.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LanguageModel(hf.LlamaForCausalLM(config), tokenizer)
