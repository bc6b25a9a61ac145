"""Write the demo's data: sentences spoken to a house, and the one-line JSON command each of them means.

    python demo/make_data.py

The held-out sentences have combinations of words that no training sentence has, and some turns of phrase
that none has. Everything is drawn from the lists below with a fixed seed.
"""

import json
import random
from pathlib import Path

ROOMS = ["kitchen", "bedroom", "hallway", "office", "bathroom", "living room", "garage", "nursery", "attic", "study",
         "cellar", "porch", "dining room", "library", "workshop", "guest room"]  # fmt: skip
PEOPLE = ["Anna", "Ben", "Carla", "David", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jonas"]
ITEMS = [
    "eggs",
    "oat milk",
    "batteries",
    "candles",
    "rice",
    "soap",
    "apples",
    "coffee",
    "flour",
    "stamps",
]
MUSIC = [
    "jazz",
    "piano music",
    "rain sounds",
    "folk",
    "techno",
    "a podcast",
    "film scores",
    "soul",
    "opera",
    "blues",
]
THINGS = [
    "the pasta",
    "the laundry",
    "tea",
    "the oven",
    "a nap",
    "the bread",
    "my workout",
    "the bath",
]
NEWS = [
    "dinner is ready",
    "I am running late",
    "the parcel came",
    "we need bread",
    "the meeting moved",
    "I am home",
]

# Each kind: the command's action and slots, and ways to say it. The last way of each is kept for the held-out set.
KINDS = {
    "light": [
        "turn {state} the light in the {room}", "{room} light {state}, please", "could you switch the {room} lamp {state}",
        "I want the light in the {room} {state}", "lights {state} in the {room}", "would you mind putting the {room} light {state}",
    ],
    "dim": [
        "dim the {room} to {percent} percent", "set the {room} light to {percent}%", "make the light in the {room} {percent} percent bright",
        "{percent} percent light in the {room}", "brightness {percent} for the {room}", "bring the {room} light down to {percent} percent",
    ],
    "heat": [
        "set the {room} to {degrees} degrees", "make it {degrees} degrees in the {room}", "heat the {room} up to {degrees}",
        "I would like {degrees} degrees in the {room}", "{room} at {degrees} degrees, please", "warm the {room} to {degrees} degrees for me",
    ],
    "timer": [
        "set a timer for {minutes} minutes for {thing}", "remind me of {thing} in {minutes} minutes", "{minutes} minute timer for {thing}",
        "start {minutes} minutes on the clock for {thing}", "wake me from {thing} after {minutes} minutes",
        "in {minutes} minutes tell me about {thing}",
    ],
    "music": [
        "play {music} in the {room}", "I feel like hearing {music} in the {room}", "put on {music}, {room} speaker",
        "some {music} for the {room}", "start {music} in the {room}", "let us have {music} in the {room}",
    ],
    "list": [
        "add {count} {item} to the shopping list", "we need {count} {item}", "put {item} on the list, {count} of them",
        "write down {count} {item}", "shopping list: {count} {item}", "please note {count} {item} on the shopping list",
    ],
    "message": [
        "tell {person} that {news}", "send {person} a message: {news}", "let {person} know {news}", "text {person}: {news}",
        "message to {person}, {news}", "please pass on to {person} that {news}",
    ],
    "blinds": [
        "close the blinds in the {room} by {percent} percent", "{room} blinds to {percent} percent", "set the blinds of the {room} to {percent}",
        "lower the {room} blinds {percent} percent", "blinds at {percent}% in the {room}", "pull the blinds of the {room} to {percent} percent",
    ],
}  # fmt: skip


def command(kind: str, slots: dict[str, object]) -> str:
    """The one right answer: keys in this order, one line."""
    keys = {
        "light": ("room", "state"), "dim": ("room", "percent"), "heat": ("room", "degrees"), "timer": ("minutes", "for"),
        "music": ("room", "play"), "list": ("item", "count"), "message": ("to", "text"), "blinds": ("room", "percent"),
    }[kind]  # fmt: skip
    names = {"for": "thing", "play": "music", "to": "person", "text": "news"}
    return json.dumps({"action": kind, **{k: slots[names.get(k, k)] for k in keys}})


def draw(rng: random.Random) -> dict[str, object]:
    return {
        "room": rng.choice(ROOMS), "state": rng.choice(["on", "off"]), "percent": rng.randrange(5, 100, 5),
        "degrees": rng.randrange(16, 26), "minutes": rng.randrange(2, 60), "thing": rng.choice(THINGS),
        "music": rng.choice(MUSIC), "item": rng.choice(ITEMS), "count": rng.randrange(2, 13),
        "person": rng.choice(PEOPLE), "news": rng.choice(NEWS),
    }  # fmt: skip


def rows(count: int, rng: random.Random, seen: set[str], held_out: bool) -> list[dict[str, str]]:
    out: list[dict[str, str]] = []
    kinds = list(KINDS)
    while len(out) < count:
        kind = kinds[len(out) % len(kinds)]
        ways = KINDS[kind]
        # Half of the held-out sentences have a turn of phrase that was never trained on.
        way = ways[-1] if held_out and len(out) % 2 else rng.choice(ways[:-1])
        slots = draw(rng)
        answer = command(kind, slots)
        if answer not in seen:
            seen.add(answer)
            out.append({"prompt": way.format(**slots), "completion": answer})
    return out


def main() -> None:
    rng, seen = random.Random(7), set()
    here = Path(__file__).parent
    for name, found in (
        ("train", rows(160, rng, seen, False)),
        ("heldout", rows(32, rng, seen, True)),
    ):
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


if __name__ == "__main__":
    main()
