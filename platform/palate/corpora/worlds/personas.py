"""A synthetic text corpus of writers whose style is known, to see whether what was learned is the person.

Every person has hidden traits and writes short reviews of products, places and events from given facts. *Family* traits
(layout with its punctuation, case, abbreviations) come in four fixed combinations: there is something to cluster.
*Personal* traits (opening, hedge, adjective, connector, order, numbers, sign-off, emoticon) are drawn independently of
the family, so within a cluster only something that knows the person can get them right. Facts are drawn afresh for
every text, and what the questions are about occurs in no history. A text shows every trait of its writer, so each can
be read back from a generated text (``observed_traits``). Everything is a function of the seed.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from palate import artifacts
from palate.artifacts import Artifact
from palate.config import scale
from palate.corpora.schema import ITEMS, QUESTIONS, TEXT_CORPUS, Task
from palate.corpora.streams import CorpusError

NONE = "none"

# layout, case, abbreviations. A layout holds its own punctuation.
FAMILIES = (
    ("sentences", "sentence", "long"),
    ("notes", "lower", "short"),
    ("exclaiming", "sentence", "short"),
    ("trailing", "lower", "long"),
)
LAYOUTS = {
    "sentences": "{opening}, {hedge} the {thing} is {adjective}. It {facts}. {days} {with} it. {sign_off}.",
    "notes": "{opening} - {hedge} {adjective} {thing} - {facts} - {days} {with} it - {sign_off}",
    "exclaiming": "{opening}! {hedge} {adjective} {thing}! It {facts}! {days} {with} it! {sign_off}!",
    "trailing": "{opening}... {hedge} the {thing} is {adjective}... {facts}... {days} {with} it... {sign_off}...",
}
WITH = {"long": "with", "short": "w/"}

OPENINGS = ("honestly", "well", "so", "okay", "right", "listen")
HEDGES = (NONE, "I think", "maybe", "I guess")
ADJECTIVES = ("great", "lovely", "solid", "superb", "decent", "brilliant", "neat", "charming")
CONNECTORS = ("but", "though", "yet", "however")
ORDERS = ("praise first", "blame first")
NUMBERS = ("digits", "words")
SIGN_OFFS = ("cheers", "take care", "peace", "thanks", "bye now", "love")
EMOTICONS = (NONE, ":)", ";)", "<3", "^^")
NUMBER_WORDS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")

# What is reviewed: things, what is good about them, what is bad. Every phrase fits after "it".
SUBJECTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "product": (
        (
            "kettle", "toaster", "blender", "lamp", "desk", "chair", "keyboard", "mouse", "speaker", "headset",
            "camera", "tripod", "backpack", "umbrella", "jacket", "raincoat", "tent", "stove", "heater", "fan",
            "vacuum", "iron", "drill", "saw", "ladder", "hose", "mower", "bicycle", "helmet", "scooter", "watch",
            "phone", "charger", "tablet", "printer", "router", "monitor", "pillow", "blanket", "mattress", "sofa",
            "shelf", "mirror", "clock", "radio", "teapot", "frying pan", "knife", "grill", "cooler", "thermos",
            "suitcase", "wallet", "razor",
        ),
        (
            "works fast", "saves power", "looks modern", "feels sturdy", "cleans up well", "fits anywhere",
            "starts at once", "packs small", "holds its shape", "runs quietly", "comes fully built", "costs little",
            "lasts for hours", "warms up quickly", "weighs nothing", "stays cool", "folds flat", "needs no manual",
        ),
        (
            "leaks a bit", "smells of plastic", "scratches easily", "wobbles", "rattles at night", "breaks too soon",
            "arrived late", "gets too hot", "has a short cord", "needs odd screws", "beeps all day", "rusts in rain",
            "takes up space", "lacks a cover", "came without parts", "slips on tiles", "fades in the sun", "hums",
        ),
    ),
    "place": (
        (
            "bakery", "library", "museum", "hotel", "hostel", "harbor", "market", "zoo", "park", "garden", "theater",
            "castle", "gym", "pool", "beach", "campsite", "airport", "station", "pharmacy", "bookshop", "diner",
            "pizzeria", "tea house", "barber", "gallery", "stadium", "aquarium", "farm", "chapel", "brewery",
        ),
        (
            "opens early", "has kind staff", "feels calm", "smells of bread", "stays clean", "offers free maps",
            "sits by the river", "welcomes dogs", "serves hot soup", "has wide windows", "plays soft music",
            "gives discounts", "has plenty of seats", "stays open late", "looks well kept", "hides a nice yard",
        ),
        (
            "closes at noon", "lacks parking", "gets crowded", "charges for water", "has steep stairs", "feels cold",
            "needs fresh paint", "plays loud music", "hides its prices", "has long lines", "turns dark early",
            "takes only cash", "has slow doors", "lacks signs", "smells damp", "shuts on Sundays",
        ),
    ),
    "event": (
        (
            "concert", "festival", "marathon", "workshop", "lecture", "parade", "wedding", "reunion", "exhibition",
            "flea market", "auction", "picnic", "quiz night", "chess cup", "book launch", "film night", "dance class",
            "cooking class", "open day", "hackathon", "boat race", "food fair", "poetry slam", "science fair",
        ),
        (
            "starts on time", "draws a fun crowd", "has fair prices", "feels well planned", "ends with a toast",
            "lets kids join", "shows new talent", "serves good snacks", "keeps a good pace", "teaches a lot",
            "has friendly hosts", "runs like clockwork", "brings people together", "rewards everyone",
        ),
        (
            "runs too long", "lacks shade", "sells out early", "needs more chairs", "starts too late", "gets muddy",
            "has weak sound", "drags at the end", "repeats itself", "hands out no water", "fills the street",
            "has poor lights", "skips the best part", "costs too much",
        ),
    ),
}  # fmt: skip
HELD_OUT_SHARE = 0.25  # of the things of each kind: only questions are about them

INSTRUCTION = "Write a short review of the following {kind}: {source}"


@dataclass(frozen=True)
class Persona:
    """One writer's traits; every value is one of the options above, ``family`` is an index into ``FAMILIES``."""

    family: int
    layout: str
    case: str
    abbreviations: str
    opening: str
    hedge: str
    adjective: str
    connector: str
    order: str
    numbers: str
    sign_off: str
    emoticon: str


FAMILY_TRAITS = ("layout", "case", "abbreviations")
PERSONAL_TRAITS = ("opening", "hedge", "adjective", "connector", "order", "numbers", "sign_off", "emoticon")
TRAITS = FAMILY_TRAITS + PERSONAL_TRAITS


@dataclass(frozen=True)
class Facts:
    """What a review is about."""

    kind: str
    thing: str
    good: str
    bad: str
    days: int

    @property
    def source(self) -> str:
        return f"{self.thing}; good: {self.good}; bad: {self.bad}; days: {self.days}"


@dataclass(frozen=True, kw_only=True)
class PersonasConfig:
    """Synthetic writers with known style traits."""

    out: str = scale()  # folder or URL of the corpus
    people: int = 300  # writers
    items: int = 12  # history texts a person
    questions: int = 4  # questions a person, about things that no history mentions
    seed: int = 0  # everything is a function of it
    fresh: bool = scale(False)  # discard what is at --out, finished or not


def prepare(config: PersonasConfig) -> Artifact:
    """The corpus at ``config.out``, with ``traits.parquet`` (user_id and the fields of ``Persona``) beside it.

    Raises:
        CorpusError: there are no people, or no texts, to make.
    """
    if config.people < 1 or config.items < 0 or config.questions < 0:
        raise CorpusError(f"--people {config.people} --items {config.items} --questions {config.questions}: too few")

    def produce(writer: artifacts.Writer) -> None:
        personas, items, questions = make(config.people, config.items, config.questions, config.seed)
        truth = [{"user_id": user, **asdict(persona)} for user, persona in personas.items()]
        for path, table in [
            ("items/part-00000.parquet", pa.Table.from_pylist(items, schema=ITEMS)),
            ("questions/part-00000.parquet", pa.Table.from_pylist(questions, schema=QUESTIONS)),
            ("traits.parquet", pa.Table.from_pylist(truth)),
        ]:
            (writer.folder / path).parent.mkdir(exist_ok=True)
            pq.write_table(table, writer.folder / path, compression="zstd")
        task = Task("personas", "text", title_template='"{output}" is the review of "{source}"')
        report = {"users": len(personas), "items": len(items), "questions": len(questions), "quarantined": 0}
        writer.write_json("task.json", asdict(task))
        writer.write_json("report.json", report)
        (writer.folder / "quarantine.jsonl").touch()
        writer.summary.update(report)

    return artifacts.ensure(config.out, produce, kind=TEXT_CORPUS, config=config, fresh=config.fresh)


def read_personas(corpus: Artifact) -> dict[str, Persona]:
    """The truth about every person of a personas corpus, by user id."""
    rows = pq.read_table(corpus.local("traits.parquet")).to_pylist()
    return {row.pop("user_id"): Persona(**row) for row in rows}


def make(people: int, items: int, questions: int, seed: int) -> tuple[dict[str, Persona], list[dict], list[dict]]:
    """Personas by user id, and the rows of ``ITEMS`` and of ``QUESTIONS``."""
    random = np.random.default_rng(seed)
    shown, held_out = _split_things(random)
    known, asked = _facts(shown, random), _facts(held_out, random)
    personas, item_rows, question_rows = {}, [], []
    for number in range(people):
        user = f"persona-{number:04d}"
        personas[user] = persona = draw_persona(number % len(FAMILIES), random)
        item_ids = []
        for order in range(items):
            item_ids.append(f"{user}/{order:03d}")
            row = _row(user, persona, next(known))
            item_rows.append({**row, "item_id": item_ids[-1], "order": order})
        for order in range(questions):
            row = _row(user, persona, next(asked))
            question_rows.append({**row, "question_id": f"{user}/question-{order:03d}", "profile": item_ids})
    return personas, item_rows, question_rows


def draw_persona(family: int, random: np.random.Generator) -> Persona:
    """A writer of the family with independent, uniform personal traits."""
    layout, case, abbreviations = FAMILIES[family]
    options = (OPENINGS, HEDGES, ADJECTIVES, CONNECTORS, ORDERS, NUMBERS, SIGN_OFFS, EMOTICONS)
    personal = (str(random.choice(values)) for values in options)
    return Persona(family, layout, case, abbreviations, *personal)


def write_review(persona: Persona, facts: Facts) -> str:
    """The review that this person writes about these facts."""
    pair = (facts.good, facts.bad) if persona.order == "praise first" else (facts.bad, facts.good)
    count = str(facts.days) if persona.numbers == "digits" else NUMBER_WORDS[facts.days - 2]
    text = LAYOUTS[persona.layout].format(
        opening=persona.opening,
        hedge="" if persona.hedge == NONE else persona.hedge,
        thing=facts.thing,
        adjective=persona.adjective,
        facts=f" {persona.connector} ".join(pair),
        days=f"{count} days",
        sign_off=persona.sign_off,
        **{"with": WITH[persona.abbreviations]},
    )
    text = " ".join(text.split())
    if persona.case == "lower":
        text = text.lower()
    else:
        text = re.sub(r"(^|[.!] )(\w)", lambda match: match.group(1) + match.group(2).upper(), text)
    return text if persona.emoticon == NONE else f"{text} {persona.emoticon}"


def observed_traits(text: str, source: str | None = None) -> dict[str, str | None]:
    """The traits that a text shows; None where it shows none of the options, or where ``source`` is needed to tell.

    Args:
        source: the facts that the text is about (an item's or question's ``source``); "order" is known only with it.
    """
    lower = text.lower()
    words = set(re.findall(r"[a-z]+", lower))
    emoticon = next((face for face in EMOTICONS[1:] if face in text), NONE)
    return {
        "layout": _layout(text),
        "case": None if not words else "lower" if not re.search(r"[A-Z]", text) else "sentence",
        "abbreviations": "short" if "w/" in lower else "long" if "with" in words else None,
        "opening": next((opening for opening in OPENINGS if re.match(rf"\W*{opening}\b", lower)), None),
        "hedge": next((hedge for hedge in HEDGES[1:] if re.search(rf"\b{hedge.lower()}\b", lower)), NONE),
        "adjective": next((adjective for adjective in ADJECTIVES if adjective in words), None),
        "connector": next((connector for connector in CONNECTORS if connector in words), None),
        "order": _order(lower, source),
        "numbers": "digits" if re.search(r"\b\d+ day", lower) else "words" if words & set(NUMBER_WORDS) else None,
        "sign_off": next((end for end in SIGN_OFFS if re.search(rf"\b{end}\W*$", lower.removesuffix("<3"))), None),
        "emoticon": emoticon,
    }


def trait_scores(text: str, traits: Persona | Mapping[str, str], source: str | None = None) -> dict[str, bool]:
    """For each trait, whether the text shows the person's value; "order" only where ``source`` is given."""
    truth = asdict(traits) if isinstance(traits, Persona) else traits
    observed = observed_traits(text, source)
    return {name: observed[name] == truth[name] for name in TRAITS if name != "order" or source is not None}


def trait_accuracy(scores: Sequence[Mapping[str, bool]], names: Sequence[str] = PERSONAL_TRAITS) -> float:
    """The share of right traits over texts, each text and trait alike; by default of the personal traits."""
    values = [score[name] for score in scores for name in names if name in score]
    return float(np.mean(values)) if values else float("nan")


def _layout(text: str) -> str | None:
    marks = {"trailing": text.count("..."), "exclaiming": text.count("!"), "notes": text.count(" - ")}
    best = max(marks, key=lambda name: marks[name])
    if marks[best]:
        return best
    return "sentences" if "." in text else None


def _order(lower: str, source: str | None) -> str | None:
    found = re.search(r"good: (.*?); bad: (.*?)(?:;|$)", (source or "").lower())
    if found is None:
        return None
    good, bad = (lower.find(phrase) for phrase in found.groups())
    if good < 0 or bad < 0:
        return None
    return "praise first" if good < bad else "blame first"


def _split_things(random: np.random.Generator) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The things of each kind that histories are about, and those that questions are about."""
    shown, held_out = {}, {}
    for kind, (things, _, _) in SUBJECTS.items():
        order = [str(thing) for thing in random.permutation(things)]
        cut = round(HELD_OUT_SHARE * len(order))
        held_out[kind], shown[kind] = order[:cut], order[cut:]
    return shown, held_out


def _facts(things: Mapping[str, Sequence[str]], random: np.random.Generator) -> Iterator[Facts]:
    """Endless facts without repetition, until every combination was used."""
    everything = [(kind, thing) for kind in things for thing in things[kind]]
    seen: set[Facts] = set()
    limit = sum(len(things[kind]) * len(good) * len(bad) for kind, (_, good, bad) in SUBJECTS.items())
    while True:
        kind, thing = everything[random.integers(len(everything))]
        _, good, bad = SUBJECTS[kind]
        facts = Facts(
            kind,
            thing,
            str(random.choice(good)),
            str(random.choice(bad)),
            int(random.integers(2, 2 + len(NUMBER_WORDS))),
        )
        if facts not in seen:
            seen.add(facts)
            yield facts
        elif len(seen) > limit * len(NUMBER_WORDS) // 2:
            raise CorpusError(f"more than {len(seen)} texts: lower --people, --items or --questions")


def _row(user: str, persona: Persona, facts: Facts) -> dict:
    return {
        "user_id": user,
        "source": facts.source,
        "input": INSTRUCTION.format(kind=facts.kind, source=facts.source),
        "output": write_review(persona, facts),
        "date": None,
    }


assert {field.name for field in fields(Persona)} == {"family", *TRAITS}
