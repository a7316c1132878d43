"""The words that long-context problems are made of, and the filler they hide in.

Names, values and filler share no word, so that each stands in the context only where a problem put it. All are common
short English words: a tokenizer trained beside them makes each a token of its own, and recalling a value is one step.
"""

from __future__ import annotations

import random

NAMES = tuple(
    """
    amber anchor apple arrow badge banjo barrel basket beacon bench berry bishop blade blanket bottle branch brick
    bridge bucket button cabin cable camel candle canyon carpet castle cedar cherry circle clover coffee comet copper
    coral cradle crane crystal dagger daisy desert diamond dolphin donkey dragon eagle ember engine falcon feather
    fiddle flame ferry flute forest fossil fountain garden ginger glacier globe goblet granite grape hammer harbor
    hazel helmet heron honey horse island ivory jacket jasmine jewel jungle kettle kitten ladder lantern lemon lily
    lion lizard magnet maple marble meadow melon mirror monkey moth needle nest nickel oak oasis olive onion orchid
    otter oyster palace panda paper pearl pepper piano pigeon pillow planet plum pocket pony poppy prism puzzle
    pyramid quartz rabbit radar raven ribbon river robin rocket ruby saddle salmon sapphire scarf shell shield silver
    spider spoon statue stone sugar swan table temple thorn tiger timber torch tower trumpet tulip tunnel turtle
    valley velvet violin wagon walnut whale willow window wolf zebra
    """.split()
)
VALUES = tuple(
    """
    absent ancient bitter blunt bright broken brown bumpy cheap chilly clean clever cloudy coarse crooked crisp cruel
    damp dark dear deep dim dirty dizzy double dry dull dusty early eager empty equal fair fake faint famous fancy
    fast fierce final firm flat foggy fresh frozen funny gentle giant glad golden grand gray great greedy green grim
    harsh heavy hidden hollow honest hot huge humble icy jolly keen large lazy light little local lonely long loose
    loud low lucky mad mild modern muddy narrow neat noisy odd orange pale plain polite poor pretty pure purple quick
    rare raw rich ripe rough round royal rude rusty sad safe salty sharp shiny short shy silent silly simple sleepy
    slow smooth soft solid sour spicy steep stiff strange strict strong sudden sunny sweet swift tame tender thick
    thin tight tiny true ugly vast warm weak weird wet white wide wild wise wooden yellow
    """.split()
)
_WHO = "man woman boy girl child friend guest guard clerk nurse cook driver farmer sailor writer teacher".split()
_DOES = "sees likes finds hears asks helps meets thanks leads follows paints knows".split()
_HOW = "old new kind quiet tall small young happy tired busy proud calm".split()
_WHEN = ["today", "at noon", "again", "in spring", "at night", "once more", "every day", "in the rain"]


def value(rng: random.Random, number: bool = False) -> str:
    """What a fact says of a name: a word, or a number of four digits."""
    return str(rng.randint(1000, 9999)) if number else rng.choice(VALUES)


def filler(rng: random.Random) -> str:
    """A sentence that says nothing of any name: " The old man sees a quiet nurse at noon."."""
    return (
        f" The {rng.choice(_HOW)} {rng.choice(_WHO)} {rng.choice(_DOES)} a {rng.choice(_HOW)} {rng.choice(_WHO)}"
        f" {rng.choice(_WHEN)}."
    )
