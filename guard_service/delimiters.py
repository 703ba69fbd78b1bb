"""Delimiters of the templates in caller text: found in their disguises, defused by one space."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from functools import cache
from itertools import chain

# Blocks that hold compatibility variants of ASCII letters: fullwidth, mathematical, circled, ...
_STYLED = chain(
    range(0x00A0, 0x0250),
    range(0x02B0, 0x0300),
    range(0x1D00, 0x1DC0),
    range(0x2070, 0x2190),
    range(0x2460, 0x2500),
    range(0xFF00, 0xFFF0),
    range(0x1D400, 0x1D800),
    range(0x1F100, 0x1F1A0),
)
_HOMOGLYPHS = {  # Greek, Cyrillic, Cherokee, small capitals and the like
    "a": "АаΑαɑɒᴀᎪӐӑ",
    "b": "ВвΒβвЬЪʙᏴƄ",
    "c": "СсϹϲᴄᏟⅭⅽ",
    "d": "ԀԁᎠᴅⅮⅾɗđ",
    "e": "ЕеΕεЁёєᴇᎬҽ",
    "f": "ϜϝғꜰƒḟẝꞘꞙ",
    "g": "ԌɡɢᏀցǤǥƓɠ",
    "i": "ІіΙιЇїɩɪΪǀӀӏⅠⅰlL1|",
    "n": "ΝηпПɴᴨПոռ",
    "o": "ОоΟοᴏՕօ0ӦøØ",
    "r": "гГᴦʀᏒᖇɼɾ",
    "s": "ЅѕꜱᏚՏʂƽ",
    "t": "ТтΤτᴛᎢŧŦ",
    "u": "υսᴜՍ∪ʋԱцЦ",
    "v": "νѴѵᴠᏙⅤⅴ∨",
}
_LESS = "<＜﹤‹〈〈⟨❮❬ᐸ˂≺《«˱𐒮"
_COLON = ":：﹕︓꞉∶ː˸։׃܃܄᛬⁚"
_BREAKS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
# Invisible: controls, default-ignorable code points, combining marks.
_UNSEEN = (
    "\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u0300-\u036f\u061c\u115f\u1160\u17b4\u17b5"
    "\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u20d0-\u20f0\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)


@cache
def _pattern() -> re.Pattern[str]:
    """Match a delimiter up to its first letter's end; what follows is only looked at.

    Every quantifier is followed by a class it shares nothing with, and no run of white space is
    entered twice, so the search is linear in the text.
    """
    styled: dict[str, str] = defaultdict(str)
    for point in _STYLED:
        plain = unicodedata.normalize("NFKD", chr(point)).casefold().strip("()")
        styled["".join(c for c in plain if not unicodedata.combining(c))] += chr(point)
    gap = f"[{_UNSEEN}]*"
    blank = f"[\\s{_UNSEEN}]"
    same_line = f"[^\\S{_BREAKS}]"
    inline = f"(?:{same_line}|[{_UNSEEN}])*"

    def letter(char: str) -> str:
        return f"[{re.escape(char + char.upper() + styled[char] + _HOMOGLYPHS.get(char, ''))}]"

    def word(letters: str) -> str:
        return gap.join(letter(char) for char in letters) + gap

    def split(letters: str, then: str) -> str:
        return f"{letter(letters[0])}{gap}(?= *{word(letters[1:])}{then})"

    section = f"{blank}+(?:{word('conversation')}|{word('unsafe')})"
    marker = f"[{_LESS}]{blank}*(?:{split('begin', section)}|{split('end', section)})"
    colon = f"{inline}[{_COLON}]"
    labels = "|".join(split(name, colon) for name in ("user", "agent", "assistant"))
    return re.compile(f"{marker}|(?:\\A|[{_BREAKS}]){inline}(?:{labels})")


def breaks(text: str) -> list[int]:
    """Places in `text` (increasing) where one space defuses a delimiter of the templates.

    Delimiters are `<BEGIN` or `<END` before `CONVERSATION` or `UNSAFE`, and a line that begins
    with `User:`, `Agent:` or `Assistant:`, whatever their case, letter style, white space and
    invisible characters. The space goes behind the first letter: `<E ND CONVERSATION>`.
    """
    return [match.end() for match in _pattern().finditer(text)]


def neutralise(text: str, places: list[int]) -> str:
    """Insert one space at each of the places that `breaks` gave."""
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    return " ".join(pieces)


def restore(text: str) -> str:
    """Undo `neutralise` exactly, for any text it gave: a spelling with spaces got one more."""
    places = [at for at in breaks(text) if text[at : at + 1] == " "]
    starts = [0, *(at + 1 for at in places)]
    return "".join(text[a:b] for a, b in zip(starts, [*places, len(text)], strict=True))
