"""Finds the number that a line of a completion states.

The number is usually read from the part of the line after the last `=`, or from the whole line if
there is no `=`. If this part begins with a number, the words after the number decide whether it is
the answer or belongs to something larger, as in "5 or 6". If this part does not begin with a
number, its first sentence must contain only one number, and the words before the number must not
change its meaning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice

from reftune.grading.numbers import CURRENCY, Number, numeral_at, same_number
from reftune.grading.plain_text import Line, plain_lines
from reftune.grading.words import (
    DOUBT,
    IS_WRONG,
    MONTHS,
    ONE_TO_NINE,
    ONE_TO_TWELVE,
    OTHER_MAGNITUDES,
    SORRY,
    TENS,
    UNIT_NAMES,
)


def parse_number(text: str) -> Number | None:
    """The number that the first line of `text` states: at its start, after the last `=`, or as the
    only number in a sentence.

    Accepts, for example, thousands separators, exponents, `a/b`, `3 1/2`, `\\frac{a}{b}`, powers of
    ten, "2.5 million" and percentages. Ignores currencies, units, formatting, words like "about",
    and prose after the number. Returns None for anything else, such as "3 + 4", inequalities,
    ranges, "5 or 6", "5 feet 6 inches", lists, ratios, nan and inf.
    """
    lines = list(islice(plain_lines(text), 2))
    number = stated_number(lines[0].words) if lines else None
    is_one = number is None or len(lines) < 2 or not _is_listed_beside(number, *lines)
    return number if is_one else None


def _is_listed_beside(number: Number, first: Line, second: Line) -> bool:
    """Whether two lines state two different values, as items of a list or in equations."""
    if first.is_item and second.is_item:
        another = stated_number(second.words)
        return another is not None and another.value != number.value
    return len(set(_assigned_values(f"{first.words}; {second.words}"))) > 1


def stated_number(line: str) -> Number | None:
    """Like `parse_number`, but for a line that is already plain text."""
    answer = _after_equals(line)
    return _leading_number(answer) or _only_number(answer)


def _after_equals(line: str) -> str:
    """The part of a line that states the value. This is usually the text after the last `=` in the
    first sentence. It is the whole line if there is no `=`, or if the first `=` is in an aside
    after a number ("18, because 2 + 2 = 4", "12 when n = 3"). It is empty if the line states
    different values ("x = 3 or x = 4") or only a multiple of an unknown ("2x = 6")."""
    line = _LEADING_CONDITION.sub("", line)
    sentence = _SENTENCE_END.split(line, maxsplit=1)[0]
    equals = list(_EQUALS.finditer(sentence))
    if not equals:
        return line
    first, last = sentence[: equals[0].start()], sentence[equals[-1].end() :]
    aside = _ASIDE.search(sentence, 0, equals[0].end())
    if aside is not None:
        before = sentence[: aside.start()].rstrip()
        if _UNFINISHED.search(before) is None and _leading_number(before) is not None:
            return line  # 18, because 2 + 2 = 4
        if _CONDITION.match(sentence, aside.start()) and any(map(str.isdigit, before)):
            return before  # she gets 12 if n = 3
    aside = _LATER_ASIDE.search(sentence, equals[0].end())
    if aside is not None and not _DERIVES.search(sentence, aside.end()):
        # x = 12, because 12 + 3 = 15
        inner = [each for each in equals if each.end() <= aside.start()]
        value = sentence[inner[-1].end() : aside.start()].rstrip(" ,")
        is_short = len(value.split()) <= MOST_WORDS and ", " not in value
        if is_short and not _UNFINISHED.search(value) and _leading_number(value) is not None:
            equals, last = inner, value
    if len(set(_assigned_values(line))) > 1 and not _CONCLUDES.search(line):
        return ""  # x = 3 or x = 4
    other = _AND_UNKNOWN.search(first)
    if other is not None and _leading_number(first[: other.start()]) is not None:
        return ""  # 3 or x = 4
    if len(equals) == 1 and _MULTIPLE.fullmatch(first):
        return ""  # 2x = 6
    if len(equals) == 1 and _UNKNOWN.fullmatch(last) and _ARITHMETIC.fullmatch(first):
        return first  # 7 = x
    if _ARITHMETIC.fullmatch(last) and _leading_number(last) is None:
        return first if _leading_number(first) is not None else last  # 7 = 3 + 4
    return line[equals[-1].end() :]


_SENTENCE_END = re.compile(r"(?<!\brs)(?<!\brs )(?:[.?;]|!(?! ?=))(?= |$)", re.IGNORECASE)
"""Matches the end of a sentence, but not the point in "Rs. 5" or the factorial in "5! = 120"."""
_IF = r"(?:when|if|given(?: that)?|assuming|provided)"
_EQUALS = re.compile(r"(?<![<>!=])=+>?(?!=)|-+>")  # = == => ->
_LEADING_CONDITION = re.compile(  # when n = 3, 12
    rf"^(?:{_IF}|for|at) [^\W\d]{{1,3}} ?= ?-?[\d.,/]*\d(?: ?[,:]| then| it is| we get| we have)* ",
    re.IGNORECASE,
)
_REASON = r"because|since|as(?! ?=)"
_ASIDE = re.compile(  # because, at x =
    rf", |[(:;]|\b(?:{_REASON}|where|which|{_IF}|(?:with|at|for|in|on)(?= (?:[^\W\d]+ ?){{1,3}}=)"
    r"|(?:after|once|unless|under|using)(?= [^\W\d] ?=))\b",
    re.IGNORECASE,
)
MOST_WORDS = 4
"""Text between an `=` and an aside is read as the answer only if it has at most this many words."""
_LATER_ASIDE = re.compile(  # x = 12 (3 * 4 = 12), x = 12 if n = 3
    r" [(\[](?=[^()\[\]]*=[^()\[\]=]*[)\]][^=]*$)"
    rf"|\b(?:(?:{_REASON}|check)(?=[^()=]{{1,40}}=)"
    rf"|(?:{_IF}|where|with|at|for|in|on)(?= \d*[^\W\d] ?=))\b",
    re.IGNORECASE,
)
_CONDITION = re.compile(rf"{_IF} [^\W\d]{{1,3}} ?=", re.IGNORECASE)  # if n =
_UNFINISHED = re.compile(r" \+ |[-+*/^]$|\b(?:is|are|was|were|of|by)$", re.IGNORECASE)  # 3 +, 12 is
_CONCLUDES = re.compile(r"\b(?:so|thus|hence|therefore|then)\b|∴", re.IGNORECASE)
_DERIVES = re.compile(rf"{_CONCLUDES.pattern}|[=-] ?>", re.IGNORECASE)
_AND_UNKNOWN = re.compile(r"\b(?:or|and) [^\W\d]{1,3} ?$")  # or x
_MULTIPLE = re.compile(r"\W*-?(?!1[a-z])[\d.]*\d ?\*? ?[abckn-rt-z]\W*")  # 2x
_UNKNOWN = re.compile(r" ?[^\W\d]\W*")  # x
_ARITHMETIC = re.compile(r"[-+*/^(). \d$]*\d[-+*/^(). \d$]*")  # 3 + 4


def _assigned_values(line: str) -> Iterator[Fraction | None]:
    """The values assigned in text such as "x = 3, y = 4"; None for a value that is not a
    number."""
    for clause in re.split(r" or | and |[,;] ?", re.split(r"[.!?] ", line, maxsplit=1)[0]):
        clause = _LATER_ASIDE.split(clause, maxsplit=1)[0].rstrip(" .")
        assignment = re.fullmatch(r" *[^\W\d]+\d{0,2} ?=([^=]+)", clause)
        if assignment is not None:
            number = _leading_number(assignment[1])
            yield None if number is None else number.value


def _leading_number(line: str) -> Number | None:
    """The number at the start of a line of plain text; None if there is no number, or if the text
    after the number makes it part of something larger, such as a range."""
    line = _IN_ANGLES.sub(r"\1\2", line, count=1)  # "<203>" is an answer, but "< 203" is not
    lead = _LEAD_IN.match(line)
    assert lead is not None  # pattern matches the empty string
    found = numeral_at(line, lead.end())
    if found is None or (lead[0][-1:] in ("(", "[") and _POINT.match(line, lead.end())):
        return None  # no number, or (2,251,252), [2, \infty)
    number, rest = found[0], line[found[1] :]
    return None if _is_part_of_more(rest) and not _restates(number, rest) else number


_LEAD_IN = re.compile(
    r"(?:[ *_`\"'(\[{:,=#—•]|\b(?:about|approximately|approx|around|roughly|nearly|exactly|equal to"
    r"|equals?|is|a total of|only|just|simply|now|then|thus|therefore|hence|so|also|again|indeed"
    r"|actually)\b\.?)*",
    re.IGNORECASE,
)
_POINT = re.compile(
    r"[-\d. ]+,(?:[^a-zA-Z()\[\]\\]|\\?(?:infty|inf|pi|frac|sqrt)\b|\\(?![a-zA-Z]))+[)\]]"
)
_IN_ANGLES = re.compile(rf"^({_LEAD_IN.pattern})<([^ <>][^<>]*)>(?!\d)", re.IGNORECASE)


def _only_number(line: str) -> Number | None:
    """The only number in the first sentence of a line of plain text, as in "each child gets 12
    sweets". Returns None if the sentence has no number or more than one, or if the words before the
    number may change its meaning, as in "at least 12"."""
    sentence = _SENTENCE_END.split(line, maxsplit=1)[0].lstrip(" :,*\"'")
    digit = _DIGIT.search(sentence)
    if digit is None:
        return None
    words, found = sentence[: digit.start()], numeral_at(sentence, digit.start())
    if not digit[0].lstrip("-.")[0].isdigit():
        words = words.removesuffix("of ")  # a profit of $5
    if found is None or not _PLAIN_WORDS.fullmatch(words) or _NOT_ABOUT.search(words):
        return None
    rest = sentence[found[1] :]
    is_alone = not _is_part_of_more(rest) and not any(map(str.isdigit, rest))
    return found[0] if is_alone and "=" not in rest else None


_DIGIT = re.compile(rf"(?:(?<!\w)-)?(?:(?<![^\W_]){CURRENCY} ?)?\.?\d", re.IGNORECASE)
_PLAIN_WORDS = re.compile(r"[^\W\d_](?:[^\W\d_]|[ ,:'\"](?!:)|-(?=[^\W\d_]))*")
_NOT_ABOUT = re.compile(
    r"\b(?:not?|never|none|neither|nor|cannot|without|except|but|instead|wrong|incorrect|unless|if"
    r"|when|or|either|between|within|than|more|less|fewer|greater|larger|smaller|over|under|above"
    r"|below|exceeds?|least|most|up|from|minimum|maximum|half|third|quarter|twice|double|triple"
    rf"|thrice|dozens?|{ONE_TO_TWELVE}|\w+teen|{TENS}|hundred|thousand|squared?|cubed?|roots?|power"
    r"|times|(?:product|sum|difference|quotient|reciprocal|inverse|opposite)(?= of)|plus|minus"
    r"|divided|multiplied|log|ln|sin|cos|tan|base|mod|modulo|remainder|negative|absolute|steps?"
    r"|equations?|eq|section|lines?|part|case|example|figure|table|problem|question|exercise"
    r"|theorem|lemma|method"
    r"|nicht|kein\w*|mindestens|höchstens|zwischen|al menos|entre|au moins|至少|最多|不是"
    rf"|options?|choices?|(?<!total )of(?=\W*$)|(?-i:[b-zB-Z])(?= *$)|(?-i:{MONTHS}))\b|n't\b",
    re.IGNORECASE,
)


# --- the text after a number ----------------------------------------------------------------------


_LOOKAHEAD_CHARS = 120


def _is_part_of_more(rest: str) -> bool:
    """Whether the number before `rest` is only a part of something longer, such as "5 or 6". This
    depends on what kinds of words and symbols `rest` starts with (see `_KINDS`)."""
    shape = _KIND.sub(lambda match: _LETTERS[match.lastindex or 0], rest[:_LOOKAHEAD_CHARS])
    return (
        _CONTINUES.match(shape) is not None
        or _CONTINUES_IN_WORDS.match(rest, 0, _LOOKAHEAD_CHARS) is not None
    )


_COUNT = rf"(?:{ONE_TO_TWELVE}|[a-z]{{3,5}}teen|{TENS})"
_THIRDS = "third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth"
_PART = rf"(?:half|quarter|{_THIRDS})"
_FUNCTION = r"(?:pi|sqrt|log|ln|(?:arc)?(?:sin|cos|tan)h?(?= ?[(\d\\]| [a-zθ]\b)|exp(?= ?\())"
_UNITS = rf"{UNIT_NAMES}|[hs]|k?g|m?l|[kcdm]?m(?:[23]| [23](?=\W*$))?|(?:ft|in|yd|mi)[23]"
_KINDS = {
    "9": r"\d+",
    "r": r"\b(?:remainder\b|rem\.?(?= ?\d)|r(?= ?\d))",
    # a letter right after the number, a function or constant, odds, a part: 5a, 2π, in 4 cases
    "π": r"\A(?-i:a|[DEGHIOPQRSUXYZ])\b|\be ?\^|[π√∞±‰\\]|\+/-"
    r"|\bin \d+ (?:chance|times|cases|tries|odds)\b"
    rf"|\b(?:{_FUNCTION}|squared|cubed|factorial|point(?= \d)|to the power|half|quarter"
    rf"|and {_PART}|(?:and )?(?:an?|{ONE_TO_NINE})[ -]{_PART}s?"
    rf"|halves|(?:{_THIRDS}|thousandth)s|repeating|recurring|{OTHER_MAGNITUDES})\b"
    r"|兆(?![瓦赫帕])",
    # a bound: or more, at least
    "b": r"\b(?:(?:or|and) (?:more|less|fewer|greater|higher|lower|larger|smaller|above|below|over"
    r"|under|up|upwards|beyond|older|younger|longer|later|earlier)|at (?:most|least)|minimum"
    r"|maximum)\b",
    "m": rf"\b(?-i:{MONTHS})\b",
    # an operation, except a plus sign
    "+": r"[-*/|—]|\b(?:(?:less|more|fewer|greater|larger|smaller|higher|lower) than(?= ?\d)"
    r"|plus|minus|times|multiplied by|divided by|mod|modulo)\b"
    r"|\((?=mod\b)",
    "p": r"\+",
    # an alternative, an addition, a range
    "o": r"\b(?:or|und|oder|ou|o(?= ?\d)|maybe|perhaps|possibly|otherwise|unless|although)\b",
    "a": r"\b(?:(?:could|might|may) be|as well as|also|then)\b",
    "t": r"\b(?:vs\.|(?:to|through|bis|and|et|versus|vs|until|hasta|à|a(?= ?\d))\b)|&",
    # a ratio
    "d": r"\b(?:by|choose|over|per)\b",
    "i": r"\bin\b",
    "u": rf"\b(?:{_UNITS})\b",
    # an unknown
    "x": r"\b(?-i:i(?! ?\. ?e)|[xyznbjqrtuvw])\b",
    "<": r"[<>≤≥≠]",
    "(": r"[\[({$€£]",
    # any other word
    "w": r"[^\W\d_]+",
}
"""Letter → pattern of a kind of words or symbols after a number. In `_CONTINUES`, the letter stands
for any word or symbol of this kind. If a word matches several kinds, the first of them applies. A
symbol that matches no kind stands for itself."""
_KIND = re.compile("|".join(f"({pattern})" for pattern in _KINDS.values()), re.IGNORECASE)
_LETTERS = ("", *_KINDS)
_CONTINUES = re.compile(
    r"[)\]}'\"]*(?:[.,:]9"  # 1.2.3, 1,0000, 5:30
    r"| ?\.{2,3} ?9"  # 5..6
    r"| ?[:;?] ?9"  # 3 : 4, 5;6, 5? 6
    r"| ?9|w_?9|\(9| \(9[.9]*\)"  # 5 6, 0x10, 5(6), 5 (6)
    r"|!? ?[+p^]+ ?[(+p]* ?[9xπ]|p"  # 3 + 4, 2**3, 5 - x, 5! + 3, 7+
    r"|(?: ?[uw]){1,2} ?[+p] ?[(+p]* ?9"  # 3 apples + 4 apples
    r"| ?π| ?x| ?<"  # 2π, 5x, 5 < x
    r"|(?: ?[uw.,;?(]){0,3} ?o(?: ?[ow]){0,2} ?[(+p]*9"  # 5 or 6, 5 apples or perhaps 6
    r"|(?: ?[uw]){0,2}[ +]?t[ (+p]*9"  # 5 to 6, 5-to-6, 5 apples and 6 oranges
    r"|(?: ?[tuw,]){0,3} ?a ?[(+p]*9"  # 5, but it could be 6
    r"|(?: ?[uw.,(]){0,3} ?b"  # 7 or more, 7 apples at least
    r"|(?: ?[atuw.,(]){0,4} ?r"  # 5 remainder 2
    r"|w?(?: ?w)? ?m"  # 5 March, 5th of March
    r"| ?i ?9\W*$| ?d ?9"  # 1 in 4, 5 by 6
    r"| ?, ?[(+p]*9[.9+]* ?(?:$|[,.)ot\]}])"  # 5, 6
    r"| ?u[., t]*9)"  # 5 feet 6 inches
)
"""Matches a sequence of the letters in `_KINDS` if words and symbols of these kinds make the number
before them part of something larger, such as a range."""
_NOUN = r"(?: (?!(?:for|by|in|of|because|with|from|at|as|so|since|not|but|or)\b)[^\W\d_]+)?"
_SO = r"(?:so|which means)(?: [^\W\d]+){0,3}"
_CONTINUES_IN_WORDS = re.compile(
    # 7 hundred fifty, 7 weeks and two days; 7 years and a half; 3 sixteenths; 12 plus
    rf"{_NOUN} (?:(?:and|plus) )?{_COUNT}(?:[ -](?:hundred|{_COUNT}))?(?: (?:{_UNITS}))?"
    r"(?= ?(?:$|[.,;:!?)]))"
    rf"|{_NOUN} and (?:an? )?(?:half|quarter)\b| plus(?= ?(?:$|[.,]))"
    r"| ?-?(?:elevenths?|twelfths?|[a-z]{3,5}teenths?|[a-z]{3,6}tieths?|(?:mill|bill)ionths?)\b"
    # n = 3 gives 12; 5 if x > 0 and 6 otherwise
    r"| (?:gives|yields) (?:us )?[-$(]*\d"
    r"|[^.;]{0,80}\bif\b[^.;]{0,80}\b(?:otherwise|else)\b"
    # 5 if even, 6 if odd; 5 unless n = 2, then 6
    r"| (?:if|when|unless)\b[^.;]{1,40}[,;] (?:and |but )?"
    r"(?:(?:else|otherwise|then) [-$]?\d|[-$]?\d[\d.,]* (?:if|when|unless|otherwise)\b)"
    # 5(x + 1), 5 [x^2 + 1], 5/(a + 1), 5 - a, 5 + C, 5/k, 5^k; 5, \sqrt{6}
    r"|\((?-i:[a-z]) ?[-+]| ?/? ?[(\[](?-i:[a-z])(?:\^?\d)? ?[-+] ?(?:\d|[a-z]\b)[^()=]*[)\]]"
    r"|(?: ?[-+*^] ?(?-i:[a-z])| ?\+ ?[A-Z]|/(?-i:[a-cknp-rt-z]))(?= ?(?:$|[-+*/^=)]))"
    r"| ?, ?[-(]*(?:\\(?:sqrt|[dt]?frac|pi|infty)|[√π∞])"
    # 5 degrees below zero
    r"|(?: degrees(?: [CF]\b)?)? below (?:zero|freezing)\b"
    # 4.8, rounded to 5; 4.8, which means 5 buses; 4.8, so we need 5
    r"|,? (?:which |that )?(?:is )?round(?:s|ed|ing)?(?: up| down| off)? to \d+\b"
    r"(?! ?(?:d\.?p|dec|pl|s\.?f|sig))"
    rf"|(?: [^\W\d]+){{0,2}}, {_SO} \d[\d,]*(?: [^\W\d]+){{0,4}}[.!]?$"
    # 5? No, 6; 5, no wait, it is 6; 5; alternatively 6; 5. Hmm, no, 6
    rf"|(?:[^\w+*/^=-]{{1,6}}| --? )(?:{DOUBT}[,.!]* ){{0,3}}{SORRY}\b"
    r"(?:,? (?:no|wait|sorry)\b)*[,.:! ]+"
    r"(?:(?:it|that|this)(?: is|'s) |it should be |make (?:it|that) )?[-$(]*\d"
    # 5? No; 5 is wrong; 5. Wait, that's not right
    r"| ?\? ?(?:no|nope|wrong)\b(?= ?(?:$|[.,;!]))"
    rf"|[^\w+*/^=-]{{1,6}}(?:{DOUBT}[,.!]* ){{0,3}}{IS_WRONG}"
    # 5 apples; 6 pears; 5 boys, and 6 girls; 5 (and 6); 5 (Tom), 6 (Jane); 5 for Tom, 6 for Jane
    rf"|{_NOUN} ?\(and \d[\d.,]*{_NOUN}\)"
    rf"|(?:{_NOUN} ?[,;&]| ?\([^()\d]*\) ?[,;&]) ?(?:and )?\d[\d.,]*"
    r"(?: (?!each\b)[^\W\d_]+| ?\([^()]*\))? ?(?:$|[.;,]|and\b)"
    r"| (?P<each>for|in) [^\W\d]+, (?:and )?\d[\d.,]* (?P=each)\b",
    re.IGNORECASE,
)


def _restates(number: Number, rest: str) -> bool:
    """Whether the text after a number repeats the number in another spelling: "12.5%, or 1/8"."""
    found = _RESTATED.match(rest, 0, _LOOKAHEAD_CHARS)
    again = None if found is None else numeral_at(rest, found.end())
    if again is None or _is_part_of_more(rest[again[1] :]):
        return False
    return same_number(number, again[0]) or same_number(again[0], number)


_RESTATED = re.compile(
    r"[)\]}'\"]*(?: ?[^\W\d]+){0,2}?[ ,;]*"
    rf"(?:\(? ?(?:or|and|i\.? ?e\.?|that is|which is|equivalently|{_SO})\b[ ,:]*|\()",
    re.IGNORECASE,
)
