#!/usr/bin/env python3
"""Writes io/unicode_reference_tables.h: where the Unicode data of the reference library differ from that of other versions.

The PyPI package tokenizers carries three sets of Unicode data: its regular expressions (Oniguruma) know Unicode 16, its NFC
knows Unicode 9, its Digits step is as new as the Rust compiler. Each is probed for every code point and compared with the
oldest and the newest data that PCRE2 or utf8proc may bring (Unicode 14: Python's unicodedata; newest: pip install
unicodedata2).    make_unicode_reference.py > io/unicode_reference_tables.h && clang-format -i io/unicode_reference_tables.h
"""
import sys
import unicodedata as oldest

import tokenizers
import unicodedata2 as newest
from tokenizers import Regex, normalizers, pre_tokenizers

CATEGORIES = "Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Co Cn".split()
CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
BLOCK = 4096


def members(pattern):
    split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    for i in range(0, len(CODE_POINTS), BLOCK):
        for word, _ in split.pre_tokenize_str("".join(map(chr, CODE_POINTS[i:i + BLOCK]))):
            yield from map(ord, word)


def numeric():
    split = pre_tokenizers.Digits(individual_digits=True)
    for i in range(0, len(CODE_POINTS), BLOCK):
        text = "a" + "a".join(map(chr, CODE_POINTS[i:i + BLOCK])) + "a"
        yield from (ord(word) for word, _ in split.pre_tokenize_str(text) if word[0] != "a")


def utf8_length(c):
    return len(chr(c).encode())


def ranges(values):
    """Runs of code points with the same value, from {code point: value}."""
    runs = []
    for c in sorted(values):
        if runs and runs[-1][1] == c - 1 and runs[-1][2] == values[c]:
            runs[-1][1] = c
        else:
            runs.append([c, c, values[c]])
    return runs


def category_table():
    category = {c: name for name in CATEGORIES for c in members(rf"\p{{{name}}}")}
    assert len(category) == len(CODE_POINTS)

    def same_everywhere(c):
        return category[c] == oldest.category(chr(c)) == newest.category(chr(c))

    stand_in = {}
    for c in CODE_POINTS:
        # From U+00A1 on and outside of the scripts that patterns list by range, so that only the category tells.
        if c >= 0xA1 and same_everywhere(c) and not 0x2E80 <= c <= 0xD7FF and c != 0x180E:
            stand_in.setdefault((category[c], utf8_length(c)), c)
    stand_in[("Cn", 3)], stand_in[("Cn", 4)] = 0xFFFF, 0x10FFFF  # never to be assigned
    differing = {c: stand_in[(category[c], utf8_length(c))] for c in CODE_POINTS if not same_everywhere(c)}
    # White space to PCRE2 (by \h) and not to Oniguruma.
    assert category[0x180E] == "Cf" and 0x180E not in set(members(r"\s"))
    differing[0x180E] = stand_in[("Cf", 3)]
    return ranges(differing)


def nfc_table():
    nfc, nfd = normalizers.NFC().normalize_str, normalizers.NFD().normalize_str
    unknown = set()
    for c in CODE_POINTS:
        ch = chr(c)
        if newest.combining(ch) and newest.normalize("NFD", ch) == ch:
            # U+0345 has the largest combining class, U+0334 the smallest: an unknown mark changes places with neither.
            tests = ("\u2603\u0345" + ch, "\u2603" + ch + "\u0334")
            if any(nfc(t) != newest.normalize("NFC", t) for t in tests):
                unknown.add(c)
        elif newest.normalize("NFD", ch) != nfd(ch):
            unknown |= {c, ord(newest.normalize("NFD", ch)[0]), int(newest.decomposition(ch).split()[0], 16)}
    return ranges(dict.fromkeys(unknown, 0))


def main():
    print("// Unicode data of tokenizers %s against versions %s and %s. Written by tools/golden/make_unicode_reference.py."
          % (tokenizers.__version__, oldest.unidata_version, newest.unidata_version))
    print("#pragma once\n\nnamespace distill {\n")
    print("struct StandIn {\n  char32_t first, last, stand_in;\n};")
    print("// Code points whose category differs, each with one of the same length in UTF-8 that has the reference's category.")
    print("inline constexpr StandIn category_stand_ins[] = {"
          + ", ".join("{0x%x, 0x%x, 0x%x}" % tuple(run) for run in category_table()) + "};\n")
    print("struct CodePointRange {\n  char32_t first, last;\n};")
    print("// Code points that take part in NFC elsewhere, but not in the reference.")
    print("inline constexpr CodePointRange unknown_to_nfc[] = {"
          + ", ".join("{0x%x, 0x%x}" % (first, last) for first, last, _ in nfc_table()) + "};\n")
    extra = {c: 0 for c in numeric() if oldest.category(chr(c))[0] != "N"}
    print("// What the Digits step takes for a number: members of a character class.")
    print('inline constexpr char numeric_class[] = R"(\\p{N}'
          + "".join(r"\x{%x}-\x{%x}" % (first, last) for first, last, _ in ranges(extra)) + ')";\n')
    print("}  // namespace distill")


sys.exit(main())
