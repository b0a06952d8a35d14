"""Tokenizers of four kinds, trained here, and texts that are hard to align: random, and nasty on purpose."""

from __future__ import annotations

import functools
import random

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dts_hf.alignment.rows import RowAligner
from dts_hf.data.chat_templates import resolve_template
from dts_hf.data.encoding import EncodedDataset, encode_rows
from dts_hf.data.sources import rows_from_dataset
from tests.support.tiny import CHAT_TEMPLATE, CORPUS

#: A second chat template, of another family: other markers, and an end of turn that is another token.
OTHER_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '[' + message['role'] + ']' + message['content'] + '</s>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
NASTY = [
    "", " ", "  ", "\n", "\t\t", "a", " a", "a ", "\r\n", "\x00", "\x01\x1f\x7f", "\u0085", "\u2028", "\u00a0",
    "\u200b\u200d",
    "é", "e\u0301", "ﬁ", "ß", "İ", "ǅ", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇨🇭🇯🇵", "漢字とかな", "한국어", "שלום", "مرحبا بالعالم",
    "हिन्दी", "ไทย",
    "\u202eabc\u202c", "Z̴̡̛a̷l̸g̶o̵", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "𐍈", "\ufeffbom", "\ufffd", "1234567890", "3.14159", "1,000,000", "00", "½", "²",
    "def f(x):\n    return x ** 2\n", "if (a&&b){c=d[0];}", "<|im_end|", "<0x41>", "▁▁", "Ġa", "##ing", "</s", "\\n",
    "https://a.b/c?d=e&f=%20", "a\u0000b", "''\"\"``", "...!!!???", "日本 語", "x\u3000y", "ﷺ", "\U0010ffff",
]  # fmt: skip
_ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz     ", "ABCDEFGH  .,;:!?-()[]{}'\"/", "0123456789., ", "äöüßéèñçøåœ ", "αβγδεжзийкλ ",
    "漢字語文日本中国人水火", "가나다라마바사", "אבגדה ", "ابتثج ",
    "क्षत्रज्ञ ", "😀😁🎉👍🏽🏳️‍🌈👩‍🚀", "\u0300\u0301\u0327\u0338e", "\n\t\r ",
    "\x00\x01\x07\x1b\x7f\u200b\u200d\u202e\ufeff",
)  # fmt: skip
ROWS = [
    ("How many legs do two horses have together?", "Two horses have eight legs together."),
    ("Name three fruits.", "Apples, pears and plums grow on trees."),
    ("Say it in Japanese.", "日本語で、水と火。 OK?"),
    ("Smile.", "😀👍🏽 done"),
    ("Count.", "1, 2, 3, 45678 and 90"),
    ("Write code.", "def f(x):\n    return x + 1\n"),
    ("Nothing.", "no"),
    ("A word.", " leading and  double"),
    ("The boat?", "The boat sailed over the lake."),
]


def instruction_rows(count: int = 9) -> list[dict[str, str]]:
    chosen = (ROWS * (1 + count // len(ROWS)))[:count]
    return [{"id": f"r{k}", "instruction": ask, "input": "", "output": said} for k, (ask, said) in enumerate(chosen)]


def aligned_rows(
    student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, rows: list[dict[str, str]]
) -> EncodedDataset:
    """Rows as both sides read them, as ``DistillationTrainer`` makes them with its usual limits."""
    text, limits = rows_from_dataset(rows), {"max_length": 512, "max_prompt_length": 256}
    data, _ = encode_rows(text, student, resolve_template("auto", student), **limits)
    RowAligner(student, teacher, "auto", train_on=None, **limits).align(data, text)
    return data


@functools.cache
def _trained(kind: str, size: int) -> str:
    specials = ["<unk>", "<s>", "</s>", "<pad>"]
    corpus = [*CORPUS, *(text for row in ROWS for text in row), *NASTY]
    corpus += random_texts(400, seed=9) if size > 2000 else []  # so that few characters are unknown
    if kind == "byte_level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=specials, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )  # fmt: skip
    elif kind == "word_piece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer(clean_text=False, strip_accents=False, lowercase=False)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=specials, show_progress=False)
    else:
        return _unigram(corpus, specials, size)
    tokenizer.train_from_iterator(corpus, trainer)
    return str(tokenizer.to_str())


def _unigram(corpus: list[str], specials: list[str], size: int) -> str:
    """A unigram model with byte fallback and a space before every text, as SentencePiece makes them."""
    draft = Tokenizer(models.Unigram())
    draft.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size - 256 - len(specials), special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    draft.train_from_iterator([text for text in corpus if text.isascii()], trainer)
    import json

    pieces = [(token, score) for token, score in json.loads(draft.to_str())["model"]["vocab"] if token != "<unk>"]
    vocabulary = [(token, 0.0) for token in specials]
    vocabulary += [(f"<0x{byte:02X}>", 0.0) for byte in range(256)] + [(token, score) for token, score in pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return str(tokenizer.to_str())


def tokenizer_of(kind: str, size: int = 400, *, chat: bool = True) -> PreTrainedTokenizerFast:
    """One of ``byte_level``, ``unigram`` (byte fallback) and ``word_piece``, about ``size`` entries."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(kind, size)), unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", clean_up_tokenization_spaces=False,
    )  # fmt: skip
    if chat:
        tokenizer.chat_template = OTHER_TEMPLATE
    return tokenizer


def relabelled(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """The same byte-level tokenizer with its ids in another order, and the new id of each old one."""
    import json

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    order = list(range(len(tokenizer)))
    random.Random(seed).shuffle(order)
    state["model"]["vocab"] = {token: order[index] for token, index in state["model"]["vocab"].items()}
    for added in state["added_tokens"]:
        added["id"] = order[added["id"]]
    state["added_tokens"].sort(key=lambda added: added["id"])
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token, pad_token=tokenizer.pad_token, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    other.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    return other, order


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Nasty texts, then random mixtures of scripts, spaces, controls and nasty texts."""
    draw, texts = random.Random(seed), list(NASTY)
    while len(texts) < count:
        parts = []
        for _ in range(draw.randint(1, 6)):
            if draw.random() < 0.25:
                parts.append(draw.choice(NASTY))
            elif draw.random() < 0.05:
                code = draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)])
                parts.append(chr(code))
            else:
                alphabet = draw.choice(_ALPHABETS)
                parts.append("".join(draw.choice(alphabet) for _ in range(draw.randint(1, 12))))
        texts.append("".join(parts))
    return texts[:count]
