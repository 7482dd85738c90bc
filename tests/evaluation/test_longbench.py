"""LongBench v2 and Pro from local files in their authors' shape: what is asked, what is left out, and their scores."""

import json
import math

import pytest

from ultralong.evaluation.measures.score import score_predictions
from ultralong.evaluation.tasks.groups import find_questions
from ultralong.evaluation.tasks.published import LONGBENCH_TASKS, longbench
from ultralong.evaluation.tasks.published.longbench_scores import PRO_SCORES, pro_score, v2_score
from ultralong.evaluation.tasks.samples import make_samples

TEXT = " ".join(f"Barrel {number} stands in cellar {number % 7}." for number in range(150))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with both files, made by hand in the shape that the authors publish."""
    folder = tmp_path_factory.mktemp("longbench")
    choices = {f"choice_{letter}": f"In cellar {number} {{A}}" for number, letter in enumerate("ABCD")}
    questions = [
        {
            "_id": str(number),
            "domain": "Single-Document QA",
            "sub_domain": "Ledger",
            "difficulty": "easy",
            "length": "short",
            "question": f"Where does barrel {number} stand?",
            **choices,
            "answer": "ABCD"[number],
            "context": TEXT,
        }
        for number in range(4)
    ]
    (folder / "data.json").write_text(json.dumps(questions))
    tasks = [*(f"{number} A task" for number in PRO_SCORES), "T4.1 Summary", "T4.2 Summary"]
    rows = [
        {
            "id": f"{task}{language}",
            "context": TEXT,
            "language": language,
            "token_length": "8k",
            "primary_task": "T",
            "secondary_task": task,
            "contextual_requirement": "Full",
            "difficulty": "Hard",
            "question_thinking": "Think.",
            "question_nonthinking": f"List for {task}.",
            "answer": ["One", "Two  x"],
        }
        for task in tasks
        for language in ("English", "Chinese")
    ]
    (folder / "longbench_pro.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Files written anew go to a folder of the test."""
    monkeypatch.setattr(longbench, "DEFAULT_CACHE", tmp_path)


def made(task, tokenizer, data, length=4096, samples=60, **options):
    return list(make_samples(task, tokenizer, length, samples, questions=data, **options))


def test_choices_are_asked_over_the_text_and_right_is_the_letter(tokenizer_of_words, tiny_tokenizer, data):
    records = made("longbench_v2", tokenizer_of_words, data)
    assert sorted(record["row"] for record in records) == [0, 1, 2, 3]
    assert {record["words"] for record in records} == {"short"}
    for record in records:
        assert record["input"].startswith(TEXT)
        assert "(C) In cellar 2 {A}\n" in record["input"], "braces of the data stay as they are"
        assert record["answer_prefix"].endswith("The correct answer is (")
        assert record["cut"] == 0
    right = [{**record, "prediction": f"{record['outputs'][0]}) because"} for record in records]
    assert score_predictions("longbench_v2", right).value == 100
    assert score_predictions("longbench_v2", [{**record, "prediction": "A)"} for record in records]).value == 25
    cut = made("longbench_v2", tiny_tokenizer, data, 2000, samples=1, chat=False)[0]
    assert cut["cut"] > 0
    assert cut["length"] <= 2000
    assert "Where does barrel" in cut["input"]


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("The correct answer is (B).", True),
        ("**The correct answer is B**", True),
        ("The correct answer is A, not (B)", False),
        ("First, The correct answer is C; no: The correct answer is (B)", True),  # brackets are looked for first
        ("B", False),
        ("the correct answer is (B)", False),
        ("", False),
    ],
)
def test_a_letter_counts_behind_the_words_that_the_prompt_asks_for(answer, right):
    assert v2_score(answer, ["B"]) == right


@pytest.mark.parametrize("language", ["en", "zh"])
def test_rows_of_pro_are_those_of_a_language_but_for_summaries(language, tokenizer_of_words, data):
    records = made(f"longbench_pro_{language}", tokenizer_of_words, data)
    assert len(records) == len(PRO_SCORES) == 23
    assert not any(record["subtask"].startswith("T4") for record in records)
    assert all(record["input"] == f"{TEXT}\n\n\n\nList for {record['subtask']}." for record in records)
    right = [{**record, "prediction": "So:\n[Answer]\none\nTWO x\n"} for record in records]
    assert score_predictions(f"longbench_pro_{language}", right).value == 100
    wrong = [{**record, "prediction": "[Answer]\nthree\nfour"} for record in records]
    assert score_predictions(f"longbench_pro_{language}", wrong).value == 0


def test_every_task_of_pro_has_the_authors_rule():
    """Worked by hand from the definitions: references a, b, c; the answer c, a, x."""
    said, right = "[Answer]\nc\na\nx", ["A", "b", "C"]
    gains = (1 / math.log2(2) + 3 / math.log2(3)) / (3 / math.log2(2) + 2 / math.log2(3) + 1 / math.log2(4))
    expected = {
        **dict.fromkeys(("T1.1", "T1.2"), gains),
        **dict.fromkeys(("T2.1", "T2.2", "T6.3"), 0.0),  # of the pairs a-b, a-c, b-c none stands in order
        **dict.fromkeys(("T3.1", "T3.2", "T11.1", "T11.2"), 0.0),
        **dict.fromkeys(("T5.1", "T5.2", "T6.2", "T7.1", "T7.2", "T7.3", "T9.1", "T9.2"), 2 / 3),
        **dict.fromkeys(("T6.1", "T8.1", "T8.2", "T8.3", "T10.1", "T10.2"), 2 / 3),
    }
    assert {name: pro_score(said, right, f"{name} Some name") for name in PRO_SCORES} == pytest.approx(expected)
    assert pro_score("a\nx\nc", right, "T2.1 x") == pytest.approx(1 / 3)
    assert pro_score("[Answer]\nb\n[\u7b54\u6848]\na", ["b"], "T3.1 x") == 1, "the English mark goes first"
    assert pro_score("  ", right, "T3.1 x") == pro_score("a", ["a", "b"], "T2.1 x") == 0
    with pytest.raises(ValueError, match=r"no rule for the task 'T4.1 Summary'"):
        pro_score("a", ["a"], "T4.1 Summary")


def test_files_are_found_and_what_is_wrong_with_them_is_said(tokenizer_of_words, data, tmp_path):
    assert find_questions("longbench_v2", data) == data
    lines = tmp_path / "own.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in json.loads((data / "data.json").read_text())))
    from_lines = made("longbench_v2", tokenizer_of_words, lines)
    assert from_lines == made("longbench_v2", tokenizer_of_words, data)
    (tmp_path / "empty").mkdir()
    for task in LONGBENCH_TASKS:
        with pytest.raises(ValueError, match=r"holds no .*\.json.*: put .*json of .*LongBench"):
            made(task, tokenizer_of_words, tmp_path / "empty")
    for content, said in (
        ("{", "not valid JSON"),
        ("{}", "not a list of records"),
        ('[{"context": "a"}]', "is not of"),
    ):
        (tmp_path / "data.json").write_text(content)
        with pytest.raises(ValueError, match=said):
            made("longbench_v2", tokenizer_of_words, tmp_path / "data.json")
    (tmp_path / "data.json").write_text('[{"context": "a"}]')
    with pytest.raises(ValueError, match=r"no row in Chinese of a task that is scored"):
        made("longbench_pro_zh", tokenizer_of_words, tmp_path / "data.json")
