"""Files of one's own questions: every wrong line told, each question at its length, and no answer to a changed file."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from ultralong import evaluate
from ultralong.cli import main
from ultralong.evaluation.runs.compare import compare_answers
from ultralong.evaluation.runs.run import run
from ultralong.evaluation.runs.settings import RunSettings
from ultralong.evaluation.tasks.groups import expand
from ultralong.evaluation.tasks.own.own_task import lay_out, own_task
from ultralong.evaluation.tasks.own.question_file import read_questions
from ultralong.evaluation.tasks.samples import make_samples, prompt_ids
from ultralong.inference.engines import Answer
from ultralong.utils import settings
from ultralong.utils.files import read_jsonl, sha256

LENGTHS = (400, 1000)
SHORT = "The keeper wrote that no ship had passed."
SCRIPT = "<script>alert(1)</script>"
ROWS = [
    {"question": f"Who wrote {SCRIPT}?", "answers": ["the KEEPER", "a guard"], "context": SHORT, "id": "who"},
    {"question": "Which two?", "answers": ["stone", "wind"], "all": True, "category": "pairs"},
    {"question": "What is in the file?", "answer": " stone ", "context_file": "texts/long.txt", "id": 7},
]


class Scripted:
    """An engine that says one thing to every prompt and keeps the prompts."""

    name = "scripted"

    def __init__(self, tokenizer, said="Surely the keeper, or a stone."):
        self.tokenizer, self.said, self.prompts = tokenizer, said, []

    def max_batch(self, capacity):
        return 2

    def answer(self, prompts, budgets, capacity=0):
        self.prompts += [self.tokenizer.decode(ids) for ids in prompts]
        return [Answer(self.said, (), "stop") for _ in prompts]


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "long.txt").write_text("A stone lies there. " * 60)
    return write(tmp_path / "my-questions.jsonl", ROWS)


@pytest.fixture
def model(tmp_path, make_tiny_model, tiny_tokenizer):
    make_tiny_model(max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def measured(model, tokenizer, file, out, engine=None, **changes):
    wanted = RunSettings(model, (str(file),), **{"lengths": LENGTHS, "chat": False, **changes})
    from transformers import AutoModelForCausalLM

    opened = AutoModelForCausalLM.from_pretrained(model), tokenizer
    return run(wanted, out, opened=opened, engine=engine or Scripted(tokenizer), draw=False, quiet=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_each_question_is_asked_whole_at_the_smallest_length_that_holds_it(
    file, model, tiny_tokenizer, tmp_path, workers
):
    engine = Scripted(tiny_tokenizer)
    result = measured(model, tiny_tokenizer, file, tmp_path / "run", engine, workers=workers)
    (scored,) = result["results"]
    # One of two wanted words, one of two possible ones; then the one of the file.
    assert [(part["length"], part["n"], part["value"]) for part in scored["by_length"]] == [
        (400, 2, 75.0),
        (1000, 1, 100.0),
    ]
    assert scored["task"] == "own_my_questions"
    assert result["capabilities"] == []  # another length holds other questions: no curve
    records = {length: read_jsonl(tmp_path / "run" / f"own_my_questions-{length}.jsonl") for length in LENGTHS}
    assert sorted(record["id"] for record in records[400]) == ["2", "who"]
    assert [record["category"] for record in records[400] if record["id"] == "2"] == ["pairs"]
    (long,) = records[1000]
    assert (long["id"], long["outputs"], long["cut"]) == ("7", ["stone"], 0)
    assert 400 < long["length"] <= 1000
    text = (tmp_path / "texts" / "long.txt").read_text()
    assert engine.prompts[-1] == f"<|bos|>{text}\n\nWhat is in the file?\n\nAnswer:"
    (word,) = settings.load(RunSettings, tmp_path / "run" / "run.yaml").tasks
    assert word == f"{file}@sha256:{read_questions(file).digest}"
    assert compare_answers(tmp_path / "run", tmp_path / "run")[0]["difference"] == 0
    with pytest.raises(ValueError, match=r"There is no folder .*rum: give the --out of"):
        compare_answers(tmp_path / "run", tmp_path / "rum")


def test_prompts_stand_in_the_chat_template_which_counts(file, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for message in messages %}USER {{ message['content'] }} END {% endfor %}SAY "
    made = {record["id"]: record for record in make_samples(str(file), tokenizer, 1000, 3)}
    prompt = prompt_ids(tokenizer, made["who"])
    assert tokenizer.decode(prompt) == f"USER {SHORT}\n\nWho wrote {SCRIPT}? END SAY "
    assert made["who"]["length"] == len(prompt) + 128
    assert made["who"]["answer_prefix"] == ""


def test_the_page_quotes_a_question_as_text(file, model, tmp_path, small_pictures):
    """A tiny model end to end: random, so that all is wrong."""
    result = evaluate(model, str(file), tmp_path / "run", lengths=LENGTHS, chat=False, device="cpu", quiet=True)
    assert [part["n"] for part in result["results"][0]["by_length"]] == [2, 1]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Own questions" in page
    assert ", who</th>" in page
    assert ">Who wrote &lt;script&gt;alert(1)&lt;/script&gt;?</td>" in page
    assert SCRIPT not in page
    again = evaluate(
        model, str(file), tmp_path / "after", lengths=LENGTHS, chat=False, device="cpu", quiet=True,
        before=tmp_path / "run",
    )  # fmt: skip
    assert [(row["length"], row["difference"]) for row in again["compared"]] == [(400, 0.0), (1000, 0.0)]


def test_a_changed_file_is_refused_before_the_model_is_opened(file, model, tiny_tokenizer, tmp_path):
    whole, out = file.read_text(), tmp_path / "run"
    measured(model, tiny_tokenizer, file, out)
    measured(model, tiny_tokenizer, file, out)  # as it was: nothing to do
    pin = settings.load(RunSettings, out / "run.yaml").tasks[0]
    file.write_text(whole.replace("Which two", "Which three"))
    wanted = RunSettings("no model", (str(file),), LENGTHS, chat=False)
    with pytest.raises(ValueError, match=r"my-questions.jsonl has changed: its SHA-256 is"):
        run(wanted, out, quiet=True)
    with pytest.raises(ValueError, match="has changed"):
        expand([pin])
    # Also where the settings say nothing more of it, as another test was run there since.
    saved = settings.load(RunSettings, out / "run.yaml")
    settings.save(RunSettings(saved.model, ("infinitebench_passkey",), chat=False), out / "run.yaml", "")
    with pytest.raises(ValueError, match=r"own_my_questions-\d+.jsonl holds answers to another state"):
        run(wanted, out, quiet=True)
    file.write_text(whole)
    (tmp_path / "texts" / "long.txt").write_text("A bone lies there. " * 60)
    with pytest.raises(ValueError, match="another state of the questions"):
        run(wanted, out, quiet=True)
    measured(model, tiny_tokenizer, file, tmp_path / "new")
    with pytest.raises(ValueError, match="the same file and lengths"):
        compare_answers(out, tmp_path / "new")


def test_lengths_that_would_share_questions_out_again_are_refused(file, model, tiny_tokenizer, tmp_path):
    measured(model, tiny_tokenizer, file, tmp_path / "run")
    with pytest.raises(ValueError, match=r"holds questions of 400 to 1,000 tokens.*at 600: ask at the same lengths"):
        measured(model, tiny_tokenizer, file, tmp_path / "run", lengths=(400, 600, 1000))
    found = measured(model, tiny_tokenizer, write(file, ROWS[:2]), tmp_path / "two", lengths=(400,))
    assert found["results"][0]["n"] == 2
    found = measured(model, tiny_tokenizer, file, tmp_path / "two")  # longer ones are no conflict
    assert [part["n"] for part in found["results"][0]["by_length"]] == [2]


def test_a_question_too_long_is_named_and_never_cut(file, model, tiny_tokenizer, tmp_path):
    counts, too_long = lay_out(file, tiny_tokenizer, [400], False)
    assert counts == {400: 2}
    length = next(make_samples(str(file), tiny_tokenizer, 1000, 1, chat=False, above=400))["length"]
    said = rf"question 7: {length} tokens with its answer, more than the longest length, 400"
    assert list(too_long) == ["7"]
    with pytest.raises(ValueError, match=said):
        measured(model, tiny_tokenizer, file, tmp_path / "strict", lengths=(400,))
    with pytest.raises(ValueError, match=said):
        next(make_samples(str(file), tiny_tokenizer, 400, 1, chat=False))
    found = measured(model, tiny_tokenizer, file, tmp_path / "run", lengths=(400,), skip_missing=True)
    assert found["results"][0]["n"] == 2
    assert "none is cut" in found["skipped"]["own_my_questions, question 7"]
    with pytest.warns(UserWarning, match=r"more questions than are asked \(2 at 400\): --samples 2 asks all"):
        measured(model, tiny_tokenizer, file, tmp_path / "few", samples=1)


GOOD = {"question": "What?", "answer": "stone"}
WRONG = {
    "not valid JSON": '{"question": "What',
    "an object of fields is needed, found a list": "[1]",
    "question is missing": {"answer": "x"},
    "question is empty": {"question": " ", "answer": "x"},
    "question must be a text, found a number (3)": {"question": 3, "answer": "x"},
    "answer or answers is missing": {"question": "What?"},
    "answers is empty": {"question": "What?", "answers": []},
    "an answer is empty": {"question": "What?", "answers": ["x", " \t"]},
    "answers must be a list of texts, found a text (x)": {"question": "What?", "answers": "x"},
    "answers must be a list of texts, found null (None)": {"question": "What?", "answers": ["x", None]},
    "answer must be a text, found a number (42)": {"question": "What?", "answer": 42},
    "answer and answers are both there": GOOD | {"answers": ["x"]},
    "context and context_file are both there": GOOD | {"context": "x", "context_file": "y"},
    "context must be a text, found a list": GOOD | {"context": ["x"]},
    "context_file {folder}/no.txt cannot be read (No such file": GOOD | {"context_file": "no.txt"},
    "context_file {folder}/latin.txt is no text in UTF-8": GOOD | {"context_file": "latin.txt"},
    "the id 'one' is line 1's too": GOOD | {"id": "one"},
    "id must be a text or a whole number, found true or false (True)": GOOD | {"id": True},
    "all must be true or false, found a text (yes)": GOOD | {"all": "yes"},
    "category must be a text, found a number (1)": GOOD | {"category": 1},
    "there is no field contxt; did you mean context?": GOOD | {"contxt": "x"},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_line_is_told_by_its_number(tmp_path, what):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    line = WRONG[what] if isinstance(WRONG[what], str) else json.dumps(WRONG[what])
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join([json.dumps(GOOD | {"id": "one"}), "", line, json.dumps(GOOD)]))
    with pytest.raises(ValueError) as raised:
        run(RunSettings("no model", (str(path),)), tmp_path / "out")
    assert f"{path} cannot be asked. line 3: " in str(raised.value)
    assert what.format(folder=tmp_path) in str(raised.value)
    assert "line 4" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_all_wrong_lines_are_told_at_once_and_files_that_are_none(tmp_path):
    path = write(tmp_path / "q.jsonl", [GOOD, *[{"question": "What?"}] * 12])
    with pytest.raises(ValueError, match=r"line 2: .*line 11: .*; and 2 more\.$"):
        expand([str(path)])
    with pytest.raises(ValueError, match="no file of questions"):
        expand([str(tmp_path / "none.jsonl")])
    with pytest.raises(ValueError, match="holds no questions"):
        expand([str(write(path, []))])
    with pytest.raises(ValueError, match="own_q is a test of a file: name the file"):
        expand(["own_q"])
    (tmp_path / "b").mkdir()
    names = [str(write(tmp_path / "q.jsonl", [GOOD])), str(write(tmp_path / "b" / "q.jsonl", [GOOD]))]
    with pytest.raises(ValueError, match="would both be called own_q: rename one"):
        expand(names)
    assert read_questions(path).digest == sha256(path)  # what sha256sum says, where no other file is read
    assert own_task(str(path)).name == "own_q"


def test_make_answer_and_score_take_a_file(file, model, tmp_path, capsys):
    made = tmp_path / "made.jsonl"
    main(["eval", "make", str(file), "--length", "1k", "--samples", "3", "--tokenizer", model, "--out", str(made)])
    assert "3 samples" in capsys.readouterr().out
    records = [record | {"prediction": "stone"} for record in read_jsonl(made)]
    main(["eval", "score", str(file), str(write(tmp_path / "answers.jsonl", records))])
    assert "own_my_questions  50.0" in capsys.readouterr().out
    arguments = [
        "eval",
        "answer",
        model,
        "--tasks",
        str(file),
        "--lengths",
        "400",
        "1000",
        "--out",
        str(tmp_path / "a"),
    ]
    main([*arguments, "--device", "cpu"])
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["400", "1,000"]
    write(file, ROWS[:2])
    for again in (arguments, ["eval", "make", str(file), "--length", "1k", "--samples", "4", "--tokenizer", model,
                              "--out", str(made)]):  # fmt: skip
        with pytest.raises(SystemExit):
            main(again)
        assert "another state of the questions" in " ".join(capsys.readouterr().err.split())
