"""Values with an English and a German form: Babel's CLDR data and spelled-out numbers.

A value from an unlimited range (a date, an amount, a number) belongs to one of the splits by a hash
of its English form, so the test split has values that training never saw. Names (languages,
countries, weekdays) are few and cannot be inferred: they occur in every split.
"""

import datetime
import functools
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from babel import Locale, dates, numbers, units
from num2words import num2words

Rng = np.random.Generator
Pair = tuple[str, str]

SPLITS = ("train", "valid", "test")
# Of 20 hash values, one goes to validation and two to the test.
_SHARE = {"valid": (0,), "test": (1, 2), "train": tuple(range(3, 20))}

# Codes and units by list name. The German names of the countries take no article, so that they fit
# anywhere in a sentence.
LISTS: dict[str, Any] = json.loads(Path(__file__).with_name("phrases.json").read_text("utf-8"))
_LOCALES = {lang: Locale(lang) for lang in ("en", "de")}
_EPOCH = datetime.date(1950, 1, 1)
_N_DAYS = (datetime.date(2050, 1, 1) - _EPOCH).days


def belongs(english: str, split: str) -> bool:
    """Whether a value with this English form is one of the split's."""
    return zlib.crc32(english.encode()) % 20 in _SHARE[split]


def _both(form: Callable[[str], str]) -> Pair:
    """A form in English and German, with CLDR's no-break spaces as ordinary ones."""
    english, german = (form(x).replace("\u00a0", " ").replace("\u202f", " ") for x in _LOCALES)
    return english, german


def _choose(rng: Rng, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]


def _magnitude(rng: Rng, max_digits: int) -> int:
    """A positive number, each number of digits equally likely."""
    low = 10 ** int(rng.integers(max_digits))
    return int(rng.integers(low, 10 * low))


def _date(rng: Rng, german: str, *english: str) -> Pair:
    """A date by a German and one of at most two English patterns."""
    day = _EPOCH + datetime.timedelta(days=int(rng.integers(_N_DAYS)))
    first = len(english) == 1 or rng.random() < 0.5
    patterns = {"en": english[0 if first else 1], "de": german}
    return _both(lambda lang: dates.format_date(day, patterns[lang], locale=_LOCALES[lang]))


def time(rng: Rng) -> Pair:
    value = datetime.time(int(rng.integers(24)), int(rng.integers(60)))
    patterns = {"en": "h:mm a" if rng.random() < 0.5 else "HH:mm", "de": "HH:mm 'Uhr'"}
    return _both(lambda lang: dates.format_time(value, patterns[lang], locale=_LOCALES[lang]))


def number(rng: Rng) -> Pair:
    value = _magnitude(rng, 7)
    value = round(value / 100, 2) if rng.random() < 0.3 else value
    return _both(lambda lang: numbers.format_decimal(value, locale=_LOCALES[lang]))


def percent(rng: Rng) -> Pair:
    value, patterns = int(rng.integers(1, 1000)) / 1000, {"en": "#,##0.#%", "de": "#,##0.# %"}
    return _both(lambda lang: numbers.format_percent(value, patterns[lang], _LOCALES[lang]))


def money(rng: Rng) -> Pair:
    value = _magnitude(rng, 6)
    value = value / 100 if rng.random() < 0.7 else value
    unit = _choose(rng, LISTS["currencies"])
    style = "name" if rng.random() < 0.5 else "standard"
    form = functools.partial(numbers.format_currency, value, unit, format_type=style)
    return _both(lambda lang: form(locale=_LOCALES[lang]))


def count(rng: Rng) -> Pair:
    value = _magnitude(rng, 6) + 1
    return _both(lambda lang: numbers.format_decimal(value, locale=_LOCALES[lang]))


def _quantity(rng: Rng, unit_list: str) -> Pair:
    value = _magnitude(rng, 4) + 1
    value = value / 10 if rng.random() < 0.3 else value
    unit = _choose(rng, LISTS[unit_list])
    return _both(lambda lang: units.format_unit(value, unit, length="long", locale=_LOCALES[lang]))


def duration(rng: Rng) -> Pair:
    large, max_large, small, max_small = _choose(rng, LISTS["durations"])
    parts = (int(rng.integers(1, max_large)), large), (int(rng.integers(1, max_small)), small)
    words = {"en": " and ", "de": " und "}

    def form(lang: str) -> str:
        locale = _LOCALES[lang]
        forms = (units.format_unit(n, f"duration-{x}", "long", locale=locale) for n, x in parts)
        return words[lang].join(forms)

    return _both(form)


def _relative(rng: Rng, sign: int) -> Pair:
    unit, minutes = _choose(rng, LISTS["units_of_time"])
    delta = sign * int(rng.integers(2, 60)) * datetime.timedelta(minutes=minutes)
    form = functools.partial(dates.format_timedelta, delta, unit, 1e9, add_direction=True)
    return _both(lambda lang: form(locale=_LOCALES[lang]))


def spelled(rng: Rng) -> Pair:
    value = int(rng.integers(2, 100)) if rng.random() < 0.4 else _magnitude(rng, 3) + 1
    return _both(lambda lang: num2words(value, lang=lang))


def year(rng: Rng) -> Pair:
    value = str(rng.integers(1500, 2100))
    return value, value


def weekday(rng: Rng) -> Pair:
    day = int(rng.integers(7))
    return _both(lambda lang: dates.get_day_names("wide", locale=_LOCALES[lang])[day])


def _name(rng: Rng, kind: str, codes: str) -> Pair:
    code = _choose(rng, LISTS[codes])
    return _both(lambda lang: getattr(_LOCALES[lang], kind)[code])


# Slot name -> (function that draws a value, whether each split has values of its own).
KINDS: dict[str, tuple[Callable[[Rng], Pair], bool]] = {
    "full_date": (lambda rng: _date(rng, "full", "EEEE, d MMMM y"), True),
    "date": (lambda rng: _date(rng, "long", "MMMM d, y", "d MMMM y"), True),
    "month": (lambda rng: _date(rng, "MMMM y", "MMMM y"), True),
    "time": (time, True),
    "number": (number, True),
    "percent": (percent, True),
    "money": (money, True),
    "count": (count, True),
    "distance": (lambda rng: _quantity(rng, "lengths"), True),
    "weight": (lambda rng: _quantity(rng, "masses"), True),
    "measure": (lambda rng: _quantity(rng, "amounts"), True),
    "duration": (duration, True),
    "ago": (lambda rng: _relative(rng, -1), True),
    "later": (lambda rng: _relative(rng, 1), True),
    "spelled": (spelled, True),
    "year": (year, False),
    "weekday": (weekday, False),
    "language": (lambda rng: _name(rng, "languages", "languages"), False),
    "country": (lambda rng: _name(rng, "territories", "countries"), False),
}


def draw(kind: str, rng: Rng, split: str) -> Pair:
    """A value of a kind, one of the split's own where the kind is held out."""
    make, held_out = KINDS[kind]
    while True:
        pair = make(rng)
        if not held_out or belongs(pair[0], split):
            return pair
