"""Values with an English and a German form: Babel's CLDR data and spelled-out numbers.

A value that can be counted up without end (a date, an amount, a number) belongs to one of the
splits by a hash of its English form, so the test split holds values that training never saw.
Names (languages, countries, weekdays) are few and cannot be guessed: they occur in every split.
"""

import datetime
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from babel import Locale, dates, numbers, units
from num2words import num2words

Rng = np.random.Generator
Pair = tuple[str, str]

SPLITS = ("train", "valid", "test")
# Of 20 hash values, one goes to validation and two to the test.
_SHARE = {"valid": (0,), "test": (1, 2), "train": tuple(range(3, 20))}

LANGUAGES = """
    af am ar az be bg bn bs ca cs cy da de el en eo es et eu fa fi fil fr ga gl gu ha he hi hr
    hu hy id is it ja jv ka kk km kn ko ku ky la lb lo lt lv mg mi mk ml mn mr ms mt my nb ne
    nl pa pl ps pt ro ru sd si sk sl so sq sr sv sw ta te tg th tk tr uk ur uz vi xh yi yo zh
    zu
""".split()
# Countries whose German name takes no article, so that it stands anywhere in a sentence.
COUNTRIES = """
    AD AF AL AM AO AR AT AU AZ BA BB BD BE BF BG BH BI BJ BO BR BT BW BY BZ CA CL CM CN CO CR
    CU CY CZ DE DJ DK DZ EC EE EG ER ES ET FI FJ FR GA GD GE GH GM GN GQ GR GT GW GY HN HR HT
    HU ID IE IL IN IS IT JM JO JP KE KG KH KI KP KR KW KZ LA LI LK LR LS LT LU LV LY MA MC ME
    MG MK ML MM MR MT MU MW MX MY MZ NA NE NG NI NO NP NR NZ OM PA PE PG PK PL PT PW PY QA RO
    RS RU RW SA SE SG SI SL SM SN SO SR SV SY SZ TG TH TJ TL TM TN TO TT TV TZ UG UY UZ VE VN
    VU WS ZA ZM ZW
""".split()
CURRENCIES = """
    EUR USD GBP CHF JPY CAD AUD SEK NOK DKK PLN CZK INR CNY
""".split()
LENGTHS = ["length-kilometer", "length-meter", "length-mile"]
MASSES = ["mass-kilogram", "mass-gram", "mass-tonne"]
AMOUNTS = """
    length-centimeter volume-liter volume-milliliter area-square-meter area-hectare
    temperature-celsius power-kilowatt digital-gigabyte energy-kilowatt-hour mass-kilogram
    length-meter speed-kilometer-per-hour
""".split()
_EPOCH = datetime.date(1950, 1, 1)
_N_DAYS = (datetime.date(2050, 1, 1) - _EPOCH).days


def _plain(text: str) -> str:
    """CLDR's no-break spaces as ordinary ones: what a person types."""
    return text.replace("\u00a0", " ").replace("\u202f", " ")


def belongs(english: str, split: str) -> bool:
    """Whether a value with this English form is one of the split's."""
    return zlib.crc32(english.encode()) % 20 in _SHARE[split]


def _date(rng: Rng) -> datetime.date:
    return _EPOCH + datetime.timedelta(days=int(rng.integers(_N_DAYS)))


def _magnitude(rng: Rng, most_digits: int) -> int:
    """A positive number, each length equally likely."""
    low = 10 ** int(rng.integers(most_digits))
    return int(rng.integers(low, 10 * low))


def full_date(rng: Rng) -> Pair:
    day = _date(rng)
    return (
        dates.format_date(day, "EEEE, d MMMM y", locale="en"),
        dates.format_date(day, "full", locale="de"),
    )


def date(rng: Rng) -> Pair:
    day = _date(rng)
    english = "MMMM d, y" if rng.random() < 0.5 else "d MMMM y"
    return (
        dates.format_date(day, english, locale="en"),
        dates.format_date(day, "long", locale="de"),
    )


def month(rng: Rng) -> Pair:
    day = _date(rng)
    return tuple(dates.format_date(day, "MMMM y", locale=lang) for lang in ("en", "de"))  # type: ignore[return-value]


def time(rng: Rng) -> Pair:
    value = datetime.time(int(rng.integers(24)), int(rng.integers(60)))
    pattern = "h:mm a" if rng.random() < 0.5 else "HH:mm"
    return (
        _plain(dates.format_time(value, pattern, locale="en")),
        dates.format_time(value, "HH:mm", locale="de") + " Uhr",
    )


def number(rng: Rng) -> Pair:
    value = _magnitude(rng, 7)
    if rng.random() < 0.3:
        value = round(value / 100, 2)
    return tuple(_plain(numbers.format_decimal(value, locale=lang)) for lang in ("en", "de"))  # type: ignore[return-value]


def percent(rng: Rng) -> Pair:
    value = int(rng.integers(1, 1000)) / 1000
    return tuple(
        _plain(numbers.format_percent(value, "#,##0.#%" if lang == "en" else "#,##0.# %", lang))
        for lang in ("en", "de")
    )  # type: ignore[return-value]


def money(rng: Rng) -> Pair:
    value = _magnitude(rng, 6)
    value = value / 100 if rng.random() < 0.7 else value
    currency = CURRENCIES[rng.integers(len(CURRENCIES))]
    style = "name" if rng.random() < 0.5 else "standard"
    return tuple(
        _plain(numbers.format_currency(value, currency, locale=lang, format_type=style))
        for lang in ("en", "de")
    )  # type: ignore[return-value]


def count(rng: Rng) -> Pair:
    value = _magnitude(rng, 6) + 1
    return numbers.format_decimal(value, locale="en"), numbers.format_decimal(value, locale="de")


def _in_units(rng: Rng, choices: Sequence[str]) -> Pair:
    value: float = _magnitude(rng, 4) + 1
    if rng.random() < 0.3:
        value = value / 10
    unit = choices[int(rng.integers(len(choices)))]
    return tuple(
        _plain(units.format_unit(value, unit, length="long", locale=lang)) for lang in ("en", "de")
    )  # type: ignore[return-value]


def distance(rng: Rng) -> Pair:
    return _in_units(rng, LENGTHS)


def weight(rng: Rng) -> Pair:
    return _in_units(rng, MASSES)


def measure(rng: Rng) -> Pair:
    return _in_units(rng, AMOUNTS)


def duration(rng: Rng) -> Pair:
    options = (
        ("day", 60, "hour", 24),
        ("hour", 24, "minute", 60),
        ("minute", 60, "second", 60),
        ("year", 100, "month", 12),
    )
    large, most_large, small, most_small = options[rng.integers(len(options))]
    first, second = int(rng.integers(1, most_large)), int(rng.integers(1, most_small))

    def form(lang: str) -> str:
        word = " and " if lang == "en" else " und "
        return word.join(
            units.format_unit(n, f"duration-{unit}", length="long", locale=lang)
            for n, unit in ((first, large), (second, small))
        )

    return form("en"), form("de")


def _relative(rng: Rng, sign: int) -> Pair:
    unit, seconds = (
        ("minute", 60),
        ("hour", 3600),
        ("day", 86400),
        ("week", 7 * 86400),
        ("month", 30 * 86400),
        ("year", 365 * 86400),
    )[int(rng.integers(6))]
    delta = datetime.timedelta(seconds=sign * int(rng.integers(2, 60)) * seconds)
    return tuple(
        dates.format_timedelta(
            delta, cast(Any, unit), threshold=1e9, add_direction=True, locale=lang
        )
        for lang in ("en", "de")
    )  # type: ignore[return-value]


def ago(rng: Rng) -> Pair:
    return _relative(rng, -1)


def later(rng: Rng) -> Pair:
    return _relative(rng, 1)


def spelled(rng: Rng) -> Pair:
    value = int(rng.integers(2, 100)) if rng.random() < 0.4 else _magnitude(rng, 3) + 1
    return num2words(value, lang="en"), num2words(value, lang="de")


def year(rng: Rng) -> Pair:
    value = str(int(rng.integers(1500, 2100)))
    return value, value


def weekday(rng: Rng) -> Pair:
    day = int(rng.integers(7))
    return tuple(dates.get_day_names("wide", locale=lang)[day] for lang in ("en", "de"))  # type: ignore[return-value]


@functools.cache
def _names(kind: str, lang: str) -> dict[str, str]:
    return dict(getattr(Locale(lang), kind))


def language(rng: Rng) -> Pair:
    code = LANGUAGES[rng.integers(len(LANGUAGES))]
    return _names("languages", "en")[code], _names("languages", "de")[code]


def country(rng: Rng) -> Pair:
    code = COUNTRIES[rng.integers(len(COUNTRIES))]
    return _names("territories", "en")[code], _names("territories", "de")[code]


# Slot name -> (how to draw a value, whether values are held out).
KINDS: dict[str, tuple[Callable[[Rng], Pair], bool]] = {
    "full_date": (full_date, True),
    "date": (date, True),
    "month": (month, True),
    "time": (time, True),
    "number": (number, True),
    "percent": (percent, True),
    "money": (money, True),
    "count": (count, True),
    "distance": (distance, True),
    "weight": (weight, True),
    "measure": (measure, True),
    "duration": (duration, True),
    "ago": (ago, True),
    "later": (later, True),
    "spelled": (spelled, True),
    "year": (year, False),
    "weekday": (weekday, False),
    "language": (language, False),
    "country": (country, False),
}


def is_held_out(kind: str) -> bool:
    """Whether each split has values of its own."""
    return KINDS[kind][1]


def draw(kind: str, rng: Rng, split: str) -> Pair:
    """A value of a kind, one of the split's own where the kind is held out."""
    make, held_out = KINDS[kind]
    while True:
        pair = make(rng)
        if not held_out or belongs(pair[0], split):
            return pair
