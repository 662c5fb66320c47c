"""`phrases`: an endless English-German corpus of sentences around dates, amounts and names.

It needs no download, so the whole system can be tried at once. Sentences are frames of our own;
the values in them come from `phrase_values`.
"""

import re
from collections.abc import Iterator

import numpy as np

from automoe_jax.data import phrase_values
from automoe_jax.data.phrase_values import SPLITS, Pair

# Things that take place, cost, or are made: English, German with its nominative article.
EVENTS = (
    ("the meeting", "das Treffen"),
    ("the lecture", "der Vortrag"),
    ("the concert", "das Konzert"),
    ("the exam", "die Prüfung"),
    ("the wedding", "die Hochzeit"),
    ("the training", "die Schulung"),
    ("the trade fair", "die Messe"),
    ("the festival", "das Fest"),
    ("the race", "das Rennen"),
    ("the interview", "das Gespräch"),
    ("the flight", "der Flug"),
    ("the tour", "die Führung"),
    ("the lesson", "der Unterricht"),
    ("the premiere", "die Premiere"),
)
GOODS = (
    ("the ticket", "die Karte"),
    ("the bicycle", "das Fahrrad"),
    ("the house", "das Haus"),
    ("the book", "das Buch"),
    ("the repair", "die Reparatur"),
    ("the machine", "die Maschine"),
    ("the table", "der Tisch"),
    ("the insurance", "die Versicherung"),
    ("the room", "das Zimmer"),
    ("the painting", "das Gemälde"),
    ("the software", "die Software"),
    ("the heating", "die Heizung"),
)
PEOPLE = (
    ("she", "sie"),
    ("he", "er"),
    ("Anna", "Anna"),
    ("Peter", "Peter"),
    ("my sister", "meine Schwester"),
    ("my neighbour", "mein Nachbar"),
    ("our teacher", "unsere Lehrerin"),
    ("the director", "der Direktor"),
    ("the doctor", "die Ärztin"),
)
PLACES = (
    ("the city", "die Stadt"),
    ("the village", "das Dorf"),
    ("the company", "die Firma"),
    ("the school", "die Schule"),
    ("the library", "die Bibliothek"),
    ("the museum", "das Museum"),
    ("the hospital", "das Krankenhaus"),
    ("the port", "der Hafen"),
)
WORDS = {"event": EVENTS, "good": GOODS, "person": PEOPLE, "place": PLACES}

# (English, German). A slot is {kind} or, where a kind occurs twice, {kind:2}.
FRAMES: tuple[Pair, ...] = (
    ("{event} is on {full_date}.", "{event} ist am {full_date}."),
    ("{event} takes place on {full_date} at {time}.", "{event} findet am {full_date} um {time} statt."),
    ("{event} starts at {time}.", "{event} beginnt um {time}."),
    ("{event} ends at {time} on {weekday}.", "{event} endet am {weekday} um {time}."),
    ("{event} lasts {duration}.", "{event} dauert {duration}."),
    ("{event} was moved to {date}.", "{event} wurde auf den {date} verschoben."),
    ("{event} was cancelled {ago}.", "{event} wurde {ago} abgesagt."),
    ("When is {event}? On {full_date}.", "Wann ist {event}? Am {full_date}."),
    ("{event} begins on {weekday} at {time} and costs {money}.", "{event} beginnt am {weekday} um {time} und kostet {money}."),
    ("We expect {count} guests on {date}.", "Wir erwarten {count} Gäste am {date}."),
    ("{event} had {count} visitors in {month}.", "{event} hatte {count} Besucher im {month}."),
    ("{event} starts {later}.", "{event} beginnt {later}."),
    ("{good} costs {money}.", "{good} kostet {money}."),
    ("{good} costs {money} in {country}.", "{good} kostet {money} in {country}."),
    ("{good} cost {money} {ago} and now costs {money:2}.", "{good} kostete {ago} {money} und kostet jetzt {money:2}."),
    ("How much is {good}? {money}.", "Wie viel kostet {good}? {money}."),
    ("{person} paid {money} for it.", "{person} hat {money} dafür bezahlt."),
    ("{person} sold it for {money} on {date}.", "{person} hat es am {date} für {money} verkauft."),
    ("The price rose by {percent} to {money}.", "Der Preis stieg um {percent} auf {money}."),
    ("The rent fell by {percent} in {month}.", "Die Miete sank im {month} um {percent}."),
    ("{person} earns {money} a month.", "{person} verdient {money} im Monat."),
    ("The bill of {money} is due on {date}.", "Die Rechnung über {money} ist am {date} fällig."),
    ("{person} saved {money}, that is {percent}.", "{person} hat {money} gespart, das sind {percent}."),
    ("{person} will be back {later}.", "{person} ist {later} zurück."),
    ("{good} weighs {weight}.", "{good} wiegt {weight}."),
    ("{good} with {weight} was delivered on {date}.", "{good} mit {weight} wurde am {date} geliefert."),
    ("It is {measure}.", "Es sind {measure}."),
    ("We measured {measure} on {date}.", "Wir haben am {date} {measure} gemessen."),
    ("We need {measure} and {measure:2}.", "Wir brauchen {measure} und {measure:2}."),
    ("{place} used {measure} in {month}.", "{place} verbrauchte im {month} {measure}."),
    ("{person} was born on {date} in {country}.", "{person} wurde am {date} in {country} geboren."),
    ("{person} speaks {language} and {language:2}.", "{person} spricht {language} und {language:2}."),
    ("{person} has been learning {language} since {month}.", "{person} lernt seit {month} {language}."),
    ("{person} comes from {country} and speaks {language}.", "{person} kommt aus {country} und spricht {language}."),
    ("{person} travelled from {country} to {country:2} {ago}.", "{person} reiste {ago} von {country} nach {country:2}."),
    ("{person} flew to {country} on {full_date}.", "{person} flog am {full_date} nach {country}."),
    ("{person} left at {time} and arrived at {time:2}.", "{person} ging um {time} und kam um {time:2} an."),
    ("{person} called {ago}.", "{person} hat {ago} angerufen."),
    ("{person} answered at {time} on {date}.", "{person} antwortete am {date} um {time}."),
    ("{person} waited for {duration}.", "{person} wartete {duration}."),
    ("{person} needs {duration} for it.", "{person} braucht {duration} dafür."),
    ("{person} counted to {spelled}.", "{person} zählte bis {spelled}."),
    ("{person} wrote the number {spelled}.", "{person} schrieb die Zahl {spelled}."),
    ("The answer is {spelled}.", "Die Antwort ist {spelled}."),
    ("The number {number} is not {spelled}.", "Die Zahl {number} ist nicht {spelled}."),
    ("There are {spelled} chairs and {spelled:2} tables.", "Es gibt {spelled} Stühle und {spelled:2} Tische."),
    ("{place} has {spelled} rooms.", "{place} hat {spelled} Zimmer."),
    ("{place} has {count} members in {country}.", "{place} hat {count} Mitglieder in {country}."),
    ("{place} opens at {time}.", "{place} öffnet um {time}."),
    ("{place} is closed on {weekday} until {time}.", "{place} ist am {weekday} bis {time} geschlossen."),
    ("{place} was founded in {year}.", "{place} wurde {year} gegründet."),
    ("{place} was founded on {date}, {duration} too late.", "{place} wurde am {date} gegründet, {duration} zu spät."),
    ("{place} received {money} from {country}.", "{place} erhielt {money} aus {country}."),
    ("{place} grew by {percent} in {year}.", "{place} wuchs {year} um {percent}."),
    ("{place} is {distance} from here.", "{place} ist {distance} von hier entfernt."),
    ("In {country}, {percent} speak {language}.", "In {country} sprechen {percent} {language}."),
    ("In {country}, {count} people speak {language}.", "In {country} sprechen {count} Menschen {language}."),
    ("{language} is spoken in {country} and {country:2}.", "{language} wird in {country} und {country:2} gesprochen."),
    ("The text is in {language}, not in {language:2}.", "Der Text ist auf {language}, nicht auf {language:2}."),
    ("The book was translated into {language} in {year}.", "Das Buch wurde {year} ins {language} übersetzt."),
    ("The parcel from {country} arrived {ago}.", "Das Paket aus {country} kam {ago} an."),
    ("The train to {country} leaves at {time}.", "Der Zug nach {country} fährt um {time} ab."),
    ("The train to {country} leaves {later}.", "Der Zug nach {country} fährt {later} ab."),
    ("The train arrives at {time} and stops for {duration}.", "Der Zug kommt um {time} an und hält {duration}."),
    ("The results of {date} were {percent} better.", "Die Ergebnisse vom {date} waren um {percent} besser."),
    ("The value was {number} on {date} and {number:2} in {month}.", "Der Wert war {number} am {date} und {number:2} im {month}."),
    ("Please come on {weekday} at {time}.", "Bitte kommen Sie am {weekday} um {time}."),
    ("Please pay {money} by {full_date}.", "Bitte zahlen Sie {money} bis {full_date}."),
    ("The offer is valid until {date} or for {duration}.", "Das Angebot gilt bis {date} oder {duration}."),
    ("Today is {full_date}.", "Heute ist {full_date}."),
    ("It is {time} in {country}.", "Es ist {time} in {country}."),
    ("{count} of {count:2} agreed, that is {percent}.", "{count} von {count:2} stimmten zu, das sind {percent}."),
    ("We lost {measure}, that is {percent}.", "Wir haben {measure} verloren, das sind {percent}."),
)  # fmt: skip

_SLOT = re.compile(r"\{(\w+)(?::\d)?\}")


def pair(index: int, split: str, seed: int = 0) -> Pair:
    """Sentence pair `index` of a split: a pure function of its arguments, without end.

    Its values are of its own split, where values are held out. Where a frame has no such value,
    the whole sentence is: nothing of one split stands in another.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    frame = FRAMES[rng.integers(len(FRAMES))]
    kinds = [m.group(1) for m in _SLOT.finditer(frame[0])]
    held_out = any(phrase_values.is_held_out(kind) for kind in kinds if kind not in WORDS)
    while True:
        filled = _fill(frame, rng, split)
        if held_out or phrase_values.belongs(filled[0], split):
            return filled


def _fill(frame: Pair, rng: np.random.Generator, split: str) -> Pair:
    values: dict[str, Pair] = {}
    for slot in dict.fromkeys(m.group(0) for m in _SLOT.finditer(frame[0])):
        kind = slot.strip("{}").split(":")[0]
        if kind in WORDS:
            values[slot] = WORDS[kind][rng.integers(len(WORDS[kind]))]
        else:
            values[slot] = phrase_values.draw(kind, rng, split)
    filled = (
        _SLOT.sub(lambda m, side=side: values[m.group(0)][side], text)
        for side, text in enumerate(frame)
    )
    first, second = (text[0].upper() + text[1:] for text in filled)
    return first, second


def pairs(split: str, count: int, seed: int = 0) -> Iterator[Pair]:
    """The first `count` pairs of a split."""
    return (pair(i, split, seed) for i in range(count))
