"""Samples of every test: full, solvable by reading, reproducible alone, with references where they say."""

import copy
import functools
import json
import random
import re
from collections import Counter

import numpy as np
import pytest
from fact_solver import solve as solve_facts
from reported_solver import REPORTED_SOLVERS

from ultralong.evaluation.measures.score import grades, score_predictions
from ultralong.evaluation.tasks import babilong_style as facts
from ultralong.evaluation.tasks import nonliteral, texts
from ultralong.evaluation.tasks.ruler import NIAH, counting, niah, questions
from ultralong.evaluation.tasks.samples import GENERATED, find_task, make_samples, prompt_ids
from ultralong.evaluation.tasks.texts import Essays, WordPairs, made_up_words

LENGTH = 4096
WORDS = made_up_words(4000)
PAIRS = WordPairs(WORDS[:900], WORDS[900:2900])


def prose(seed=0, count=40):
    draw = random.Random(seed)
    return [
        " ".join(" ".join(draw.choices(WORDS[3000:], k=11)).capitalize() + "." for _ in range(60)) for _ in range(count)
    ]


@functools.cache
def essays():
    return Essays(prose(), "test essays")


@pytest.fixture
def tokenizer(tokenizer_of_words):
    return tokenizer_of_words


@pytest.fixture(scope="module")
def squad(tmp_path_factory):
    """Forty articles of twenty paragraphs, each with a question whose answer stands in it."""
    articles = []
    draw = random.Random(1)
    for article in range(40):
        paragraphs = []
        for number in range(20):
            code = f"{article:02d}x{number:02d}"
            text = f"The mark of {code} is q{code}. " + " ".join(draw.choices(WORDS, k=draw.randint(20, 160)))
            answers = [{"text": f"q{code}"}, {"text": f"the mark q{code}"}]
            paragraphs.append(
                {
                    "context": text,
                    "qas": [
                        {"question": f"What is the mark of {code}?", "answers": answers, "is_impossible": False},
                        {"question": "What is not said?", "answers": [], "is_impossible": True},
                    ],
                }
            )
        articles.append({"title": str(article), "paragraphs": paragraphs})
    path = tmp_path_factory.mktemp("squad") / "dev.json"
    path.write_text(json.dumps({"version": "v2.0", "data": articles}))
    return path


@pytest.fixture(scope="module")
def hotpot(tmp_path_factory):
    rows = []
    for row in range(60):
        context = [[f"Title {row} {part}", [f"Fact {row} {part} is h{row}p{part}. ", "More. "]] for part in range(10)]
        rows.append({"question": f"What is fact {row} 3?", "answer": f"h{row}p3", "context": context})
    path = tmp_path_factory.mktemp("hotpot") / "dev.json"
    path.write_text(json.dumps(rows))
    return path


MADE: dict[tuple, list[dict]] = {}
SAMPLES = 12


@pytest.fixture
def make(monkeypatch, tokenizer, squad, hotpot):
    """`make_samples` with word lists and essays made here, so that no test needs a network."""
    monkeypatch.setattr(niah, "word_pairs", lambda: PAIRS)
    monkeypatch.setattr(texts, "essays", essays)
    monkeypatch.setattr(counting, "common_words", lambda: tuple(WORDS[:2500]))

    def run(task, length=LENGTH, samples=1, seed=0, **options):
        if "qa" in task:
            options["questions"] = hotpot if "hotpot" in task else squad
        return list(make_samples(task, options.pop("tokenizer", tokenizer), length, samples, seed, **options))

    return run


@pytest.fixture
def made(make):
    """The same twelve samples of a task for several tests, of seed 0: what a sample is follows from its number."""

    def once(task, length=LENGTH):
        if (task, length) not in MADE:
            MADE[task, length] = make(task, length, SAMPLES)
        return copy.deepcopy(MADE[task, length])

    return once


def solve_niah(text, prefix, kind):
    keys = re.search(r" for (.*) mentioned in", prefix).group(1)
    keys = re.split(r", and |, ", keys)
    return " ".join(re.findall(rf"magic {kind} for (?:{'|'.join(map(re.escape, keys))}) is: ([^ ]+?)\.(?:\s|$)", text))


def solve_tracking(text, prefix):
    task = text[text.rindex("Memorize and track") :]
    value = re.search(r"assigned the value (\d+)", prefix).group(1)
    names = [re.search(rf"VAR (\w+) = {value}", task).group(1)]
    while (found := re.search(rf"VAR (\w+) = VAR {names[-1]}\b", task)) is not None:
        names.append(found.group(1))
    return " ".join(names)


def solve_common(text, prefix):
    listed = text[text.rindex("Memorize the ones") :]
    counts = Counter(re.findall(r"\d+\. ([^\d\n]+?)(?= \d+\.|\n)", listed))
    return " ".join(word for word, _ in counts.most_common(10))


def solve_coded(text, prefix):
    words = text[text.index("coded words. ") + 13 : text.index("\nQuestion")].split(" ")
    return " ".join(word for word, _ in Counter(words).most_common(4)[1:])


def solve_question(text, prefix):
    if (mark := re.search(r"What is the mark of (\w+)\?", text)) is not None:
        return re.search(rf"The mark of {mark.group(1)} is (\w+)\.", text).group(1)
    fact = re.search(r"What is fact (\d+ \d+)", text).group(1)
    return re.search(rf"Fact {fact} is (\w+)\.", text).group(1)


def solve_code(text, prefix):
    call = re.search(r"(func_\d+)\((-?\d+)\)", text[text.rindex("\n\nPlease") :])
    module = {}
    # What the prompt says is run, as a careful reader would.
    exec(text[text.index("functions_module.py:") + 20 : text.rindex("\n\nPlease")], module)
    return str(module[call.group(1)](int(call.group(2))))


def solve_find(text, prefix):
    numbers = json.loads(text[text.index("[") : text.rindex("]") + 1])
    asked = re.search(r"What is the (.*) number", text).group(1)
    if asked == "median":
        return f"{np.median(numbers):g}"
    place = {"second": 1, "third": 2}.get(asked.split()[0], 0)
    return str(sorted(set(numbers), reverse=asked.endswith("largest"))[place])


def solve_sum(text, prefix):
    terms = re.findall(r"(?:([+-]) )?(\d+)", re.split(r"Expression: |\n\n", text)[-1])
    value, values = 0, []
    for sign, number in terms:
        value += -int(number) if sign == "-" else int(number)
        values.append(value)
    return str(values)


SOLVERS = {
    **{name: functools.partial(solve_niah, kind=kind.values) for name, kind in NIAH.items()},
    "needle": lambda text, prefix: re.search(r"numbers for \w+ is: (\d+)\.", text).group(1),
    "ruler_vt": solve_tracking,
    "ruler_cwe": solve_common,
    "ruler_fwe": solve_coded,
    "ruler_qa_squad": solve_question,
    "ruler_qa_hotpot": solve_question,
    "infinitebench_passkey": lambda text, prefix: re.search(r"pass key is (\d+)", text).group(1),
    "infinitebench_number_string": lambda text, prefix: re.search(r"digits is (\d+)", text).group(1),
    "infinitebench_kv_retrieval": lambda text, prefix: json.loads(text[text.index("{") : text.index("}") + 1])[
        re.search(r'Key: "(.*)"', text).group(1)
    ],
    "infinitebench_code_run": solve_code,
    "infinitebench_math_find": solve_find,
    "infinitebench_math_calc": solve_sum,
    **{name: lambda text, prefix: solve_facts(text) for name in facts.BABILONG_STYLE_TASKS},
    **{
        name: lambda text, prefix: next(person for person in facts.PEOPLE if person in text)
        for name in nonliteral.NONLITERAL_TASKS
    },
    **REPORTED_SOLVERS,
}


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("task", sorted(GENERATED))
def test_reading_the_prompt_scores_full_and_a_constant_none(task, make, made, tiny_tokenizer, chat):
    number = 4 if chat else SAMPLES
    records = make(task, 12288, number, tokenizer=tiny_tokenizer, chat=True) if chat else made(task)
    solved = [{**record, "prediction": SOLVERS[task](record["input"], record["answer_prefix"])} for record in records]
    result = score_predictions(task, solved)
    assert result.value == 100, grades(task, solved)
    assert result.n == number
    blind = score_predictions(task, [{**record, "prediction": "I do not know, 5."} for record in records])
    assert blind.value <= 10


@pytest.mark.parametrize("length", [4096, 16384])
@pytest.mark.parametrize("task", sorted(GENERATED))
def test_prompts_are_full_and_never_too_long(task, make, made, tokenizer, length):
    for record in made(task)[:2] if length == LENGTH else make(task, length, samples=2):
        assert len(prompt_ids(tokenizer, record)) + record["max_new_tokens"] == record["length"]
        assert 0.97 * length <= record["length"] <= length


# One task for each way of building a prompt; the others differ in words and numbers only. What every task took at a
# million tokens is recorded (`ultralong bench samples`), and a test holds the record.
AT_A_MILLION = {
    *("niah_multivalue", "needle", "ruler_vt", "ruler_fwe", "ruler_qa_squad", "babilong_style_qa1", "nonliteral_world"),
    *("infinitebench_passkey", "infinitebench_kv_retrieval", "infinitebench_code_run", "infinitebench_math_calc"),
}


# Their builder is that of a neighbour, whose long sample is made.
SIBLINGS = {
    *("graphwalks_parents", "mrcr_style_4needles", "mrcr_style_8needles"),
    *("oolong_style_user", "oolong_style_timeline"),
}


def _size(task: str):
    length = 1 << 20 if task in AT_A_MILLION else 1 << 17
    return pytest.param(task, length, marks=[pytest.mark.soak] if task in AT_A_MILLION - {"needle"} else [])


@pytest.mark.parametrize(("task", "length"), [_size(task) for task in sorted(set(GENERATED) - SIBLINGS)])
def test_long_samples_have_their_length(task, length, make):
    """What they take is in the recorded rows, not here: a test beside others has no clock of its own."""
    assert set(GENERATED) >= AT_A_MILLION | SIBLINGS
    record = make(task, length)[0]
    assert 0.97 * length <= record["length"] <= length


@pytest.mark.parametrize("task", sorted(GENERATED))
def test_a_sample_can_be_made_again_alone(task, make, made):
    together = made(task)
    assert make(task, first=3)[0] == together[3]
    assert json.loads(json.dumps(together[3])) == together[3]
    assert len({record["input"] for record in together}) == SAMPLES
    assert make(task, first=3, seed=4)[0]["input"] != together[3]["input"]


@pytest.mark.parametrize("task", [name for name in NIAH if name != "niah_multikey_3"])
def test_every_reference_stands_once_where_it_is_said(task, made, tokenizer):
    for record in made(task)[:6]:
        ids, kind = prompt_ids(tokenizer, record), NIAH[task]
        assert len(record["outputs"]) == kind.query_count * kind.value_count == len(record["positions"])
        assert record["input"].count("One of the special magic") >= kind.key_count * kind.value_count
        for output, position in zip(record["outputs"], record["positions"], strict=True):
            assert record["input"].count(output) == 1
            needle = tokenizer(f"One of the special magic {kind.values} for", add_special_tokens=False)["input_ids"]
            assert ids[position : position + len(needle)] == needle


def test_needles_stand_at_every_depth(make):
    depths = [record["depth"] for record in make("niah_single_1", 1024, samples=200)]
    counts, _ = np.histogram(depths, bins=5, range=(0, 1))
    assert counts.min() >= 24, "of 40 expected in each fifth"
    even = [record["depth"] for record in make("needle", 1024, samples=50)]
    counts, _ = np.histogram(even, bins=5, range=(0, 1))
    assert set(counts.tolist()) <= {9, 10, 11}
    questions_at = [record["depth"] for record in make("ruler_qa_squad", samples=100)]
    counts, _ = np.histogram(questions_at, bins=4, range=(0, 1))
    assert counts.min() >= 13, "of 25 expected in each quarter"
    passkeys = [record["depth"] for record in make("infinitebench_passkey", 1024, samples=59)]
    assert passkeys == pytest.approx(np.linspace(0, 1, 59))


def test_word_frequencies_are_those_meant(make):
    text = make("ruler_cwe", 8192)[0]["input"]
    listed = text[text.rindex("Memorize the ones") :]
    entries = re.findall(r"(\d+)\. ([a-z]+)", listed)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    counts = Counter(word for _, word in entries).most_common()
    assert {count for _, count in counts[:10]} == {30}
    assert {count for _, count in counts[10:]} == {3}
    short = make("ruler_cwe", 2048)[0]["input"]
    counts = Counter(re.findall(r"\d+\. ([a-z]+)", short[short.rindex("Memorize the ones") :])).most_common()
    assert {count for _, count in counts[:10]} == {6}

    coded = make("ruler_fwe", 8192)[0]
    words = Counter(coded["input"].split("coded words. ")[1].split("\nQuestion")[0].split(" ")).most_common(5)
    assert words[0][0] == "..."
    assert [word for word, _ in words[1:4]] == coded["outputs"]
    # A zeta law of exponent 2: rank k is k squared times rarer than rank 1.
    assert [count for _, count in words[:4]] == pytest.approx(
        [words[0][1] / rank**2 for rank in (1, 2, 3, 4)], rel=0.01, abs=1
    )


def test_long_word_lists_do_not_stop_at_the_published_list(make):
    short, long = make("ruler_cwe", 8192)[0], make("ruler_cwe", 131072)[0]
    assert short["source"] == "wonderwords"
    assert long["source"] == "made-up words"
    assert long["length"] > 0.97 * 131072


def test_question_documents_hold_the_answer_once_and_repeat_only_others(make, squad):
    for length in (2048, 65536, 262144):
        record = make("ruler_qa_squad", length, first=5)[0]
        blocks = re.split(r"\n*Document \d+:\n", record["input"])[1:]
        blocks[-1] = blocks[-1].split("\n\nAnswer the question")[0]
        held = [block for block in blocks if record["outputs"][0] in block]
        assert len(held) == 1
        data = questions.read_squad(squad)
        assert set(blocks) <= set(data.documents)
        repeats = max(Counter(blocks).values())
        assert (repeats > 1) == (length > 200_000)
    assert len(questions.read_squad(squad).questions) == 800, "questions without an answer are left out"


def test_own_documents_take_the_place_of_the_essays(make):
    documents = prose(seed=9, count=5)
    record = make("niah_single_2", haystack=documents)[0]
    assert record["source"] == "documents given"
    assert documents[0][:100] in record["input"]
    assert make("niah_single_2")[0]["source"] == "test essays"


def test_infinitebench_code_really_calls_as_deep_as_it_says(make):
    for index, levels in enumerate((2, 4, 6, 8, 10)):
        record = make("infinitebench_code_run", first=index, chat=False)[0]
        assert len(record["positions"]) == levels
        assert record["answer_prefix"].startswith(" The value of func_")


def test_what_cannot_be_made_says_why(make, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"no test 'nonsense'.*niah_single_1"):
        find_task("nonsense")
    with pytest.raises(ValueError, match=r"64 tokens are too few: the shortest prompt of this test takes \d+"):
        make("niah_single_1", 64)
    with pytest.raises(ValueError, match="At least one sample"):
        make("needle", samples=0)
    with pytest.raises(ValueError, match="no chat template"):
        make("needle", chat=True)
    with pytest.raises(
        ValueError, match=r"give --data FOLDER \(eval run\) or --questions FILE \(eval make\), with SQuAD"
    ):
        next(make_samples("ruler_qa_squad", tokenizer, 4096, 1))
    broken = tmp_path / "broken.json"
    broken.write_text('{"data": 3}')
    with pytest.raises(ValueError, match="not a SQuAD file"):
        next(make_samples("ruler_qa_squad", tokenizer, 4096, 1, questions=broken))


def test_scores_come_by_length_with_intervals():
    records = [
        {"outputs": ["5"], "prediction": "5" if right else "6", "max_length": length}
        for length, rights in ((4096, [1, 1, 1, 0]), (8192, [0, 0, 0, 1]))
        for right in rights
    ]
    result = score_predictions("needle", records)
    assert (result.value, result.n) == (50, 8)
    assert [(part.length, part.value, part.n) for part in result.by_length] == [(4096, 75, 4), (8192, 25, 4)]
    assert result.low < 50 < result.high
    assert score_predictions("needle", records[:1]).low is None
    for bad in ([], [{"outputs": ["5"]}], [{"prediction": "5"}], [{"outputs": [], "prediction": "5"}]):
        with pytest.raises(ValueError, match=r"no predictions|Record 1 has"):
            score_predictions("needle", bad)


def test_infinitebench_words_its_passkey_by_the_kind_of_model(make, tiny_tokenizer):
    for chat, asked in (
        (True, "memorize them. I will quiz you about the important information there."),
        (False, "memorize it. I will quiz you about the important information."),
    ):
        record = make("infinitebench_passkey", 2048, tokenizer=tiny_tokenizer, chat=chat)[0]
        assert asked in record["input"]
