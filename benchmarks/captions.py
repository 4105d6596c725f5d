"""Captions by composition from word lists: five variations of each of any number of scenes."""

import hashlib
from collections.abc import Iterator

VARIATIONS = 5

STYLES = """a photo of; a watercolour of; an oil painting of; a pencil sketch of; a pixel art picture of; a 3d render
of; a stained glass window with; a woodcut of; a children's book illustration of; a black and white
photograph of; a mosaic of; a charcoal drawing of; a poster of; an embroidery of; a low poly model of; a
neon sign of"""
COLOURS = """red; dark red; orange; golden; yellow; olive; green; turquoise; light blue; navy blue; violet; pink;
white; grey; black; brown; silver; striped; spotted; transparent"""
THINGS = """fox; owl; cat; dog; horse; elephant; lion; whale; turtle; frog; snail; bee; butterfly; spider; crow;
penguin; bear; rabbit; deer; wolf; camel; goat; pig; cow; sheep; tiger; monkey; parrot; swan; duck;
dragon; unicorn; robot; astronaut; pirate; knight; wizard; ballerina; chef; farmer; violinist; drummer;
painter; fisherman; sailor; cyclist; skier; swimmer; baby; old man; girl with braids; boy with glasses;
teapot; candle; lamp; clock; typewriter; telephone; radio; camera; umbrella; suitcase; hat; shoe; violin;
guitar; piano; trumpet; car; bus; tram; steam train; bicycle; motorcycle; sailing boat; submarine;
airship; hot air balloon; aeroplane; helicopter; rocket; satellite; lighthouse; castle; windmill;
cottage; bridge; tower; temple; barn; tent; tree; cactus; mushroom; sunflower; rose; pumpkin; apple;
pineapple; cake; loaf of bread; bowl of soup; pizza; cup of coffee; chess board; snowman; scarecrow;
statue; fountain; treasure chest; kite; drum; anchor"""
ACTIONS = """asleep; upside down; covered in snow; on fire; wrapped in paper; under a spotlight; seen from above; seen
from behind; floating in the air; half buried; wearing a crown; made of glass; made of wood; made of ice;
made of wool; painted with flowers; surrounded by birds; in a cage; reflected in a mirror; at the end of
a queue; tied with a rope; next to its twin; in the rain; casting a long shadow; behind a curtain; held
by a giant hand; on a small boat; broken in two; full of water; in a parade"""
PLACES = """on a beach; in a forest; in a desert; on a mountain top; in a city street; in a library; in a kitchen; in
a cave; under the sea; on the moon; in a garden; on a frozen lake; in a railway station; at a market; in
a museum; on a rooftop; in a swimming pool; on a farm; in a cathedral; in a classroom; at the edge of a
cliff; in a wheat field; in a harbour; in a workshop; on a stage; in a hospital; by a waterfall; in a
vineyard; in a swamp; inside a whale; on a chess board; in a supermarket; at an airport; by a campfire;
in a greenhouse; on a motorway; in a ballroom; in a tunnel; on an island; at the north pole"""
TIMES = "at dawn; at noon; at sunset; at night; in spring; in summer; in autumn; in winter; in fog; in a storm"


def captions(count: int, seed: int = 0) -> Iterator[str]:
    """Yield captions, the first ones the same whatever the count; each run of five is one scene in five manners."""
    lists = [[word.strip() for word in words.split(";")] for words in (THINGS, ACTIONS, PLACES, TIMES, STYLES, COLOURS)]
    for number in range(count):
        scene = _draws(f"{seed}:scene:{number // VARIATIONS}")
        manner = _draws(f"{seed}:manner:{number}")
        thing, action, place, time = (words[draw % len(words)] for words, draw in zip(lists[:4], scene, strict=False))
        style, colour = (words[draw % len(words)] for words, draw in zip(lists[4:], manner, strict=False))
        yield f"{style} a {colour} {thing} {action} {place} {time}"


def _draws(text: str) -> list[int]:
    digest = hashlib.sha256(text.encode()).digest()
    return [int.from_bytes(digest[start : start + 4], "big") for start in range(0, 32, 4)]
