"""A task whose answers can be checked: orders in free text to strict JSON.

    Could I get half a dozen desk lamps sent to Oslo by the 3rd of May?
    {"item": "desk lamps", "quantity": 6, "city": "Oslo", "date": "05-03"}

Made here, from a seed: some 30 ways to ask, quantities in digits, words and dozens, dates in seven
forms. No held-out order is a training order, and four in ten have a city, or words of an item,
that no training order has.
"""

from __future__ import annotations

import json
import random
from typing import NamedTuple

SYSTEM = "Order to JSON"


class Order(NamedTuple):
    """One row: what is asked, and the JSON that answers it."""

    text: str
    answer: str

    def messages(self) -> list[dict[str, str]]:
        contents = {"system": SYSTEM, "user": self.text, "assistant": self.answer}
        return [{"role": role, "content": content} for role, content in contents.items()]


KINDS = """
blue; red; green; white; black; yellow; small; large; wooden; steel; copper; glass; plastic; paper;
cotton; woollen; leather; rubber; folding; garden; kitchen; office; winter; summer; travel; antique;
cheap; light; heavy; round; square; velvet; bamboo; marble; crystal; golden; bronze; purple; orange;
pink; grey; brown; turquoise; scarlet; checked; spotted; dotted; plain; painted; polished; carved;
curved; narrow; wide; tall; short; thick; thin; soft; sturdy; compact; portable; electric; cordless;
magnetic; digital; organic; recycled; vintage; modern; rustic; classic; premium; standard; junior;
double; single; triple; outdoor; indoor; marine; camping; hiking; fishing; baking; party; sports;
school; hotel; baby; dog; horse; solar; thermal; elastic; waterproof; fireproof; insulated; padded
"""
THINGS = """
pens; lamps; cups; chairs; shelves; blankets; hoses; mugs; buckets; towels; clocks; boots; pans;
jars; ties; cases; knives; frames; shirts; belts; pots; bowls; brushes; mats; coats; balls; spoons;
tyres; helmets; tents; candles; cartridges; tables; stools; hats; bags; shakers; bottles; gloves;
sheets; fans; drills; cloths; boxes; stands; rods; pillows; mirrors; ladders; scarves
"""
NEW_KINDS = "silver; silent; linen; woven; warm; hidden"
NEW_THINGS = (
    "kettles; notebooks; shovels; curtains; trays; strings; guitars; tiles; poles; umbrellas"
)
CITIES = """
Leeds; Oslo; Lyon; Madrid; Turin; Porto; Ghent; Bergen; Dublin; Vienna; Prague; Athens; Zurich;
Boston; Denver; Dallas; Seattle; Chicago; Toronto; Montreal; Sydney; Perth; Auckland; Tokyo; Osaka;
Seoul; Mumbai; Delhi; Nairobi; Lagos; Cairo; Lima; Bogota; Quito; Havana; Geneva; Munich; Hamburg;
Glasgow; Cardiff; Berlin; Paris; Rome; Milan; Naples; Venice; Seville; Valencia; Malaga; Bilbao;
Brussels; Antwerp; Rotterdam; Utrecht; Copenhagen; Aarhus; Stockholm; Uppsala; Malmo; Tampere;
Tallinn; Riga; Vilnius; Krakow; Gdansk; Budapest; Zagreb; Basel; Sofia; Bucharest; Ankara; Izmir;
Lille; Rabat; Dakar; Accra; Kampala; Lusaka; Durban; Pretoria; Mombasa; Beirut; Amman; Muscat; Doha;
Karachi; Lahore; Dhaka; Chennai; Pune; Jaipur; Colombo; Hanoi; Bangkok; Jakarta; Manila; Taipei;
Shanghai; Beijing; Busan; Nagoya; Brisbane; Adelaide; Hobart; Dunedin; Honolulu; Portland; Phoenix;
Tucson; Houston; Memphis; Atlanta; Miami; Tampa; Detroit; Cleveland; Buffalo; Quebec; Calgary;
Edmonton; Caracas; Santiago; Rosario; Recife; Belfast; Swansea; Exeter; Plymouth; Norwich; Derby
"""
NEW_CITIES = "Bristol; Helsinki; Warsaw; Lisbon; Austin; Ottawa; Kyoto; London; Orlando; Singapore"
NUMBERS = """
one; two; three; four; five; six; seven; eight; nine; ten; eleven; twelve; thirteen; fourteen;
fifteen; sixteen; seventeen; eighteen; nineteen; twenty
"""
MONTHS = """
January; February; March; April; May; June; July; August; September; October; November; December
"""
# {n} the quantity, {i} the item, {c} the city, {d} the date.
TEMPLATES = """
Please send {n} {i} to {c} by {d}.
Could I get {n} {i} sent to {c} by {d}?
I'd like to order {n} {i}, delivered to {c} on {d}.
We need {n} {i} in {c} by {d}, please.
Hello, {n} {i} for our {c} office, due {d}. Thanks!
Order: {n} {i}, ship to {c}, arriving {d}.
By {d}, we must have {n} {i} in {c}.
Our shop in {c} is out of {i}. Can you bring {n} on {d}?
Can you deliver {n} {i} to {c} on {d}?
On {d}, please drop off {n} {i} at our {c} branch.
My sister in {c} wants {n} {i} for {d}.
Hi! Put me down for {n} {i}. I live in {c} and need them by {d}.
{c} store here. We want {n} {i} before {d}.
Ship {n} {i} to {c}. Deadline: {d}.
It would be great to have {n} {i} in {c} for {d}.
Kindly arrange {n} {i} for {c}, delivery date {d}.
How about {n} {i} for the team in {c}? They should arrive on {d}.
Date {d}, place {c}: {n} {i}.
The {c} warehouse is asking for {n} {i} by {d}.
Send me {n} {i}; the address is in {c}, the date {d}.
Reserve {n} {i} for pick-up in {c} on {d}.
I am moving to {c} on {d} and will need {n} {i} there.
For {d} we have an event in {c}, so add {n} {i} to our account.
Just {n} {i} this time, to {c}, no later than {d}.
{n} {i} to {c} by {d}, please!
Let's make it {n} {i} for {c}, on {d}.
As agreed on the phone: {n} {i}, {d}, {c}.
They asked for {n} {i} at the hotel in {c} by {d}.
You can bring the {n} {i} to {c} on {d}.
There is a party in {c} on {d}. Get us {n} {i}.
"""


def _quantity(rng: random.Random) -> tuple[str, int]:
    form = rng.randrange(6)
    if form == 0:
        dozens = rng.choice(["a dozen", "two dozen", "half a dozen"])
        return dozens, {"a dozen": 12, "two dozen": 24, "half a dozen": 6}[dozens]
    if form <= 2:
        n = rng.randint(2, 20)
        return _split(NUMBERS)[n - 1], n
    n = rng.randint(2, 20) if form == 3 else rng.randint(21, 500)
    return str(n), n


def _date(rng: random.Random) -> tuple[str, str]:
    month, day = rng.randint(1, 12), rng.randint(1, 28)
    name = _split(MONTHS)[month - 1]
    suffix = "th" if 11 <= day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    forms = [
        f"{name} {day}",
        f"{day} {name}",
        f"{name} {day}{suffix}",
        f"the {day}{suffix} of {name}",
        f"{name[:3]} {day}",
        f"{day} {name[:3]}",
        f"{name[:3]} {day}{suffix}",
    ]
    return rng.choice(forms), f"{month:02}-{day:02}"


def _split(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split(";")]


def make(train: int = 420, held_out: int = 100, seed: int = 0) -> tuple[list[Order], list[Order]]:
    """Training and held-out orders, the same for the same seed.

    >>> train, held_out = make(3, 2)
    >>> print(train[0].answer)
    {"item": "electric balls", "quantity": 15, "city": "Lusaka", "date": "01-09"}
    """
    rng = random.Random(seed)
    templates, seen = TEMPLATES.strip().splitlines(), set[str]()

    def draw(new_item: bool = False, new_city: bool = False) -> Order:
        while True:
            (said, n), (day, date) = _quantity(rng), _date(rng)
            kind = rng.choice(_split(NEW_KINDS if new_item else KINDS))
            item = f"{kind} {rng.choice(_split(NEW_THINGS if new_item else THINGS))}"
            city = rng.choice(_split(NEW_CITIES if new_city else CITIES))
            text = rng.choice(templates).format(n=said, i=item, c=city, d=day)
            text = text[0].upper() + text[1:]
            answer = json.dumps({"item": item, "quantity": n, "city": city, "date": date})
            if answer not in seen:
                seen.add(answer)
                return Order(text, answer)

    training = [draw() for _ in range(train)]
    # One in five has an item of new words, one in five a new city.
    testing = [draw(rng.random() < 0.2, rng.random() < 0.2) for _ in range(held_out)]
    return training, testing
