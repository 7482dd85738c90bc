"""Tests reported beside RULER: what each asks, its published score on known answers, and readers that must fail."""

import random
import re

import pytest
import reported_solver as reader

from ultralong.evaluation.measures.score import score_predictions
from ultralong.evaluation.tasks.reported import REPORTED_TASKS
from ultralong.evaluation.tasks.reported.graphwalks import ask, draw_edges, node_set_f1, read_nodes
from ultralong.evaluation.tasks.reported.json_kv import substring_exact_match
from ultralong.evaluation.tasks.reported.mrcr_style import marked_ratio
from ultralong.evaluation.tasks.reported.oolong_style import ASKERS, exact_or_near
from ultralong.evaluation.tasks.samples import make_samples
from ultralong.evaluation.tasks.task import CAPABILITIES, Task

MARK = "aB3aB3aB3a"


@pytest.fixture(scope="module")
def records(tokenizer_of_words):
    """Twelve short samples of every test."""
    return {task: list(make_samples(task, tokenizer_of_words, 1536, 12, seed=5)) for task in REPORTED_TASKS}


def score(task, records, said):
    return score_predictions(task, [{**record, "prediction": said(record["input"])} for record in records]).value


def all_nodes(text):
    return ", ".join({node for edge in reader.edges_and_question(text)[0] for node in edge}) + "]"


def neighbours(text):
    """The other direction for parents, one step for any depth of a search."""
    edges, asked = reader.edges_and_question(text)
    node = re.search(r"node (\w+)", asked).group(1)
    return ", ".join(end for start, end in edges if start == node) + "]"


def one_before(text):
    """The message before the one asked for, or the last one."""
    form, topic, number, mark = reader.asked_for(text)
    return mark + reader.messages(text, form, topic)[number - 2]


def without_the_mark(text):
    return reader.solve_conversation(text).strip()[10:]


def of_half(text):
    """A reader of the first half of a diary only."""
    lines = text.split("\n")
    return reader.solve_diary("\n".join(lines[: len(lines) // 2] + lines[-2:]))


WRONG = [
    *((task, all_nodes, 30) for task in ("graphwalks_bfs", "graphwalks_parents")),
    *((task, neighbours, 50) for task in ("graphwalks_bfs", "graphwalks_parents")),
    ("json_kv", lambda text: re.findall(r'": "(.*)"', text)[0], 40),  # right at the first of six depths
    ("json_kv", lambda text: re.findall(r"value: (\S+)", text)[-1], 10),
    *((f"mrcr_style_{needles}needles", one_before, 60) for needles in (2, 4, 8)),
    *((f"mrcr_style_{needles}needles", without_the_mark, 0) for needles in (2, 4, 8)),
    *((f"oolong_style_{group}", of_half, 90) for group in ASKERS),
    *((f"oolong_style_{group}", lambda text: " fruit", 50) for group in ASKERS),
    *((f"oolong_style_{group}", lambda text: " more common", 50) for group in ASKERS),
]


@pytest.mark.parametrize(("task", "wrong", "most"), WRONG)
def test_readers_that_take_a_short_cut_do_not_score_full(task, wrong, most, records):
    assert score(task, records[task], wrong) <= most
    assert score(task, records[task], reader.REPORTED_SOLVERS[task]) == 100


def test_a_search_gives_the_nodes_at_one_depth_and_the_edges_that_lead_there():
    edges = [("a", "b"), ("a", "c"), ("b", "c"), ("c", "d"), ("d", "a"), ("b", "e")]
    for seed in range(20):
        walk = ask(random.Random(seed), edges, "bfs", 2)
        start, depth = re.match(r"BFS from node (\w) to depth (\d)", walk.operation).groups()
        want = {"a": {"d", "e"}, "b": {"d"}, "c": {"a"}, "d": {"b", "c"}}
        assert depth == "2"
        assert set(walk.nodes) == want[start]
        # Every node of the answer is reached by one of the edges named, and the first of them leaves the start.
        assert set(walk.nodes) <= {edges[place][1] for place in walk.needed}
        assert edges[walk.needed[0]][0] == start
    # Nothing lies two edges from anywhere: the search is asked to depth 1 instead.
    assert ask(random.Random(0), [("a", "b"), ("c", "d")], "bfs", 2).operation.endswith("depth 1.")
    edges = draw_edges(random.Random(0), 500)
    assert len(set(edges)) == 500
    assert all(start != end for start, end in edges)


def test_answers_of_a_graph_rest_on_the_edges_that_they_point_at(records, tokenizer_of_words):
    for record in records["graphwalks_parents"]:
        task = REPORTED_TASKS["graphwalks_parents"]
        node = re.search(r"Parents of node (\w+)\.$", record["input"]).group(1)
        assert len(record["positions"]) == len(record["outputs"])
        assert record["input"].count(f"-> {node}\n") == len(record["outputs"])
        assert 1 <= len(record["outputs"]) <= 16
        assert task.grade({**record, "prediction": "] I do not know"}) == 0


@pytest.mark.parametrize(
    ("answer", "prefix", "nodes"),
    [
        ("ab, cd]", "\nFinal Answer: [", ["ab", "cd"]),
        (" ab ,cd]\nFinal Answer: [ef]", "\nFinal Answer: [", ["ab", "cd"]),
        ("]", "\nFinal Answer: [", []),
        ("ab, cd", "\nFinal Answer: [", None),
        ("The answer:\nFinal Answer: [ab]", "\nFinal Answer: [", ["ab"]),
        ("First ab, then cd.\nFinal Answer: [ab, cd]", None, ["ab", "cd"]),
        ("Final Answer: [ab]\nI am sure.", None, None),
        ("[ab, cd]", None, None),
        ("", None, None),
    ],
)
def test_a_list_of_nodes_is_read_as_published_or_from_the_bracket_that_the_prompt_opened(answer, prefix, nodes):
    assert read_nodes(answer, prefix) == nodes


def test_scores_are_those_published():
    """Worked by hand from each benchmark's own definition."""
    begun = "\nFinal Answer: ["
    assert node_set_f1("a, b]", ["a", "b"], begun) == 1
    assert node_set_f1("b, b, a]", ["a", "b"], begun) == 1, "a set"
    assert node_set_f1("a]", ["a", "b"], begun) == pytest.approx(2 * 1.0 * 0.5 / 1.5)
    assert node_set_f1("a, c, d]", ["a", "b"], begun) == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert node_set_f1("c]", ["a"], begun) == node_set_f1("]", ["a"], begun) == 0
    assert substring_exact_match(" It is 12AB-34.", ["12ab-34"]) == 1
    assert substring_exact_match("12ab 34", ["12ab-34"]) == 0
    assert marked_ratio(f" {MARK}the cat", [f"{MARK}the cat"], MARK) == 1
    assert marked_ratio("the cat", [f"{MARK}the cat"], MARK) == 0
    assert marked_ratio(f"Here: {MARK}the cat", [f"{MARK}the cat"], MARK) == 0
    # Two blocks of the shorter text, "the c" and "t", are found: 2 * 6 / (7 + 7).
    assert marked_ratio(f"{MARK}the cut", [f"{MARK}the cat"], MARK) == pytest.approx(12 / 14)
    assert exact_or_near(" 7", ["7"], numeric=True) == 1
    assert exact_or_near(" **[5]**\nQuestion: 7", ["7"], numeric=True) == pytest.approx(0.75**2)
    assert exact_or_near("seven", ["7"], numeric=True) == exact_or_near("", ["7"], numeric=True) == 0
    assert exact_or_near("The kind: tool", ["tool"]) == 1
    assert exact_or_near("Fruit is more common than tools are", ["more common"]) == 1
    assert exact_or_near("less common", ["more common"]) == exact_or_near("3", ["fruit"]) == 0


def test_needles_are_asked_by_turns_and_their_requests_are_alike(records):
    for needles in (2, 4, 8):
        for index, record in enumerate(records[f"mrcr_style_{needles}needles"]):
            form, topic, number, mark = reader.asked_for(record["input"])
            said = reader.messages(record["input"], form, topic)
            assert len(set(said)) == len(said) == needles == record["needles"]
            assert number == record["number"] == index % needles + 1
            assert record["outputs"] == [mark + said[number - 1]]
            assert len(record["positions"]) == 1
            others = set(re.findall(r"User: Write a (.*)\.", record["input"])) - {f"{form} about {topic}"}
            assert len(others) > 3


def test_questions_of_a_diary_take_turns_and_counts_are_told_from_words(records):
    for group, askers in ASKERS.items():
        found = records[f"oolong_style_{group}"]
        asked = [re.search(r"Question: (.*)", record["input"]).group(1) for record in found]
        kinds = {" ".join(re.sub(r"\d[\d-]*|kind \w+|of \w+", "", words).split()[:4]) for words in asked}
        assert len(kinds) >= len(askers), asked
        assert sum(record["numeric"] for record in found) >= 3
        assert all(record["outputs"][0].isdigit() for record in found if record["numeric"])


def test_every_test_has_a_capability():
    assert {task.capability for task in REPORTED_TASKS.values()} == {
        *("multi-hop", "retrieval", "co-reference", "aggregation"),
    }
    with pytest.raises(ValueError, match=r"'memory' is none of the capabilities retrieval, multi-hop"):
        Task("x", 1, lambda setting: None, lambda answer, references: 0.0, capability="memory")
    assert len(CAPABILITIES) == len(set(CAPABILITIES))
