"""LV-Eval and InfiniteBench's published sets: the official scores, prompts as published, texts cut in the middle."""

# ruff: noqa: RUF001 - Chinese has marks of its own
import json
import random
import string
import sys
import zipfile
from collections import Counter

import pytest

from ultralong.evaluation.measures.score import grades
from ultralong.evaluation.tasks.published import INFINITEBENCH_PUBLISHED, LVEVAL_TASKS, reader, scores
from ultralong.evaluation.tasks.published.catalogue import catalogue, idle_words, marks
from ultralong.evaluation.tasks.published.scores import rouge_l, rouge_lsum_f
from ultralong.evaluation.tasks.samples import find_task, make_samples, prompt_ids

CONTEXT = " ".join(f"Passage {number} says that stone {number} is at place {number * 7}." for number in range(400))


def approx(value):
    return pytest.approx(value, abs=1e-12)


MARTIN = (
    "There is no mention of Martin or independent publishing of digital books in the passage. The passage "
    "appears to be about a research paper on contour completion using deep structure priors.",
    "Martin began independent publishing her books as digital books in 2020.",
)


# What LV-Eval's authors print of their own metric (info/error_cases_and_metric_cases.md).
@pytest.mark.parametrize(
    ("score", "answer", "reference", "keywords", "expected"),
    [
        ("english_f1", *MARTIN, None, 0.30769230769230765),
        ("gated_english_f1", *MARTIN, "2020", 0.0),
        (
            "gated_english_f1",
            "For services to Medicine and to the community in the Cayman Islands.",
            "For his services to music.",
            "services to music",
            0.4,
        ),
        ("english_f1", "Low mechanical flexibility.", "Increased mechanical flexibility.", None, 0.6666666666666666),
        ("english_f1", "Ludwig Beethoven.", "Ludwig Beethoven", None, 1.0),
        ("english_f1", "David Beckham.", "Ludwig Beethoven", None, 0.0),
    ],
)
def test_english_scores_are_those_that_the_authors_print(score, answer, reference, keywords, expected):
    assert getattr(scores, score)(answer, [reference, answer], keywords) == approx(expected), "the first counts alone"


# Computed with the authors' metrics.py, jieba 0.42.1 and rouge 1.0.1.
DIRECTOR = (
    "根据文章26中的内容，电影《毕业风暴》的导演是提莫·贝克曼贝托夫（TimurBekmambetov）。",
    "《毕业风暴》的导演是罗马尼亚导演克里斯汀穆基。",
)


@pytest.mark.parametrize(
    ("score", "answer", "reference", "keywords", "expected"),
    [
        ("chinese_f1", *DIRECTOR, None, 0.41379310344827586),
        ("gated_chinese_f1", *DIRECTOR, "克里斯汀穆基", 0.0),
        ("gated_chinese_f1", "导演是克里斯汀穆基。", DIRECTOR[1], "克里斯汀穆基", 0.625),
        ("gated_chinese_f1", "上海位于长江口。", "上海位于中国东部。", None, 0.0),
        ("chinese_f1", "贝多芬。", "贝多芬", None, 1.0),
        (
            "chinese_rouge_l",
            "首先根据导演的电影，然后是北京大学。",
            "电影导演毕业于北京大学。",
            None,
            0.5714285665306124,
        ),
    ],
)
def test_chinese_scores_are_the_official_ones(score, answer, reference, keywords, expected):
    pytest.importorskip("jieba")
    assert getattr(scores, score)(answer, [reference], keywords) == approx(expected)


def test_chinese_scores_name_the_package_they_need(monkeypatch):
    scores._segmenter.cache_clear()
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ImportError, match=r"pip install 'ultralong\[eval\]'"):
        scores.chinese_f1("a", ["b"])


def plain_f1(said, wanted):
    """F1 by counting pairs one by one, as nobody would write it for speed."""
    left, same = list(wanted), 0
    for token in said:
        if token in left:
            left.remove(token)
            same += 1
    return 2 * same / (len(said) + len(wanted)) if same else 0.0


def plain_gate(said, keys, idle):
    left, same = list(keys), 0
    for token in said:
        if token in left:
            left.remove(token)
            same += token not in idle
    return same / len(keys)


def test_gates_stand_where_the_code_has_them_and_not_the_paper(monkeypatch):
    """Against counting by hand on random answers; characters stand in for jieba's words."""
    monkeypatch.setattr(scores, "_segmenter", lambda: list)
    draw = random.Random(0)
    english = ["stone", "river", "of", "the", "An", "in", "night,", "door", "(wall)", "seven"]
    chinese = "的和电影导演风暴，。北京是A"
    seen = Counter()
    for _ in range(400):
        said, wanted, keys = (" ".join(draw.choices(english, k=draw.randint(1, 9))) for _ in range(3))
        tokens = [
            [
                word
                for word in text.lower().translate(str.maketrans("", "", string.punctuation)).split()
                if word not in ("a", "an", "the")
            ]
            for text in (said, wanted, keys)
        ]
        share = plain_gate(tokens[0], tokens[2], idle_words("en")) if tokens[2] else 1.0
        expected = plain_f1(*tokens[:2]) if share >= 0.2 else 0.0
        assert scores.gated_english_f1(said, [wanted], keys) == approx(expected)
        seen["english", share >= 0.2, share >= 0.4] += 1
        said, wanted, keys = ("".join(draw.choices(chinese, k=draw.randint(1, 9))) for _ in range(3))
        tokens = [[mark for mark in text.lower() if mark not in "，。"] for text in (said, wanted, keys)]
        share = plain_gate(tokens[0], tokens[2], idle_words("zh")) if tokens[2] else 1.0
        expected = plain_f1(*tokens[:2]) if share >= 0.4 else 0.0
        assert scores.gated_chinese_f1(said, [wanted], keys) == approx(expected)
        assert scores.best_chinese_f1(said, [wanted, keys]) == approx(
            max(plain_f1(tokens[0], part) for part in tokens[1:])
        )
        seen["chinese", share >= 0.2, share >= 0.4] += 1
    assert min(seen.values()) > 20, "every side of both gates was met"
    assert len(seen) == 6


def test_rouge_equals_the_packages_that_the_official_code_calls():
    # Computed with rouge 1.0.1 and rouge-score 0.1.2 (no stemmer).
    assert rouge_l(
        "the cat sat on the mat. it slept all day", "a cat sat on a mat all day. it purred. the end"
    ) == approx(0.79999999505)
    said = "The keeper wrote in his log.\nNo ship had passed that night.\nThe tide came in."
    wanted = "No ship passed.\nThe keeper of the lighthouse wrote that the tide came in at dawn."
    assert rouge_lsum_f(said, wanted) == approx(0.6875)
    assert rouge_lsum_f("the the the cat", "the cat\nthe dog") == approx(0.75), "no word counts twice"
    assert rouge_l("", "x") == rouge_l(".", "x") == rouge_lsum_f("", "x") == rouge_lsum_f("x", "\n") == 0


@pytest.mark.parametrize("package", ["rouge", "rouge_score"])
def test_rouge_equals_the_installed_package(package):
    theirs = pytest.importorskip(package)
    draw = random.Random(1)
    words = ["the", "cat", "sat", "on", "mat.", "it's", "Tide", "\n", "log.\n", "ship", ".", "caf\u00e9"]
    for _ in range(300):
        said, wanted = (" ".join(draw.choices(words, k=draw.randint(1, 30))) for _ in range(2))
        if package == "rouge":
            try:
                expected = theirs.Rouge().get_scores([said], [wanted], avg=True)["rouge-l"]["f"]
            except ValueError:
                expected = 0.0
            assert rouge_l(said, wanted) == approx(expected)
        else:
            from rouge_score.rouge_scorer import RougeScorer

            expected = RougeScorer(["rougeLsum"]).score(wanted, said)["rougeLsum"].fmeasure
            assert rouge_lsum_f(said, wanted) == approx(expected)


# Each line was run through InfiniteBench's compute_scores.py of June 2024.
@pytest.mark.parametrize(
    ("score", "references", "right", "wrong"),
    [
        (
            scores.chosen_letter,
            ["the tower", "A"],
            [
                "A",
                "A. the tower",
                " A\n",
                "the tower",
                "The answer is: A",
                "the answer is the tower",
                "I say A",
                "Answer: x A",
            ],
            ["", "B", "BA", "The answer is: B, not A", "I say AB, that is A", "maybe", "answer is:"],
        ),
        (
            scores.named_bug,
            ["foo_bar", "B"],
            [
                "B. foo_bar",
                "B: yes",
                "The answer is: B",
                "The correct option is: B",
                "The bug is: `foo_bar`",
                "Answer is: foo_bar",
            ],
            ["B", "foo_bar", "A. foo_bar", "The answer is B", "The answer is: A, not B", "", "it is:"],
        ),
        (
            scores.named_character,
            ["JOHN"],
            ["John", "It is John.", '"john"', "MARY: JOHN?", "Johnny"],
            ["Mary", "", "Jo hn"],
        ),
        # Mended by the authors after their code of June 2024: names of two words, and any of several names.
        (scores.named_character, ["STAMP PAID"], ["Stamp Paid", "It is STAMP PAID."], ["Stamp", "Paid Stamp"]),
        (scores.named_character, ["ECKER", "COMMANDER BILL ECKER"], ["Ecker", "Commander Bill Ecker"], ["Bill"]),
        (scores.named_character, ["BILL", "ECKER"], ["Ecker", "bill"], ["John"]),
    ],
)
def test_choices_are_judged_as_by_the_official_code(score, references, right, wrong):
    assert [answer for answer in right if score(answer, references) != 1] == []
    assert [answer for answer in wrong if score(answer, references) != 0] == []


def lveval_row(number, **change):
    return {
        "input": f"Where is stone {number}?",
        "context": CONTEXT,
        "answers": [f"at place {number * 7}"],
        "length": 99,
        "dataset": "cmrc_mixup",
        "language": "en",
        "answer_keywords": f"place {number * 7}",
        "confusing_facts": "none",
        **change,
    }


def infinitebench_row(number, **change):
    return {
        "id": number,
        "context": CONTEXT + " {input} {A}",
        "input": f"Where is stone {number}?",
        "answer": [f"place {number}"],
        "options": [f"place {number + shift}" for shift in range(-2, 2)],
        **change,
    }


def write(path, content):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in LVEVAL_TASKS:
        write(folder / f"{name.removeprefix('lveval_')}.jsonl", map(lveval_row, range(12)))
    for name in INFINITEBENCH_PUBLISHED:
        write(folder / f"{name.removeprefix('infinitebench_')}.jsonl", map(infinitebench_row, range(12)))
    return folder


def test_there_are_eleven_sets_of_five_levels_and_six_sets():
    assert len(LVEVAL_TASKS) == 55
    assert sorted({task.max_new_tokens for task in LVEVAL_TASKS.values()}) == [16, 64]
    assert {name: task.max_new_tokens for name, task in INFINITEBENCH_PUBLISHED.items()} == {
        "infinitebench_longbook_sum_eng": 1200,
        "infinitebench_longbook_qa_eng": 40,
        "infinitebench_code_debug": 5,
        "infinitebench_longbook_choice_eng": 40,
        "infinitebench_longdialogue_qa_eng": 40,
        "infinitebench_longbook_qa_chn": 40,
    }
    assert (len(idle_words("en")), len(idle_words("zh"))) == (38, 85)
    assert {"。", ".", "》"} <= marks()
    assert "《" not in marks(), "the authors' list leaves it out"
    for benchmark in ("lveval", "infinitebench"):
        for known in catalogue(benchmark).values():
            for prompt in filter(None, (known.prompt, known.plain)):
                assert prompt.count("{context}") == 1
                assert (known.language == "zh") == (not prompt.replace("{context}", "").isascii())
    for name in ("nonsense", "lveval_cmrc_mixup_8k"):
        with pytest.raises(ValueError, match=r"no test .*niah_single_1.*lveval_SET_LEVEL"):
            find_task(name)


@pytest.mark.parametrize(
    "task", ["lveval_loogle_CR_mixup_16k", "lveval_factrecall_zh_256k", *sorted(INFINITEBENCH_PUBLISHED)]
)
def test_prompts_hold_text_question_and_references(task, data, tiny_tokenizer):
    records = list(make_samples(task, tiny_tokenizer, 1 << 17, 12, 3, questions=data, chat=False))
    assert sorted(record["row"] for record in records) == list(range(12))
    assert [record["row"] for record in records] != list(range(12)), "neighbours are alike: rows are shuffled"
    for record in records:
        number = record["row"]
        assert record["input"].count(CONTEXT) == 1
        assert record["cut"] == 0
        assert len(prompt_ids(tiny_tokenizer, record)) + record["max_new_tokens"] == record["length"]
        if task.split("_")[1] not in ("code", "longdialogue") and "sum" not in task:
            assert f"Where is stone {number}?" in record["input"]
        if task.startswith("lveval"):
            assert record["outputs"] == [f"at place {number * 7}"]
            assert record["keywords"] == f"place {number * 7}"
        else:
            assert "{input} {A}" in record["input"], "braces of the text are text"
            letter = ["C"] if "choice" in task or "debug" in task else []
            assert record["outputs"] == [f"place {number}", *letter]
            assert record["answer_prefix"], "a model without a template gets the cue of its set"
    alone = next(make_samples(task, tiny_tokenizer, 1 << 17, 1, 3, first=5, questions=data, chat=False))
    assert alone == records[5]
    chatted = next(make_samples(task, tiny_tokenizer, 1 << 17, 1, 3, questions=data))
    assert chatted["answer_prefix"] == ""
    assert len(list(make_samples(task, tiny_tokenizer, 1 << 17, 9, 3, first=8, questions=data))) == 4, "12 rows in all"


@pytest.mark.parametrize("length", [512, 4097])
def test_what_is_too_long_loses_its_middle(length, data, tiny_tokenizer):
    task = "lveval_loogle_SD_mixup_64k"
    whole = next(make_samples(task, tiny_tokenizer, 1 << 17, 1, questions=data))
    short = next(make_samples(task, tiny_tokenizer, length, 1, questions=data))
    assert length - 8 <= short["length"] <= length
    assert len(prompt_ids(tiny_tokenizer, short)) + 64 == short["length"]
    assert abs(whole["length"] - short["cut"] - short["length"]) <= 4
    start = next(size for size in range(len(short["input"]), 0, -1) if whole["input"].startswith(short["input"][:size]))
    assert whole["input"].endswith(short["input"][start:])
    tokens = [
        len(tiny_tokenizer(part, add_special_tokens=False)["input_ids"])
        for part in (short["input"][:start], short["input"][start:])
    ]
    assert abs(tokens[0] - tokens[1]) <= 4, "as much of the beginning as of the end"
    with pytest.raises(ValueError, match=r"100 tokens are too few: frame and answer of this test take \d+"):
        next(make_samples(task, tiny_tokenizer, 100, 1, questions=data))


def test_keywords_travel_with_the_answer(data, tiny_tokenizer):
    task = "lveval_multifieldqa_en_mixup_16k"
    records = [
        {**record, "prediction": answer}
        for record, answer in zip(
            make_samples(task, tiny_tokenizer, 4096, 3, questions=data),
            ("It is at place {}.", "It is at the", "at place 5 or somewhere"),
            strict=True,
        )
    ]
    records[0]["prediction"] = records[0]["prediction"].format(records[0]["row"] * 7)
    assert grades(task, records) == [approx(2 * 3 / 8), 0.0, approx(2 * 2 / 8)]
    without = [{**record, "keywords": None} for record in records]
    assert grades(task, without)[1] == approx(2 * 1 / 6), "no keywords, no gate"


def test_data_is_found_as_a_file_in_a_folder_or_in_its_archive(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(reader, "DEFAULT_CACHE", tmp_path / "cache")
    name, task = "lic_mixup_32k", "lveval_lic_mixup_32k"
    file = write(tmp_path / f"{name}.jsonl", [lveval_row(3)])
    from_file = list(make_samples(task, tiny_tokenizer, 8192, 5, questions=file))
    assert len(from_file) == 1
    archive = tmp_path / "zipped" / "deep" / "lic_mixup.zip"
    archive.parent.mkdir(parents=True)
    with zipfile.ZipFile(archive, "w") as opened:
        opened.write(file, f"lic_mixup/{name}.jsonl")
    for given in (tmp_path / "zipped", archive):
        record = next(make_samples(task, tiny_tokenizer, 8192, 1, questions=given))
        assert record["input"] == from_file[0]["input"]
    with pytest.raises(ValueError, match=r"lic_mixup.zip holds no lic_mixup_64k.jsonl"):
        next(make_samples("lveval_lic_mixup_64k", tiny_tokenizer, 8192, 1, questions=tmp_path / "zipped"))
    archive.write_bytes(b"PK")
    with pytest.raises(ValueError, match="not a whole zip archive"):
        next(make_samples(task, tiny_tokenizer, 8192, 1, questions=tmp_path / "zipped"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"holds no lic_mixup_32k.jsonl or lic_mixup.zip.*Infinigence/LVEval"):
        next(make_samples(task, tiny_tokenizer, 8192, 1, questions=empty))
    with pytest.raises(ValueError, match=r"holds no code_debug.jsonl: .*xinrongzhang2022/InfiniteBench"):
        next(make_samples("infinitebench_code_debug", tiny_tokenizer, 8192, 1, questions=empty))


def test_no_hub_and_no_files_says_where_to_get_them(tiny_tokenizer, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for task, file in (
        ("lveval_cmrc_mixup_16k", "cmrc_mixup.zip"),
        ("infinitebench_longbook_qa_eng", "longbook_qa_eng.jsonl"),
    ):
        with pytest.raises(ValueError, match=rf"neither on this machine.*Fetch {file} of the data set .*--questions"):
            next(make_samples(task, tiny_tokenizer, 8192, 1))


def test_the_hub_is_asked_for_the_authors_files(tiny_tokenizer, monkeypatch, data):
    asked = []

    def download(repository, file, repo_type):
        asked.append((repository, file, repo_type))
        return str(data / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    next(make_samples("infinitebench_longbook_qa_chn", tiny_tokenizer, 8192, 1))
    assert asked == [("xinrongzhang2022/InfiniteBench", "longbook_qa_chn.jsonl", "dataset")]


def test_broken_rows_are_named(tiny_tokenizer, tmp_path):
    task = "infinitebench_longbook_choice_eng"
    for content, message in (
        ([infinitebench_row(1, answer=["nowhere"])], "none of the options"),
        ([{"context": "x", "input": "y"}], "has no answer and no options"),
        ([3], "not a record"),
        ([], "no rows"),
    ):
        path = write(tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl", content)
        with pytest.raises(ValueError, match=message):
            next(make_samples(task, tiny_tokenizer, 8192, 1, questions=path))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"context": \n')
    with pytest.raises(ValueError, match="row 1: not valid JSON"):
        next(make_samples(task, tiny_tokenizer, 8192, 1, questions=broken))
