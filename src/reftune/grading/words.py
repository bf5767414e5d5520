"""Decides whether two answers written in words are the same, and whether a text states the gold
answer."""

from __future__ import annotations

import contextlib
import datetime
import re
import unicodedata
from itertools import product
from typing import Literal

from reftune.grading.plain_text import MAX_SEGMENT_CHARS, plain, without_gaps

ONE_TO_NINE = "one|two|three|four|five|six|seven|eight|nine"
ONE_TO_TWELVE = f"{ONE_TO_NINE}|ten|eleven|twelve"
TENS = "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
MONTHS = (
    r"(?:January|February|March|April|May|June|July|August|September|October|November|December"
    r"|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)"
)
UNIT_NAMES = (
    r"dollars?|cents?|hours?|hrs?|minutes?|mins?|seconds?|feet|foot|ft|inch(?:es)?|yards?|pounds?"
    r"|lbs?|ounces?|years?|months?|weeks?|days?|(?:kilo|centi|milli)?met(?:er|re)s?|(?:kilo)?grams?"
    r"|gallons?|degrees?"
)
OTHER_MAGNITUDES = (
    r"quintillions?|grand|thou|mil|mila|mille|mill(?:ón|ones|ionen|iards?|iarden?|iardi)|milioni"
    r"|milh(?:ão|ões)|mio|mrd|tausend|hundert|dutzend"
)
"""Matches words for magnitudes that are not supported. A number before such a word is not read as
the answer."""
GROUPS = "dozens?|doz|gross|score|tens"
"""Matches words that count in groups: 12 dozen may be 12 or 144."""
DOUBT = r"(?:oh|hmm+|oops|wait|no|but|well|actually|sorry)"
SORRY = (
    r"(?:no|wait|sorry|actually|correction|alternatively|(?:or )?rather|i mean|oops|hmm+|wrong"
    r"|not quite|scratch that|on second thoughts?)"
)
IS_WRONG = (
    r"(?:(?:(?:that|this|it|which) )?(?:is|was|would be|seems|looks)|(?:that|it)'s)"
    r" (?:not (?:right|correct|true|quite right)|wrong|incorrect|false|a mistake|mistaken)"
    r"(?= ?(?:$|[.,;:!?)]))"
)
TAKEN_BACK = re.compile(
    rf"\W*(?:{DOUBT}[,.!]* ){{0,3}}"
    rf"(?:{SORRY}\b\s*(?:[,.:;!)—–]|(?:wait|no)\b)|(?:i mean|actually|or rather)\b|{IS_WRONG})",
    re.IGNORECASE,
)
"""Matches phrases that withdraw an answer, such as "No, …", "Hmm, …" and "That is wrong"."""

MAX_SHORT_WORDS, MAX_SHORT_CHARS = 6, 60
"""In a completion, other text may follow the gold answer on the same line only if the gold answer
has at most this many words and characters."""

_ARTICLE = re.compile(r"\bthe\s+|\ban?\s+(?=\w)")
_BOUNDARY = re.compile(r"[.,;:!](?=\s|$)|\s*[—–]\s*|\s-{1,2}\s|\s*\(|\s+because\b")
_ANOTHER = re.compile(
    r"[\s,;:—–-]*(?:or|and|but|however|maybe|perhaps|possibly|alternatively|also|as well as"
    r"|sometimes|it depends)\b"
)
_OR_ELSE = re.compile(r"\W*(?:or|maybe|perhaps|possibly|alternatively)\b")
_NAME = r"[^\W\d_a-z][\w'’.-]*"
_NAMES = re.compile(rf"\s*{_NAME}(?:[ ,;/&]+(?:and )?{_NAME})*\s*")
"""Matches text that consists of names. If the gold answer is a name, names that follow it may be
further answers: "Paris, London"."""
_LISTS = (",", ";", "-", "--", "–", "—")
_OPPOSITE = {"yes": "no", "no": "yes", "true": "false", "false": "true"}
_TIME = re.compile(r"(?<=\d)(?::00)?([ap])\.?m\b")  # 7:00p.m
_RATIO = re.compile(r"(?<=\d)to(?=\d)")  # 3to2
_VULGAR = re.compile(r"(?<=\d)(?=[¼-¾⅐-⅞])")  # between 3 and ½: NFKC would turn 3½ into 31/2
_RAISED = re.compile(r"(?<=\d)(?=[⁻⁰¹²³⁴-⁹])")  # between 2 and ³
_NOT_IN_DATES = re.compile(r"(?<=\d)(?:st|nd|rd|th)\b|\b(?:of|the)\b|[.,]|[ t]00:00(?::00)?$")
_DATES = ("%d %B %Y", "%d %b %Y", "%B %d %Y", "%b %d %Y", "%Y-%m-%d")


def same_words(first: str, second: str) -> bool:
    """Whether two strings are the same apart from Unicode normalisation, case, articles, spacing,
    formatting and final punctuation. Two spellings of one date, such as "5 May 2020" and
    "2020-05-05", are the same too; dates such as "5/5/2020" are not recognised as dates."""
    bare = bare_words(first)
    if not bare or bare == bare_words(second):
        return bare != ""
    date = _date(first)
    return date is not None and date == _date(second)


def bare_words(text: str) -> str:
    """The normalised spelling in which `same_words` compares strings."""
    apart = _RAISED.sub("^", _VULGAR.sub(" ", text[:MAX_SEGMENT_CHARS]))
    folded = plain(unicodedata.normalize("NFKC", apart)).casefold()
    folded = unicodedata.normalize("NFKC", folded)
    less = _ARTICLE.sub("", " ".join(folded.split()))
    bare = without_gaps(less or folded).rstrip(".,;:!?")
    return _RATIO.sub(":", _TIME.sub(r"\1m", bare))


def states_words(text: str, gold: str) -> Literal["yes", "no", "unclear"]:
    """Whether a text states the gold answer. It does if the whole text or its first line is the
    gold answer. A short gold answer may be followed by punctuation or a reason ("Yes, they do.").
    If the line then withdraws the answer or adds another ("Yes and no"), the result is
    `unclear`."""
    answer = text.strip()
    first_line = answer.partition("\n")[0]
    if same_words(answer, gold) or same_words(first_line, gold):
        return "yes"
    if len(gold.split()) > MAX_SHORT_WORDS or len(gold) > MAX_SHORT_CHARS:
        return "no"
    line = first_line[:MAX_SEGMENT_CHARS]
    for boundary in [*_BOUNDARY.finditer(line)][:8]:
        if same_words(line[: boundary.start()], gold):
            sign, rest = boundary[0].strip(), line[boundary.end() :]
            is_name = line[:1].isupper() and gold.strip().casefold() not in _OPPOSITE
            if is_name and sign in _LISTS and _NAMES.fullmatch(rest.rstrip(".!")):
                return "unclear"
            return _goes_on(sign, rest.casefold(), gold)
    head = re.split(r"\s+(?:or|and|but)\b", line, maxsplit=1, flags=re.IGNORECASE)[0]
    return "unclear" if head != line and same_words(head, gold) else "no"


def _goes_on(boundary: str, rest: str, gold: str) -> Literal["yes", "no", "unclear"]:
    """The result of `states_words` if the text's first line begins with the gold answer, then
    `boundary` (a punctuation mark or word), then `rest`."""
    first_word, said = next(iter(re.findall(r"\w+", rest)), ""), gold.strip().casefold()
    if first_word == _OPPOSITE.get(said):
        return "unclear"
    if first_word != said and (TAKEN_BACK.match(rest) or _OR_ELSE.match(rest)):
        return "unclear"
    if boundary in (".", "!", "because"):
        return "yes"
    sentence = re.split(r"[.;!](?:\s|$)", rest, maxsplit=1)[0]
    if _ANOTHER.match(sentence) or re.search(r"\bor\b", sentence):
        return "unclear"
    return "no" if gold[-1:].isdigit() and first_word.isdigit() else "yes"


def _date(text: str) -> datetime.date | None:
    if len(text) > MAX_SHORT_CHARS:
        return None
    line = _NOT_IN_DATES.sub(" ", " ".join(plain(text).casefold().split()).rstrip(".,;:!?"))
    words = " ".join(line.replace("sept ", "sep ").split())
    for form, year in product(_DATES, ("", " 9996")):  # "January 1" has no year
        with contextlib.suppress(ValueError):
            return datetime.datetime.strptime(words + year, form).date()
    return None
