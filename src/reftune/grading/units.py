"""Decides whether the text after the number in a gold answer is a unit."""

from __future__ import annotations

import re

from reftune.grading.mathematics import FUNCTIONS
from reftune.grading.numbers import CURRENCY
from reftune.grading.words import GROUPS, MONTHS, ONE_TO_TWELVE, OTHER_MAGNITUDES, TENS, UNIT_NAMES

_SYMBOLS = frozenset(
    "m g s h l L J N V W A K C F nm mm cm dm km mg kg ng µg ms µs ns ml mL cl cL dl dL cc in ft"
    " yd lb lbs mi sec min mins hr hrs yr wk mo mph kph kmph kmh rpm bpm psi atm oz gal Hz kHz MHz"
    " GHz kW MW GW Wh kWh MWh cal kcal Mcal Pa kPa MPa eV keV MeV GeV kV mV kA mA kN kJ MJ mol rad"
    " deg pt px hp KB MB GB TB kB KiB MiB GiB TiB kms mms cms mtr mtrs mts mps kmps kgs mgs gm gms"
    " mls cft sft sqft secs yrs wks tbsp tsp pcs pts qts nos".split()
)
_NOT_UNITS = (FUNCTIONS - {"times"}) | frozenset(
    # operations and other words that change a number
    "and und oder plus minus modulo base choose squared cubed factorial"
    " over under above below remainder rem approx repeating recurring max maximum minimum nan"
    " approximately about roughly nearly almost ish fold ones hundreds thousands millions"
    " billions tau phi theta alpha beta lambda"
    # words that occur in sentences
    " are was then else because since for with versus not true false none null unknown permille"
    # directions and times
    " north south east west ago past bce oclock noon midnight uhr heures utc est edt cet ist"
    " monday tuesday wednesday thursday friday saturday sunday mon tue tues wed thu thurs fri sat"
    # months in German, French and Spanish
    " januar februar märz mai juni juli oktober dezember janvier février mars avril juin juillet"
    " août septembre octobre novembre décembre enero febrero marzo abril mayo junio julio agosto"
    " septiembre octubre noviembre diciembre".split()
)
_NOT_UNIT = re.compile(
    rf"(?i:{MONTHS})|{OTHER_MAGNITUDES}|{GROUPS}|{ONE_TO_TWELVE}|{TENS}|half|halves|(?:third|quarter"
    r"|\w+(?:teen|tie)th|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|hundred|thousand|million"
    r"|billion)th)s?"
)
_VARIABLES = re.compile(r"[a-z]{2}|[b-df-hj-np-tv-z]+|abc|xyz|uvw|(?P<attached>[a-z]{3})")
"""Matches letters that may be a product, as in 2ab, rather than a unit. These are any two letters,
any number of consonants, `abc`, `xyz` or `uvw`. Any other three letters match too, but they may be
a product only if no space separates them from the number."""
_KNOWN_WORD = re.compile(rf"{UNIT_NAMES}|units?|miles?|tons?")
_POWER = r"(?: ?\^ ?\{? ?-?[1-4] ?\}?|(?<=[a-z])[23](?!\d))?"
_UNIT = re.compile(
    rf"(?i:{CURRENCY})|N ?[-*]? ?m|degrees? ?(?:[CFK]|[Cc]elsius|[Ff]ahrenheit)"
    r"|(?P<prefix>(?:square|cubic|sq\.?|cu\.?|fluid|fl\.?|nautical) )?"
    rf"([^\W\d_]+){_POWER}(?: ?(?:/|\bper\b) ?([^\W\d_]+){_POWER})?"
    rf"|(?:/|per) ?([^\W\d_]{{2,}}){_POWER}"
)


def is_unit(rest: str) -> bool:
    """Whether the text after a number is empty or one unit, such as " km/h", " apples per day" or
    " (m^2)". A unit consists of symbols (km, kWh) or lower-case words. A single letter
    alone does not count as a unit, because "12 m" may be 12 times m."""
    unit = rest.strip()
    if unit[:1] == "(" and unit[-1:] == ")":
        unit = unit[1:-1].strip()
    found = _UNIT.fullmatch(unit)
    if found is None or (len(unit) == 1 and unit.isalpha()):
        return unit == ""
    is_area = found["prefix"] is not None or any(map(str.isdigit, unit))
    words = [word for word in found.groups()[1:] if word is not None]
    return all(
        word in _SYMBOLS or _KNOWN_WORD.fullmatch(word) or (not is_area and _is_noun(word, rest))
        for word in words
    )


def _is_noun(word: str, rest: str) -> bool:
    """Whether `word`, in the text `rest` after a number, seems to be a noun in lower case."""
    variables = _VARIABLES.fullmatch(word)
    if variables is not None and (variables["attached"] is None or rest.startswith(word)):
        return False
    return word.islower() and word not in _NOT_UNITS and _NOT_UNIT.fullmatch(word) is None
