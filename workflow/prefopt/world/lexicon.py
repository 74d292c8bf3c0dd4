"""The words of the demo world, their classes, and its table of facts."""

from __future__ import annotations

END = "."

# topic: (things, doings)
TOPICS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "garden": (
        ("rose", "hedge", "bench", "spade", "fountain", "lawn", "tulip", "gate"),
        ("plant", "water", "trim", "admire"),
    ),
    "kitchen": (
        ("stove", "kettle", "spoon", "oven", "plate", "bowl", "table", "jar"),
        ("cook", "bake", "taste", "serve"),
    ),
    "river": (
        ("boat", "bridge", "bank", "stream", "ferry", "reed", "canoe", "paddle"),
        ("cross", "row", "follow", "reach"),
    ),
    "school": (
        ("book", "desk", "pencil", "lesson", "board", "class", "map", "ruler"),
        ("read", "study", "learn", "share"),
    ),
    "harbour": (
        ("ship", "sail", "anchor", "rope", "crane", "dock", "net", "mast"),
        ("load", "launch", "steer", "paint"),
    ),
    "forest": (
        ("path", "moss", "oak", "fern", "log", "trail", "pine", "branch"),
        ("explore", "climb", "gather", "enjoy"),
    ),
    "workshop": (
        ("hammer", "drill", "saw", "nail", "plank", "wheel", "screw", "engine"),
        ("build", "repair", "polish", "design"),
    ),
    "theatre": (
        ("stage", "curtain", "mask", "costume", "drum", "violin", "ticket", "song"),
        ("watch", "praise", "visit", "applaud"),
    ),
}

SEASONS: dict[str, tuple[str, ...]] = {
    "winter": ("snow", "ice", "frost"),
    "spring": ("blossom", "rain", "breeze"),
    "summer": ("sunshine", "heat", "thunder"),
    "autumn": ("fog", "wind", "mist"),
}

PEOPLE = ("child", "friend", "teacher", "guest", "neighbour", "sister", "brother", "doctor", "traveller", "farmer")

POSITIVE = (
    *("bright", "lovely", "calm", "fresh", "pleasant", "splendid", "gentle"),
    *("charming", "cheerful", "tidy", "warm", "clean", "sweet", "lively"),
)
NEGATIVE = (
    *("dull", "broken", "gloomy", "dirty", "ugly", "noisy", "rotten"),
    *("dreary", "harsh", "stale", "bitter", "messy", "rough", "crooked"),
)
NEUTRAL = ("old", "new", "tall", "round", "wooden", "quiet", "plain", "narrow")

# The facts: nearly every value belongs to two animals.
ATTRIBUTES = ("colour", "home", "food")
ANIMALS: dict[str, tuple[str, str, str]] = {
    "ant": ("black", "hill", "seeds"),
    "bee": ("yellow", "barn", "nectar"),
    "mouse": ("grey", "burrow", "nuts"),
    "frog": ("green", "pond", "insects"),
    "robin": ("red", "nest", "insects"),
    "squirrel": ("brown", "nest", "nuts"),
    "duck": ("yellow", "pond", "seeds"),
    "rabbit": ("grey", "burrow", "grass"),
    "cat": ("black", "barn", "meat"),
    "fox": ("red", "den", "meat"),
    "sheep": ("white", "hill", "grass"),
    "bear": ("brown", "den", "nectar"),
}
VALUES: dict[str, tuple[str, ...]] = {
    name: tuple(dict.fromkeys(row[column] for row in ANIMALS.values())) for column, name in enumerate(ATTRIBUTES)
}

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ADDENDS = NUMBERS[:5]

# Word class of every content word, written in capitals so that it can stand in a sentence pattern.
CLASS: dict[str, str] = {
    **{word: "THING" for things, _ in TOPICS.values() for word in things},
    **{word: "THING" for things in SEASONS.values() for word in things},
    **{word: "DO" for _, doings in TOPICS.values() for word in doings},
    **dict.fromkeys(TOPICS, "TOPIC"),
    **dict.fromkeys(SEASONS, "SEASON"),
    **dict.fromkeys(PEOPLE, "PERSON"),
    **dict.fromkeys((*POSITIVE, *NEGATIVE, *NEUTRAL), "LIKE"),
    **dict.fromkeys(ANIMALS, "ANIMAL"),
    **{value: name.upper() for name, values in VALUES.items() for value in values},
    **dict.fromkeys(NUMBERS, "NUMBER"),
}

# Sentences of open answers.
SEASON_OPENING = "in SEASON"
TOPIC_OPENING = "in the TOPIC"
PLAIN_SENTENCES = (
    "the THING is LIKE",
    "the THING near the THING is LIKE",
    "a PERSON can DO the THING",
    "we DO the LIKE THING",
    "a PERSON can DO the THING with the THING",
)
OPENED_SENTENCES = tuple(
    f"{opening} {rest}"
    for opening in (SEASON_OPENING, TOPIC_OPENING)
    for rest in ("the THING is LIKE", "a PERSON can DO the THING with the THING")
)

# Sentences of closed answers: one before, the answer itself, one after.
FACT_SENTENCES = {
    "colour": "the ANIMAL is COLOUR",
    "home": "the ANIMAL lives in a HOME",
    "food": "the ANIMAL eats FOOD",
}
SUM_SENTENCE = "NUMBER plus NUMBER is NUMBER"
PREFACES = {"fact": "you asked about the ANIMAL", "sum": "you asked about the sum"}
SURE = ("that is well known", "that is well known and easy to check")
UNSURE = ("that is a guess", "that is a guess and hard to check")

PATTERNS = frozenset(
    tuple(sentence.split())
    for sentence in (
        *PLAIN_SENTENCES,
        *OPENED_SENTENCES,
        *FACT_SENTENCES.values(),
        SUM_SENTENCE,
        *PREFACES.values(),
        *SURE,
        *UNSURE,
    )
)
