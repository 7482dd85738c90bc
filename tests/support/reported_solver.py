"""Solves the tests of `tasks.reported` by reading their prompts, as a careful reader would."""

import calendar
import json
import re
from collections import Counter

from ultralong.evaluation.tasks.reported.oolong_style import KINDS

KIND_OF = {thing: kind for kind, things in KINDS.items() for thing in things}


def edges_and_question(text):
    """Edges of the last graph of a prompt, and the operation on it."""
    last = text[text.rindex("Graph:\n") :]
    return re.findall(r"(\w+) -> (\w+)", last), re.search(r"Operation: (.*)", last).group(1)


def solve_graph(text, prefix=""):
    edges, asked = edges_and_question(text)
    if (found := re.match(r"Parents of node (\w+)\.", asked)) is not None:
        nodes = {start for start, end in edges if end == found.group(1)}
    else:
        start, depth = re.match(r"BFS from node (\w+) to depth (\d+)\.", asked).groups()
        after = {}
        for begin, end in edges:
            after.setdefault(begin, []).append(end)
        distance, reached = {start: 0}, [start]
        for node in reached:  # grows while it is read
            for end in after.get(node, ()):
                if end not in distance:
                    distance[end] = distance[node] + 1
                    reached.append(end)
        nodes = {node for node, steps in distance.items() if steps == int(depth)}
    return ", ".join(sorted(nodes)) + "]"


def solve_pairs(text, prefix=""):
    key = re.findall(r"Key: (\S+)", text)[-1]
    return " " + json.loads(text[: text.index("}") + 1])[key]


def messages(text, form, topic):
    """The assistant's messages on one request, in order."""
    return re.findall(rf"User: Write a {form} about {topic}\.\n\nAssistant: (.*)\n", text)


def asked_for(text):
    """What the end of a conversation asks for: form, topic, number, and the string to put in front."""
    found = re.search(r"assistant's (.+) about (.+) number (\d+)\. Write (\w+) and", text)
    return found.group(1), found.group(2), int(found.group(3)), found.group(4)


def solve_conversation(text, prefix=""):
    form, topic, number, mark = asked_for(text)
    return f" {mark}{messages(text, form, topic)[number - 1]}"


def entries(text):
    """Month, day, user and kind of every entry of a diary."""
    lines = re.findall(r"^(\d+-(\d+)-\d+) \| user (\d+) \| .* the (\w+)(?: again)?$", text, re.MULTILINE)
    return [(day, int(month), user, KIND_OF[thing]) for day, month, user, thing in lines]


def solve_diary(text, prefix=""):
    return f" {_answer(entries(text), re.search(r'Question: (.*) Give the answer alone', text).group(1))}"


def _answer(rows, asked):
    if (found := re.match(r"Which kind is (most|least) common", asked)) is not None:
        if (user := re.search(r"entries of user (\d+)", asked)) is not None:
            rows = [row for row in rows if row[2] == user.group(1)]
        ordered = Counter(kind for *_, kind in rows).most_common()
        return ordered[0 if found.group(1) == "most" else -1][0]
    if asked.startswith("Which user"):
        kind = re.search(r"of the kind (\w+)", asked).group(1)
        return Counter(row[2] for row in rows if row[3] == kind).most_common(1)[0][0]
    if asked.startswith("In which month"):
        kind = re.search(r"the kind (\w+)", asked).group(1)
        return calendar.month_name[Counter(row[1] for row in rows if row[3] == kind).most_common(1)[0][0]]
    if asked.startswith("Is the kind"):
        if (border := re.search(r"before (\S+) as", asked)) is not None:
            kind = asked.split()[3]
            early = sum(row[3] == kind and row[0] < border.group(1) for row in rows)
            late = sum(row[3] == kind and row[0] >= border.group(1) for row in rows)
        else:
            first, second = re.findall(r"the kind (\w+)", asked)
            early, late = (sum(row[3] == kind for row in rows) for kind in (first, second))
        return "more common" if early > late else "less common" if early < late else "same frequency"
    kind = re.search(r"of the kind (\w+)", asked).group(1)
    rows = [row for row in rows if row[3] == kind]
    if (user := re.search(r"of user (\d+)", asked)) is not None:
        rows = [row for row in rows if row[2] == user.group(1)]
    if (month := re.search(rf"entries of ({'|'.join(calendar.month_name[1:])})", asked)) is not None:
        rows = [row for row in rows if calendar.month_name[row[1]] == month.group(1)]
    return str(len(rows))


REPORTED_SOLVERS = {
    **dict.fromkeys(("graphwalks_bfs", "graphwalks_parents"), solve_graph),
    "json_kv": solve_pairs,
    **{f"mrcr_style_{needles}needles": solve_conversation for needles in (2, 4, 8)},
    **{f"oolong_style_{group}": solve_diary for group in ("counting", "user", "timeline")},
}
