"""What a text states: per slot, the values its words express, whatever the sheet says.

Values are short marks, not the sheet's own words: a price is `low`, `mid`, `high` or one of the numbers `<20`,
`20-25`, `>30`. A mark with a `~` is a hint ("near the centre", "wine"): it can express the sheet's value and never
contradicts it. Which marks fit which value of a sheet is decided in `facts.py`. The phrases come from reading the
demonstrations of the training split.
"""

import functools
import re
import unicodedata
from collections.abc import Mapping

from tools.e2e.sheets import known_places

Patterns = Mapping[str, re.Pattern[str]]


def _any(*patterns: str) -> re.Pattern[str]:
    """One pattern that finds any of the phrases, each at word boundaries."""
    return re.compile(r"(?<!\w)(?:" + "|".join(patterns) + r")(?!\w)")


_DIGITS = {"zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "twenty": "20", "thirty": "30"}
_RELATIVE = {
    "high": _any("(?:above|over|higher than|more than|greater than|better than|higher then) (?:the )?average"),
    "low": _any("(?:below|under|lower than|less than|worse than|cheaper than|sub) (?:the )?average"),
    "lowish": _any(
        r"(?:not|n't|nor|never|hardly) (?:(?!and|but|with|has|is|are|famil|kid|child)[\w']+ ){0,3}?"
        r"(?:high|highly|good|great|well|best|excellent|favou?rable)"
    ),
}
"""Rewritten before the levels are looked for: `higher than average` is high, `not very good` is not good."""

_LOW = "low|lower|lowest|poor|poorly|bad|badly|negative|terrible|horrible|awful|unfavou?rable|worst|weak|lowish|lowly"
_MID = (
    "average|averagely|mediocre|okay|ok|decent|decently|moderate|moderately|medium|middle|mid|fair|fairly|mixed"
    "|satisfactory|so so|standard|reasonable|adequate|not bad|acceptable|modest|modestly"
)
_HIGH = (
    "high|highly|higher|highest|top|excellent|great|best|outstanding|superb|perfect|positive|favou?rable"
    "|exceptional|fantastic|amazing|wonderful|strong|rave"
)
_GOOD = "good|well|nice|nicely"
_LEVEL = f"{_LOW}|{_MID}|{_HIGH}|{_GOOD}"
_STOP = "and|but|yet|however|with|is|are|has|have|its|it|their|they|for|than|which|that"
_PRICE = "prices?|priced|pricing|costs?|costing|ranged?|ranges|budget|bracket|bill"
_RATING = (
    "rat(?:ed?|es|ings?)|reviews?|reviewed|ranked|rankings?|ranks?|scored?|scores|satisfaction|feedback|recommended"
    "|recommendations?|regarded|acclaimed|reputation|approval"
)


def _attached(level: str, noun: str, other: str) -> re.Pattern[str]:
    """`high (customer) rating`, `rating is (very) high`: level and noun in one clause, nothing of their kind between.

    `other` are the nouns of the other quality that has levels: in `low rating and price` both nouns take the level,
    in `priced high, low rating` each has its own.
    """
    before = rf"(?:(?!(?:{_LEVEL}|{_STOP}|{noun}|{other})\b)[\w'@]+ ){{0,3}}"
    shared = rf"(?:(?:customer )?(?:{other}) (?:and|as well as) (?:customer )?(?=(?:{noun}) ?(?:[.,]|$|range)))?"
    after = rf"(?:(?!(?:{_LEVEL}|{other}|and|but|yet|however|with)\b)[\w'@]+ ){{0,5}}"
    doubled = rf"(?:(?:and|to|or) (?:{_LEVEL}) )?"
    return re.compile(
        rf"\b(?:{level}) {doubled}{before}{shared}(?:{noun})\b"
        rf"|\b(?:{noun}) {after}(?:{level})\b(?! (?:customer )?(?:{other})\b)"
    )


_PRICE_LEVELS: Patterns = {
    "low": _attached("low|lower|lowest|lowish|lowly|small", _PRICE, _RATING),
    "mid": _attached("average|averagely|moderate|moderately|medium|middle|mid|mid range", _PRICE, _RATING),
    "high": _attached("high|highly|higher|highest|top", _PRICE, _RATING),
    "~fair": _attached("reasonable|reasonably|decent|decently|fair|fairly|modest|modestly|good|well", _PRICE, _RATING),
}
_RATING_LEVELS: Patterns = {
    "low": _attached(_LOW, _RATING, _PRICE),
    "mid": _attached(_MID, _RATING, _PRICE),
    "high": _attached(_HIGH, _RATING, _PRICE),
    "~good": _attached(_GOOD, _RATING, _PRICE),
}

_20, _30 = "(?:[£el] ?)?20", "(?:[£el] ?)?30"
_PRICE_NUMBERS: Patterns = {
    "20-25": re.compile(rf"{_20} ?(?:-|to|and|or|through) ?(?:£ ?)?25"),
    "<20": re.compile(
        rf"\b(?:less|lower|cheaper|fewer|no more|not more|lesser) (?:than|then|that) (?:[a-z]+ ){{0,2}}{_20}(?! ?-)\b"
        rf"|\b(?:under|below|beneath|within|up to|at most|maximum of|sub|max|less) (?:[a-z]+ )?{_20}(?! ?-)\b"
        rf"|{_20} (?:pounds )?(?:or|and) (?:less|under|below|lower)|< ?{_20}"
    ),
    ">30": re.compile(
        rf"\b(?:more|higher|greater|mare|no less) (?:than|then|that) (?:[a-z]+ ){{0,3}}{_30}\b"
        rf"|\b(?:over|above|upwards? of|at least|exceed\w*|start\w* (?:at|from)|minimum of|past|beyond|plus|from)"
        rf" (?:[a-z]+ )?{_30}\b"
        rf"|{_30} ?(?:\+|(?:pounds )?(?:and|or) (?:over|up|above|higher|more)|plus|upwards?)|> ?{_30}"
    ),
    "odd": re.compile(
        rf"\b(?<!no )(?<!not )(?:more|higher|greater) (?:than|then|that) (?:[a-z]+ ){{0,2}}{_20}(?! ?-)\b"
        rf"|\b(?<!nothing )(?:over|above) {_20}(?! ?-)\b"
        rf"|\b(?:less|lower|cheaper) (?:than|then|that) (?:[a-z]+ ){{0,2}}{_30}\b|\b(?:under|below) {_30}\b"
        r"|£(?!(?:20|25|30)\b)\d+|\b20 ?(?:-|to) ?£?30\b|\b30 ?(?:-|to) ?£?\d+"
    ),
    "~20": re.compile(rf"(?<![\d-]){_20}\b(?! ?-)"),
    "~30": re.compile(rf"(?<![\d-]){_30}\b"),
}
"""`odd` is a number that no sheet has, such as `more than £20`."""
_PRICE_WORDS: Patterns = {
    "low": _any(r"cheap\w*", r"inexpensive\w*", "low ?costs?", "(?<!high )budget", "bargains?", "economical"),
    "mid": _any(r"moderate(?:ly|s)?(?! (?:customer |\w+ )?(?:rat|review|star|recommend)\w*)", "mid ?(?:range|priced?)"),
    "high": _any(r"(?<!not )(?<!less )expensive(?:ly)?", r"price?y", "costly", "high end", "upscale", r"luxur\w+"),
    "~fair": _any("affordabl[ey]", r"reasonabl[ey](?! (?:customer )?rat\w*)", "good value", "value for money"),
    "~low": _any("(?:not|n't|less) (?:too |very |that |so )?(?:expensive|pricey|costly)"),
    "~high": _any("not (?:too |very |that |so )?cheap", "fine dining", "overpriced"),
}
_SOFTENED = _any("(?:moderately|reasonably|fairly|slightly|mildly|mid range) (?:expensive|pricey|cheap|inexpensive)")
"""Between two levels: it may stand for either."""

_RATING_NUMBERS = re.compile(
    r"\b([0-5])(?:\.\d)? ?(?:-|/|(?:out |our |ouf |ot )?of(?: a)?(?: possible)?) ?5\b(?: ?stars?)?"
    r"|\b([0-5]) ?(?:customer |star )?stars?\b"
    r"|\brat(?:ed|ings?) (?:(?:of|at|as|is|a|it|only|just) ){0,3}([0-5])\b(?! ?(?:[-£/]|out|our|of|star|customer))"
)
_RATING_WORDS: Patterns = {
    "~low": _any("low quality", "poor quality", "not (?:the best|recommended)", r"disappoint\w+", "awful", "terrible"),
    "~mid": _any(
        "average", "mediocre", "mid ?range (?:customer )?rat(?:ings?|ed)", "decent", "okay", "so so", "not bad"
    ),
    "~high": _any(
        "high quality", "popular", "excellent", "great", "best", "wonderful", "superb", "well liked", "loved"
    ),
}
_FOOD: Patterns = {
    "Japanese": _any(r"japan\w*", "sushi"),
    "Italian": _any(r"ital\w+", "pastas?", "pizzas?", "spaghetti"),
    "Fast food": _any(r"fast ?(?:\w+ )?foods?", "burgers?", "french fries", "fries", "hamburgers?", "junk food"),
    "French": _any("french(?! fries)", "france"),
    "Indian": _any("indiana?s?", "india", "curr(?:y|ies)"),
    "English": _any("english(?! (?:pounds?|sterling|currency|money))", "british", "fish (?:and|&|n) chips", "england"),
    "Chinese": _any("chinese?", "china", "chines", "dim sum"),
    "other": _any(
        "mexican|thai|spanish|korean|greek|turkish|vietnamese|german|vegetarian|vegan|seafood|steaks?|lebanese|russian"
    ),
    "~Fast food": _any("american", "snacks?", "quick", "take ?(?:away|out)s?", "chips", "fast"),
    "~French": _any("wines?", "cheeses?"),
    "~English": _any("breakfasts?", "traditional", "native", "local", "uk"),
    "~Chinese": _any("noodles?", "asian", "rice", "oriental"),
    "~Japanese": _any("asian", "oriental"),
}
_STYLE = r"(?! (?:style|styled|grub|food|fare|atmosphere|environment|like|type)\b)"
_EAT_TYPE: Patterns = {
    "pub": _any(f"pubs?{_STYLE}", "public house"),
    "coffee shop": _any(rf"coffee ?(?:shop|house|bar|place|ship|store|shoppe)s?{_STYLE}"),
    "restaurant": _any("rest[ae]?ur?[ae]?nts?", r"restau\w+"),
    "~pub": _any("pubs?", "bars?", "taverns?", "inn"),
    "~coffee shop": _any("cafes?", "coffees?"),
    "~restaurant": _any("diner", "eatery", "bistro", "dining", "eateries"),
}
_CENTRE = (
    r"(?:(?:\w+ )?(?:city|town|cities) ?(?:cent(?:re|er)s?)"
    r"|(?:city )?cent(?:re|er)(?: of (?:the )?(?:city|town|cambridge))?"
    r"|cent(?:re|er) city)"
)
_AREA_BESIDE = _any(
    r"(?:near|nearby|outside|north|south|east|west|past|close|beyond|from|next|by|off|out|around|away|outskirts?|edge"
    rf"|adjacent|minutes)(?: (?:of|to|by|from))?(?: the| a)? {_CENTRE}"
)
_AREA: Patterns = {
    "city centre": _any(_CENTRE, "down ?town", "heart of (?:the )?(?:city|town)", "central(?:ly)?", "inner city"),
    "riverside": _any("river ?(?:side|bank|front|view)?s?", "rive?r?side", "water ?front", "thames"),
    "~city centre": _any("city", "town"),
    "~riverside": _any("water", "rivers?"),
}
_CHILD = (
    r"(?:famil(?:y|ies|iy|ily|ys)|kids?|child(?:ren|rens|s)?|children's|childs|toddlers?|youngsters?|babies|minors)"
)
_NOT = (
    "(?:not however|not|never|no|non|none|nor|n't|cannot|without|isnt|arent|doesnt|dont|cant|lacks?|lacking"
    r"|unsuitable|un|inappropriate|discourag\w+|unfriendly|prohibit\w*|avoid|exclud\w+|neither|unwelcom\w+|barred|banned"
    r"|rather than|instead of|anything but|too \w+ for|leave|hardly|against|forbid\w*|unsuited|far from|less than)"
)
_CLAUSE = "but|yet|however|although|though|and|with|has|have"
_FAMILY_NO = re.compile(
    rf"\b(?<!why ){_NOT} (?:(?!(?:{_CLAUSE})\b)[\w']+ ){{0,6}}?{_CHILD}\b"
    rf"(?: (?:of|with|or|and|nor) (?:\w+ )?{_CHILD}\b)?"
    rf"|\b{_CHILD} (?:(?!(?:{_CLAUSE})\b)[\w']+ ){{0,4}}?(?:not|n't|never|no|un\w+|prohibited|forbidden|banned|free)\b"
    rf"|\b(?<!and )(?<!or )(?<!as well as )adults?\b(?! (?:and|&|or|as well as) (?:\w+ )?{_CHILD})"
    r"|\b(?:over|above) (?:the age of )?1[68]\b|\badults? only\b|\b18 ?\+|\bgrown ?ups?\b|\bchild ?less\b|\bmature\b"
)
_FAMILY_ANY = re.compile(rf"\b{_CHILD}\b|\ball ages\b")
_BESIDE = re.compile(r"\b(?:near|nearby|close to|next to|beside|alongside|adjacent to)(?: to)? $")


def plain(text: str) -> str:
    """Lower case without accents, digits for number words, hyphens only in numbers, punctuation set apart."""
    text = unicodedata.normalize("NFKD", text.lower().replace("’", "'"))
    text = "".join(char for char in text if not unicodedata.combining(char))
    text = re.sub(r" ?n ?'t\b", " n't", text)
    text = re.sub(r"(?<=\d)\s*[-–—]\s*(?=[£\d])", "#", text)
    text = re.sub(r"[-–—]", " ", text).replace("#", "-")
    text = re.sub(r"£\s+|(?:gbp|pounds?|[€$])\s*(?=\d)", "£", text)
    text = re.sub(r"([.,;:!?()])(?!\d)", r" \1 ", text)
    text = re.sub(r"\b(" + "|".join(_DIGITS) + r")\b", lambda match: _DIGITS[match[1]], text)
    return re.sub(r"\s+", " ", text).strip() + " "


@functools.lru_cache(maxsize=65_536)
def stated(text: str) -> Mapping[str, frozenset[str]]:
    """Slot -> the marks of the values the text states.

    `name` holds every known place the text names and `near` those it calls near. A mark with a leading `~` is a hint:
    see the module's docstring.
    """
    clean = plain(text)
    pattern, groups = _places()
    found = [(groups[match.lastgroup], match.start()) for match in pattern.finditer(clean) if match.lastgroup]
    rest = pattern.sub("@ ", clean)
    levelled = functools.reduce(lambda words, item: item[1].sub(item[0], words), _RELATIVE.items(), rest)
    marks = {
        "name": {place for place, _ in found},
        "near": {place for place, start in found if _BESIDE.search(clean[max(0, start - 16) : start])},
        "eat type": _matching(_EAT_TYPE, rest),
        "food": _matching(_FOOD, rest),
        "price range": _price(levelled),
        "customer rating": _rating(levelled),
        "area": _area(rest),
        "family friendly": _family(rest),
    }
    return {slot: frozenset(values) for slot, values in marks.items()}


def plain_without_places(text: str) -> str:
    """`plain` with every known place replaced by `@`."""
    return _places()[0].sub("@ ", plain(text))


@functools.cache
def _places() -> tuple[re.Pattern[str], dict[str, str]]:
    """One pattern for all places, longest first, and the place each of its groups stands for."""
    ordered = sorted(known_places(), key=lambda place: (-len(place), place))
    groups = {f"p{i}": place for i, place in enumerate(ordered)}
    named = "|".join(f"(?P<{group}>{_place_pattern(place)})" for group, place in groups.items())
    return re.compile(rf"(?<!\w)(?:the )?(?:{named})(?: ?'s)?(?!\w) ?"), groups


def _place_pattern(place: str) -> str:
    """A place's name with or without `the` and the last of three or more words, the commonest misspellings forgiven."""
    words = [re.escape(word) for word in plain(place).split() if word != "the"]
    ending = words[-1] if words[-1].endswith("s") else words[-1] + "s?"
    optional = len(words) >= 3 and words[-2] not in {"of", "bar"}
    pattern = " ".join(words[:-1]) + (f"(?: {ending})?" if optional else f" {ending}")
    forgiven = {"crowne": "crowne?", "travellers": "travell?er ?'?s", "browns": "brown ?'?s", "cafe": "(?:cafe|coffee)"}
    return " ".join(forgiven.get(word, word) for word in pattern.strip().split(" "))


def _matching(patterns: Patterns, text: str) -> set[str]:
    return {mark for mark, pattern in patterns.items() if pattern.search(text)}


def _price(text: str) -> set[str]:
    softened = _SOFTENED.sub("", text)
    numbers = _matching(_PRICE_NUMBERS, text)
    if "odd" in numbers:
        numbers -= {"~20", "~30"}
    marks = numbers | _matching(_PRICE_WORDS, softened) | _matching(_PRICE_LEVELS, softened)
    return marks | {"~low", "~fair", "~high"} if softened != text else marks


def _rating(text: str) -> set[str]:
    numbers = {f"{next(filter(None, groups))}/5" for groups in _RATING_NUMBERS.findall(text)}
    return numbers | _matching(_RATING_LEVELS, text) | _matching(_RATING_WORDS, text)


def _area(text: str) -> set[str]:
    inside = _AREA_BESIDE.sub(" ", text)
    marks = _matching(_AREA, inside)
    return marks | {"~city centre"} if inside != text else marks


def _family(text: str) -> set[str]:
    rest, negated = _FAMILY_NO.subn(" ", text)
    return ({"no"} if negated else set()) | ({"yes"} if _FAMILY_ANY.search(rest) else set())
