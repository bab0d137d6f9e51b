"""Questions about a scene, each with one exact answer."""

import random

from scenes import COLOURS, HELD_OUT_PAIRS, SHAPES, SIZE, Scene

KINDS = (
    "colour", "shape", "count", "exists", "position", "relation", "compare", "number", "word", "character",
    "background",
)
# How often each kind is tried; many tries find nothing to ask.
WEIGHTS = (1.5, 1.5, 1.0, 0.7, 2.0, 2.5, 0.8, 0.0, 0.0, 0.0, 0.35)
# Distance in pixels at which a place counts as plainly on one side.
CLEAR = 10


def plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def unique(scene: Scene, key) -> list:
    """Things that no other thing of the scene shares `key` with."""
    keys = [key(thing) for thing in scene.things]
    return [thing for thing, k in zip(scene.things, keys) if keys.count(k) == 1]


def pair(thing) -> tuple[str, str]:
    return thing.colour, thing.shape


def ask_colour(scene, rng):
    things = unique(scene, lambda t: t.shape)
    if things:
        thing = rng.choice(things)
        return f"What color is the {thing.shape}?", thing.colour


def ask_shape(scene, rng):
    things = unique(scene, lambda t: t.colour)
    if things:
        thing = rng.choice(things)
        return f"What shape is the {thing.colour} object?", thing.shape


def ask_count(scene, rng):
    things = scene.things
    how = rng.choice(("all", "shape", "shape", "colour", "colour", "pair"))
    # Mostly something that is there.
    there = rng.random() < 0.85
    colour = rng.choice(things).colour if there else rng.choice(list(COLOURS))
    shape = rng.choice(things).shape if there else rng.choice(SHAPES)
    if how == "all":
        return "How many objects are there?", str(len(things))
    if how == "shape":
        return f"How many {plural(shape)} are there?", str(sum(t.shape == shape for t in things))
    if how == "colour":
        return f"How many {colour} objects are there?", str(sum(t.colour == colour for t in things))
    if (colour, shape) in HELD_OUT_PAIRS and not any(pair(t) == (colour, shape) for t in things):
        colour, shape = pair(rng.choice(things))
    count = sum(pair(t) == (colour, shape) for t in things)
    return f"How many {colour} {plural(shape)} are there?", str(count)


def ask_exists(scene, rng):
    pairs = {pair(t) for t in scene.things}
    if rng.random() < 0.5:
        colour, shape = rng.choice(sorted(pairs))
        answer = "yes"
    else:
        # Mostly near misses: the colour or the shape is there.
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        if rng.random() < 0.7:
            known = rng.choice(sorted(pairs))
            colour, shape = (known[0], shape) if rng.random() < 0.5 else (colour, known[1])
        # A pair that training never shows is never asked for in vain: the text alone would give it away.
        if (colour, shape) in HELD_OUT_PAIRS:
            colour, shape = rng.choice(sorted(pairs))
        answer = "yes" if (colour, shape) in pairs else "no"
    article = "an" if colour == "orange" else "a"
    return f"Is there {article} {colour} {shape}?", answer


def ask_position(scene, rng):
    middle = SIZE // 2
    things = [t for t in unique(scene, pair) if min(abs(t.x - middle), abs(t.y - middle)) >= CLEAR]
    if things:
        thing = rng.choice(things)
        vertical = "top" if thing.y < middle else "bottom"
        horizontal = "left" if thing.x < middle else "right"
        return f"Where is the {thing.colour} {thing.shape}?", f"{vertical} {horizontal}"


def ask_relation(scene, rng):
    things = unique(scene, pair)
    if len(things) < 2:
        return None
    a, b = rng.sample(things, 2)
    choices = []
    if abs(a.x - b.x) >= CLEAR:
        choices += [("to the left of", a.x < b.x), ("to the right of", a.x > b.x)]
    if abs(a.y - b.y) >= CLEAR:
        choices += [("above", a.y < b.y), ("below", a.y > b.y)]
    if choices:
        words, holds = rng.choice(choices)
        question = f"Is the {a.colour} {a.shape} {words} the {b.colour} {b.shape}?"
        return question, "yes" if holds else "no"


def ask_compare(scene, rng):
    shapes = sorted({t.shape for t in scene.things})
    if len(shapes) < 2:
        return None
    a, b = rng.sample(shapes, 2)
    more = sum(t.shape == a for t in scene.things) > sum(t.shape == b for t in scene.things)
    return f"Are there more {plural(a)} than {plural(b)}?", "yes" if more else "no"


def ask_number(scene, rng):
    if scene.label and scene.label.text.isdigit():
        return "What number is written?", scene.label.text


def ask_word(scene, rng):
    if scene.label and not scene.label.text.isdigit():
        return "What word is written?", scene.label.text.lower()


def ask_character(scene, rng):
    if scene.label:
        first = rng.random() < 0.5
        what = "digit" if scene.label.text.isdigit() else "letter"
        return f"What is the {'first' if first else 'last'} {what}?", scene.label.text[0 if first else -1].lower()


def ask_background(scene, rng):
    return "What is the pattern of the background?", scene.pattern


ASKERS = dict(zip(KINDS, (
    ask_colour, ask_shape, ask_count, ask_exists, ask_position, ask_relation, ask_compare, ask_number, ask_word,
    ask_character, ask_background,
)))


def ask(scene: Scene, kind: str, rng: random.Random) -> tuple[str, str] | None:
    """A question of `kind` about `scene` and its answer, where the scene allows one."""
    return ASKERS[kind](scene, rng) if scene.things else None


def ask_many(scene: Scene, count: int, rng: random.Random) -> list[tuple[str, str, str]]:
    """`count` triples of kind, question and answer; no question twice where that can be."""
    asked, tries = [], 0
    first = [k for k in ("number", "word", "character") if ask(scene, k, rng)]
    while len(asked) < count:
        kind = first.pop() if first else rng.choices(KINDS, WEIGHTS)[0]
        found, tries = ask(scene, kind, rng), tries + 1
        if found and (tries > 60 or all(found[0] != other[1] for other in asked)):
            asked.append((kind, *found))
    return asked
