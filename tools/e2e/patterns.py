"""What a text states: per slot, the values its words express, whatever the sheet says.

Values are short marks, not the sheet's own words: a price is `low`, `mid`, `high` or one of the numbers `<20`,
`20-25`, `>30`. A mark with a `~` is a weak hint ("near the centre", "wine"): it can express the sheet's value and never
contradicts it. Which marks fit which value of a sheet is decided in `facts.py`. The phrases come from reading the
demonstrations of the training split.
"""

import functools
import re
import unicodedata

from tools.e2e.sheets import known_places

_NUMBER_WORDS = {
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "twenty": "20",
    "thirty": "30",
}
_LOW = r"low|lower|lowest|poor|poorly|bad|badly|negative|terrible|horrible|awful|unfavou?rable|not good|not great|worst|weak"
_MID = r"average|averagely|mediocre|okay|ok|decent|decently|moderate|moderately|medium|middle|mid|fair|fairly|mixed|satisfactory|so so|standard|reasonable|adequate|not bad|acceptable"
_HIGH = r"high|highly|higher|highest|top|excellent|great|good|best|well|outstanding|superb|perfect|positive|favou?rable|exceptional|fantastic|amazing|wonderful|strong|rave"
_LEVELS = {"low": _LOW, "mid": _MID, "high": _HIGH}
_PRICE = r"prices?|priced|pricing|costs?|costing|cost|range|ranged|ranges|budget|bracket|pricewise|bill"
_RATING = (
    r"rat(?:ed|es?|ings?)|reviews?|reviewed|ranked|rankings?|ranks?|scored?|scores|satisfaction|feedback|stars?|recommended|regarded"
    r"|acclaimed|reputation|customers?"
)


def _any(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns))


def _attached(level: str, noun: str, other: str) -> re.Pattern[str]:
    """`high (customer) rating`, `rating is (very) high`: level and noun in one clause with nothing of its kind between."""
    gap = rf"(?:(?!(?:{_LOW}|{_MID}|{_HIGH}|{other}|but|yet|however|{noun})\b)[\w']+ ){{0,3}}"
    linked = rf"(?:(?!(?:{_LOW}|{_MID}|{_HIGH}|{other}|but|yet|however|and|with)\b)[\w'~]+ ){{0,4}}"
    joined = rf"(?:(?:and|to|or) (?:{_LOW}|{_MID}|{_HIGH}) )?"
    return re.compile(
        rf"\b(?:{level}) {joined}{gap}(?:{noun})\b|\b(?:{noun}) {linked}(?:{level})\b(?! (?:customer )?(?:{other})\b)"
    )


_PRICE_LEVELS = {mark: _attached(level, _PRICE, _RATING) for mark, level in _LEVELS.items()}
_RATING_LEVELS = {mark: _attached(level, _RATING, _PRICE) for mark, level in _LEVELS.items()}

_PRICE_NUMBERS = {
    "20-25": re.compile(r"£?20 ?(?:£ ?)?(?:-|to|and|or) ?(?:£ ?)?25"),
    "<20": _any(
        r"(?:less|lower|cheaper|fewer|no more|not more|lesser) (?:than|then) (?:[a-z]+ ){0,2}£?20",
        r"(?:under|below|beneath|within|up to|at most|maximum of|sub|max|less) (?:[a-z]+ )?£?20",
        r"£?20 (?:pounds )?(?:or (?:less|under|below|lower)|and (?:under|below|less))",
        r"< ?£?20",
    ),
    ">30": _any(
        r"(?:more|higher|greater|no less) (?:than|then) (?:[a-z]+ ){0,3}£?30",
        r"(?:over|above|upwards? of|at least|exceed\w*|starting (?:at|from)|minimum of|past|beyond|plus|from|about) (?:[a-z]+ )?£?30",
        r"£?30 ?(?:\+|pounds and|and (?:over|up|above|higher|more)|or (?:more|above|over|higher)|plus|upwards?)",
        r"> ?£?30",
    ),
}
_PRICE_WORDS = {
    "low": _any(
        r"\b(?:cheap\w*|inexpensive\w*|affordabl[ey]|low ?cost|budget|bargain|economical|reasonabl[ey] cheap)\b",
        r"\bnot (?:too |very |that )?(?:expensive|pricey)\b",
    ),
    "mid": _any(
        r"\bmoderate(?:ly)?\b(?! (?:customer )?(?:rat|review|star))",
        r"\bmid ?(?:range|priced?)\b",
        r"\breasonabl[ey]\b(?! rat)",
        r"\bfairly priced\b",
    ),
    "high": _any(
        r"(?<!not )(?<!too )\b(?:expensive|expensively|pricey|pricy|costly|high end|upscale|dear|luxur\w+|overpriced)\b",
        r"\bnot (?:too |very |that )?cheap\b",
    ),
}
_RATING_NUMBERS = re.compile(
    r"\b([0-5]) ?(?:out of|of|/) ?5\b|\b([0-5])(?: (?!and|or)[a-z]+)? ?stars?\b|\brat(?:ed|ing) (?:[a-z]+ ){0,3}([0-5])\b(?! ?-)|\bout of ([135]) of 5"
)
_RATING_WORDS = {
    "low": _any(
        r"\b(?:poorly|badly) (?:rated|reviewed)\b", r"\blow quality\b", r"\bnot (?:\w+ ){0,2}(?:highly|well) \w+"
    ),
    "mid": _any(r"\baverage\b", r"\bmediocre\b"),
    "high": _any(
        r"\b(?:top|highly|well|best) (?:rated|reviewed|ranked|regarded|recommended|praised|rating)\b",
        r"\bhigh quality\b",
        r"\bpopular\b",
        r"\bexcellent\b",
        r"\brated highly\b",
        r"\brate\w* it high\w*",
    ),
}
_FOOD = {
    "Japanese": _any(r"\bjapan\w*\b", r"\bsushi\b"),
    "Italian": _any(r"\bital\w+\b", r"\bpastas?\b", r"\bpizzas?\b", r"\bspaghetti\b"),
    "Fast food": _any(
        r"\bfast ?-?(?:\w+ )?foods?\b",
        r"\bburgers?\b",
        r"\bfries\b",
        r"\bhamburgers?\b",
        r"\bjunk food\b",
        r"\btake ?(?:away|out)\b",
    ),
    "French": _any(r"\bfrench\b(?! fries)", r"\bfrance\b"),
    "Indian": _any(r"\bindian?s?\b", r"\bcurr(?:y|ies)\b"),
    "English": _any(r"\benglish\b", r"\bbritish\b", r"\bfish (?:and|&|n) chips\b", r"\bengland\b"),
    "Chinese": _any(r"\bchin\w+\b", r"\bdim sum\b"),
    "other": _any(
        r"\b(?:mexican|thai|spanish|korean|greek|turkish|vietnamese|german|vegetarian|vegan|seafood|steak\w*)\b"
    ),
    "~Fast food": _any(r"\bamerican\b", r"\bsnacks?\b", r"\bquick\b"),
    "~French": _any(r"\bwines?\b", r"\bcheeses?\b"),
    "~English": _any(r"\bbreakfasts?\b", r"\btraditional\b", r"\bnative\b", r"\blocal\b", r"\buk\b"),
    "~Chinese": _any(r"\bnoodles?\b", r"\basian\b", r"\brice\b"),
    "~Japanese": _any(r"\basian\b", r"\boriental\b"),
}
_EAT_TYPE = {
    "pub": _any(r"\bpubs?\b"),
    "coffee shop": _any(r"\bcoffee ?-?(?:shop|house|bar|place|ship|store|shoppe|cafe)s?\b"),
    "restaurant": _any(r"\brest[ae]?ur?[ae]?nts?\b", r"\brestau\w+\b"),
    "~pub": _any(r"\bbars?\b", r"\btaverns?\b", r"\binn\b"),
    "~coffee shop": _any(r"\bcafes?\b", r"\bcoffees?\b"),
    "~restaurant": _any(r"\b(?:diner|eatery|bistro|dining|eateries|establishment|place|food)\b"),
}
_CENTRE = r"(?:(?:city|town|cities) ?-?(?:cent(?:re|er)s?)|cent(?:re|er) of (?:the )?(?:\w+ )?(?:city|town|cambridge))"
_AREA_BESIDE = re.compile(
    rf"\b(?:near|nearby|outside|north|south|east|west|past|close to|beyond|from|next to|by|off|out of|around|away)(?: of| to| by)?(?: the| a)? {_CENTRE}"
)
_AREA = {
    "city centre": _any(
        _CENTRE,
        r"\bdown ?town\b",
        r"\bheart of (?:the )?(?:city|town)\b",
        r"\bcentral(?:ly)?\b",
        r"\binner city\b",
        r"\bcity area\b",
        r"\bmiddle of (?:the )?(?:city|town)\b",
        r"\bcent(?:re|er) city\b",
        r"\bcent(?:re|er)\b",
    ),
    "riverside": _any(r"\briver ?-?(?:side|bank|front|view)?s?\b", r"\brive?r?side\b", r"\bwater ?front\b"),
    "~city centre": _any(r"\bin (?:the )?(?:city|town)\b", r"\bcity\b"),
    "~riverside": _any(r"\bwater\b"),
}
_CHILD = (
    r"(?:famil(?:y|ies|iy|ily|ys)|kids?|child(?:ren|rens|s)?|children's|childs|toddlers?|youngsters?|babies|minors)"
)
_NOT = r"(?:not|never|no|non|nor|n't|cannot|without|isnt|arent|doesnt|dont|cant|lacks?|lacking|unsuitable|inappropriate|discourag\w+|unfriendly|prohibit\w*|avoid|exclud\w+|neither|unwelcom\w+|un|adverse|barred|banned|rather than|instead of|anything but|too \w+ for|leave|hardly|isn't|against|forbid\w*|unsuited|ill suited|far from|less than)"
_BRIDGE = r"(?:(?!(?:but|yet|however|although|though)\b)[\w']+ ){0,4}"
_FAMILY_NO = _any(
    rf"\b{_NOT} {_BRIDGE}{_CHILD}\b",
    rf"(?<=n't ){_BRIDGE}{_CHILD}\b",
    rf"\b{_CHILD} (?:(?!(?:but|yet|however|although|though|and|with)\b)[\w']+ ){{0,4}}?(?:not|n't|never|no|unfriendly|unfriendl\w+|prohibited|forbidden|banned|unwelcome\w*|discouraged|free)\b",
    rf"\b{_CHILD} free\b",
    rf"\b{_CHILD} un\w+",
    r"\badults?\b",
    r"\b(?:over|above) (?:the age of )?1[68]\b",
    r"\b18 ?\+",
    r"\bgrown ?ups?\b",
    r"\bmature\b",
)
_FAMILY_ANY = re.compile(rf"\b{_CHILD}\b|\ball ages\b|\b(?:everyone|anyone)\b")
_STATED_NO = "no"


def plain(text: str) -> str:
    """Lower case without accents, digits for number words, single spaces, punctuation kept as its own token."""
    text = unicodedata.normalize("NFKD", text.lower())
    text = "".join(char for char in text if not unicodedata.combining(char))
    text = text.replace("’", "'").replace(" 't", "'t").replace(" n't", "n't").replace("n't", " n't")
    text = re.sub(r"(?<=\d)\s*[-–—]\s*(?=[£\d])", "#", text)
    text = re.sub(r"[-–—]", " ", text).replace("#", "-")
    text = re.sub(r"£\s+|(?:gbp|pounds?|[€$])\s*(?=\d)", "£", text)
    text = re.sub(r"([.,;:!?()])(?!\d)", r" \1 ", text)
    text = re.sub(r"\b(" + "|".join(_NUMBER_WORDS) + r")\b", lambda match: _NUMBER_WORDS[match[1]], text)
    return re.sub(r"\s+", " ", text).strip() + " "


def _place_pattern(place: str) -> str:
    """A place's name with or without `the`, the last of three or more words left out or not, plurals forgiven."""
    words = [re.escape(word) for word in plain(place).split() if word != "the"]
    pattern = " ".join(words[:-1] + [words[-1] + "s?"])
    if len(words) >= 3 and words[-2] not in {"of", "bar"}:
        pattern = " ".join(words[:-1]) + f"(?: {words[-1]}s?)?"
    return pattern.replace("crowne", "crowne?").replace("travellers", "travell?er'?s").replace("browns", "brown'?s")


@functools.cache
def _places() -> tuple[re.Pattern[str], dict[str, str]]:
    """One pattern for all places, longest first, and the place each of its groups stands for."""
    ordered = sorted(known_places(), key=len, reverse=True)
    groups = {f"p{i}": place for i, place in enumerate(ordered)}
    named = "|".join(f"(?P<{group}>{_place_pattern(place)})" for group, place in groups.items())
    return re.compile(rf"\b(?:the )?(?:{named})(?: 's|'s)?\b"), groups


def _matching(patterns: dict[str, re.Pattern[str]], text: str) -> set[str]:
    return {mark for mark, pattern in patterns.items() if pattern.search(text)}


def _price(text: str) -> set[str]:
    numbers = _matching(_PRICE_NUMBERS, text)
    return numbers | _matching(_PRICE_WORDS, text) | _matching(_PRICE_LEVELS, text)


def _rating(text: str) -> set[str]:
    marks = {f"{next(filter(None, found))}/5" for found in _RATING_NUMBERS.findall(text)}
    marks |= _matching(_RATING_LEVELS, text)
    marks |= {f"~{mark}" for mark in _matching(_RATING_WORDS, text) - marks}
    return marks


def _area(text: str) -> set[str]:
    inside = _AREA_BESIDE.sub(" ", text)
    marks = _matching(_AREA, inside)
    return marks | {"~city centre"} if inside != text else marks


def _family(text: str) -> set[str]:
    rest, negated = _FAMILY_NO.subn(" ", text)
    return ({"no"} if negated else set()) | ({"yes"} if _FAMILY_ANY.search(rest) else set())


@functools.lru_cache(maxsize=65_536)
def stated(text: str) -> dict[str, frozenset[str]]:
    """Slot -> the marks of the values the text states; `name` holds every known place it names.

    A mark with a leading `~` is weak: see the module's docstring.
    """
    clean = plain(text)
    pattern, groups = _places()
    named = frozenset(groups[match.lastgroup] for match in pattern.finditer(clean) if match.lastgroup)
    rest = pattern.sub(" @ ", clean)
    found = {
        "eat type": _matching(_EAT_TYPE, rest),
        "food": _matching(_FOOD, rest),
        "price range": _price(rest),
        "customer rating": _rating(rest),
        "area": _area(rest),
        "family friendly": _family(rest),
    }
    return {"name": named} | {slot: frozenset(marks) for slot, marks in found.items()}
