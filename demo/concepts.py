"""What the demo models know: 72 concepts in three categories, two styles, and the captions that name them."""

from __future__ import annotations

#: Category -> {concept name used in captions: Unicode code point of its emoji}.
CATEGORIES: dict[str, dict[str, str]] = {
    "animals": {
        "dog": "1f436", "cat": "1f431", "fox": "1f98a", "lion": "1f981", "tiger": "1f42f", "cow": "1f42e",
        "pig": "1f437", "rabbit": "1f430", "mouse": "1f42d", "panda": "1f43c", "koala": "1f428", "frog": "1f438",
        "monkey": "1f435", "elephant": "1f418", "giraffe": "1f992", "penguin": "1f427", "owl": "1f989",
        "duck": "1f986", "parrot": "1f99c", "turtle": "1f422", "octopus": "1f419", "crab": "1f980",
        "butterfly": "1f98b", "whale": "1f433",
    },
    "vehicles": {
        "bus": "1f68c", "tram": "1f68a", "locomotive": "1f682", "ambulance": "1f691", "fire engine": "1f692",
        "police car": "1f693", "taxi": "1f695", "car": "1f697", "pickup": "1f6fb", "truck": "1f69a",
        "tractor": "1f69c", "racing car": "1f3ce", "motorcycle": "1f3cd", "scooter": "1f6f5", "bicycle": "1f6b2",
        "rickshaw": "1f6fa", "sailboat": "26f5", "canoe": "1f6f6", "speedboat": "1f6a4", "ship": "1f6a2",
        "airplane": "2708", "helicopter": "1f681", "rocket": "1f680", "flying saucer": "1f6f8",
    },
    "food": {
        "grapes": "1f347", "watermelon": "1f349", "lemon": "1f34b", "banana": "1f34c", "pineapple": "1f34d",
        "apple": "1f34e", "pear": "1f350", "cherries": "1f352", "strawberry": "1f353", "avocado": "1f951",
        "eggplant": "1f346", "carrot": "1f955", "corn": "1f33d", "broccoli": "1f966", "croissant": "1f950",
        "pretzel": "1f968", "cheese": "1f9c0", "hamburger": "1f354", "pizza": "1f355", "hot dog": "1f32d",
        "taco": "1f32e", "sushi": "1f363", "doughnut": "1f369", "birthday cake": "1f382",
    },
}

CONCEPTS: list[str] = [name for names in CATEGORIES.values() for name in names]
CATEGORY_OF: dict[str, str] = {name: category for category, names in CATEGORIES.items() for name in names}
PLURAL = {"grapes", "cherries"}

#: Style -> how a caption says it.
STYLES: dict[str, str] = {"flat": "flat drawing", "glossy": "glossy render"}

#: How the two objects of a scene are arranged, and how the caption says it. "left" and "above" name the place
#: of the first object; "and" leaves the arrangement open.
LAYOUTS: dict[str, str] = {"left": "left of", "above": "above", "and": "and"}


def with_article(name: str) -> str:
    """``apple`` -> ``an apple``; plurals stay bare."""
    if name in PLURAL:
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def single_caption(name: str, style: str) -> str:
    """The caption of one object, for example ``a dog, flat drawing``."""
    return f"{with_article(name)}, {STYLES[style]}"


def scene_caption(first: str, second: str, layout: str, style: str) -> str:
    """The caption of two objects, for example ``a dog left of a bus, flat drawing``."""
    return f"{with_article(first)} {LAYOUTS[layout]} {with_article(second)}, {STYLES[style]}"


def is_held_out(first: str, second: str) -> bool:
    """Whether a pair (in either order) is kept out of all training: one in six, spread evenly over concepts."""
    a, b = sorted((CONCEPTS.index(first), CONCEPTS.index(second)))
    return (a + b) % 6 == 0
