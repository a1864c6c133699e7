"""A word-level tokenizer whose words carry their leading space, as in GPT-2."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

EOS, MASK = "<eos>", "<mask>"
SYMBOLS = (" ", "\n", ".", ",", ":", ";", "|", "-", "#", "*", "(", ")", "?", "!")
WORD = r"<eos>| ?[A-Za-z]+:?|[^A-Za-z]"  # a word with its space and colon, else one character


def build(words: Iterable[str], context: int, word: str = WORD, mask: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of a closed vocabulary: `<eos>`, the symbols, then `words` (with their leading spaces) in order.

    `decode(encode(s)) == s` for every text `s` over the vocabulary, and encodings of sentences concatenate. A text with
    another word in it raises on encoding: there is no unknown token that would be scored silently. `<eos>` is the
    beginning, the end and the padding alike. With ``mask``, the last id is `<mask>`, and all others are as without.
    """
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys((EOS, *SYMBOLS, *words, *[MASK] * mask)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(word), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        mask_token=MASK if mask else None,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
