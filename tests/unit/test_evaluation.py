"""Downstream tasks: data files, task files, scores of models whose answers are known."""

import gzip
import importlib.util
import json
import math
import shutil
from dataclasses import asdict

import pytest
import tokenizers
from conftest import ROOT, pico_config, run_ranks, train_and_save
from tokenizers import decoders, models, pre_tokenizers

from lag_megatron.config import dump_config
from lag_megatron.errors import CheckpointError, DataError, RunError
from lag_megatron.evaluation import harness
from lag_megatron.evaluation.candidates import kept_states
from lag_megatron.evaluation.documents import find_file, read_documents
from lag_megatron.evaluation.scoring import exact_match, normalize, trivia_match
from lag_megatron.evaluation.subject import resolve, tokenizer_of

END = "<|endoftext|>"
LAMBADA = [("The dog ate the", "bone"), ("She read the", "book"), ('He said: "I never', "lie")]
TRIVIA = [
    ("Question: Which vegetable?\nAnswer:", "Onion", ["Bulb onion", "the J. R. Onions"]),
    ("Question: Which city?\nAnswer:", "Washington, D.C.", []),
    ("Question: Which beast?\nAnswer:", "Dik-dik", ["A dik dik"]),
]
TYDI = [
    ("english-1-0", "Finches eat seed.", "What do finches eat?", ["seed", "Seed."]),
    ("english-2-0", "It was 1920, in May.", "When was it?", ["1920", "1920, in May"]),
    ("finnish-3-0", "Se oli 1920.", "Milloin?", ["1920"]),
]
PAGES = [" = One = \n\n A b c .\n\n = = Sub = = \n\n d \n", " = Two words = \n e é f \n"]


def tool():
    spec = importlib.util.spec_from_file_location("evaluate", ROOT / "tools" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(a) for a in arguments])


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tydi_rows():
    return [
        {"id": i, "context": c, "question": q, "answers": {"text": a, "answer_start": [0]}}
        for i, c, q, a in TYDI
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One file for each task, made here."""
    folder = tmp_path_factory.mktemp("data")
    write_lines(folder / "lambada.jsonl", [{"context": c, "continuation": w} for c, w in LAMBADA])
    trivia = [{"context": c, "answer": a, "aliases": more} for c, a, more in TRIVIA]
    write_lines(folder / "triviaqa.jsonl", trivia)
    write_lines(folder / "tydiqa.jsonl", tydi_rows())
    (folder / "wikitext.txt").write_text(" \n" + "".join(PAGES), encoding="utf-8")
    tasks = ("lambada", "triviaqa", "tydiqa", "wikitext")
    return {task: find_file(task, [folder]) for task in tasks}


def oracle(*, right):
    """A model that knows every answer, or one that knows none, and what it was asked."""
    from lm_eval.api.model import LM

    answers = {context: word for context, word in LAMBADA}
    answers |= {context: (more or [answer])[-1].upper() for context, answer, more in TRIVIA}
    answers |= {f"{c}\n\nQuestion: {q}\nAnswer:": a[-1].lower() for _, c, q, a in TYDI}

    def answer_to(prompt):
        return next(answer for context, answer in answers.items() if prompt.endswith(context))

    class Oracle(LM):
        def __init__(self):
            super().__init__()
            self.asked = []

        def loglikelihood(self, requests):
            self.asked.extend(request.args for request in requests)
            return [
                (-1.0, right and target == " " + answer_to(context))
                for context, target in (request.args for request in requests)
            ]

        def generate_until(self, requests):
            self.asked.extend(request.args for request in requests)
            given = [(answer_to(r.args[0]) if right else "none", r.args[1]) for r in requests]
            return [self._cut(f" {text}\nQuestion: more", how["until"]) for text, how in given]

        def loglikelihood_rolling(self, requests):
            return [-2.0 * len(request.args[0].encode()) for request in requests]

        @staticmethod
        def _cut(text, stops):
            for stop in stops:
                text = text.split(stop)[0]
            return text

    return Oracle()


@pytest.mark.parametrize("right", [True, False])
def test_a_model_that_knows_the_answers_scores_1_and_one_that_does_not_0(right, data):
    model = oracle(right=right)
    found = harness.evaluate(model, data)
    for task, metric in (
        ("lambada", "acc"),
        ("triviaqa", "exact_match"),
        ("tydiqa", "exact_match"),
    ):
        assert found[task]["metrics"][metric] == {"value": float(right), "stderr": 0.0}
    assert {task: result["items"] for task, result in found.items()} == {
        "lambada": 3,
        "triviaqa": 3,
        "tydiqa": 2,
        "wikitext": 2,
    }
    assert found["tydiqa"]["passed_over"] == {"in another language": 1}
    wikitext = found["wikitext"]["metrics"]
    assert wikitext["byte_perplexity"]["value"] == pytest.approx(math.exp(2), rel=1e-12)
    size, words = len("".join(PAGES).encode()), len("".join(PAGES).split())
    assert wikitext["word_perplexity"]["value"] == pytest.approx(math.exp(2 * size / words))
    assert_one_shot(model.asked)


def assert_one_shot(asked):
    """Each prompt is another item with its answer, then the item itself without."""
    shots = {c: f"{c} {w}" for c, w in LAMBADA}
    shots |= {c: f"{c} {answer}" for c, answer, _ in TRIVIA}
    whole = {f"{c}\n\nQuestion: {q}\nAnswer:": a[0] for _, c, q, a in TYDI}
    shots |= {prompt: f"{prompt} {answer}" for prompt, answer in whole.items()}
    assert len(asked) == 3 + 3 + 2
    for prompt, _ in asked:
        own = next(context for context in shots if prompt.endswith(context))
        example = prompt.removesuffix(own).removesuffix("\n\n")
        assert example in shots.values()
        assert example != shots[own]


def test_a_table_has_value_error_and_number_of_items(data):
    found = harness.evaluate(oracle(right=True), {t: data[t] for t in ("tydiqa", "wikitext")})
    lines = harness.table(found).splitlines()
    assert lines[0].split() == ["task", "metric", "value", "stderr", "items"]
    assert lines[1].split() == ["tydiqa", "exact_match", "1.0000", "0.0000", "2"]
    assert lines[-1] == "tydiqa: 1 items passed over, in another language"


@pytest.mark.parametrize(
    ("text", "same"),
    [("The  Bulb-Onions!", "bulbonions"), ("an A.B. the", "ab"), ("Theatre", "theatre")],
)
def test_answers_are_normalised_as_squad_does(text, same):
    assert normalize(text) == same


def test_trivia_takes_marks_for_blanks_and_silence_is_never_right():
    assert trivia_match({"answers": ["Jean Paul"]}, ["the Jean-Paul"]) == {"exact_match": 1.0}
    assert exact_match({"answers": ["Jean Paul"]}, ["Jean-Paul"]) == {"exact_match": 0.0}
    for match in (exact_match, trivia_match):
        assert match({"answers": ["Vitamin A", "A"]}, [""]) == {"exact_match": 0.0}


def primary(language, annotations):
    document = "Zebra é finch. It eats seed."
    spans = [(0, 15), (16, 29)]
    return {
        "language": language,
        "question_text": "What does it eat?",
        "document_plaintext": document,
        "passage_answer_candidates": [
            {"plaintext_start_byte": a, "plaintext_end_byte": b} for a, b in spans
        ],
        "annotations": [
            {
                "passage_answer": {"candidate_index": passage},
                "minimal_answer": {"plaintext_start_byte": a, "plaintext_end_byte": b},
            }
            for passage, a, b in annotations
        ],
    }


def test_gold_passages_are_derived_from_the_primary_task(tmp_path):
    rows = [
        primary("english", [(1, 24, 28), (-1, -1, -1), (1, 16, 28), (0, 0, 5)]),
        primary("english", [(1, -1, -1), (-1, -1, -1)]),
        primary("english", [(0, 6, 8)]),
        primary("thai", [(1, 24, 28)]),
    ]
    with gzip.open(tmp_path / "tydiqa-dev.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    found = read_documents("tydiqa", find_file("tydiqa", [tmp_path]))
    assert found.items == [
        {
            "context": "It eats seed.",
            "question": "What does it eat?",
            "answers": ["seed", "It eats seed"],
        },
        {"context": "Zebra é finch.", "question": "What does it eat?", "answers": ["é"]},
    ]
    assert found.passed_over == {"in another language": 1, "without a minimal answer": 1}


def test_nested_squad_files_are_read_too(data, tmp_path):
    paragraphs = [
        {
            "context": row["context"],
            "qas": [
                {
                    "id": row["id"],
                    "question": row["question"],
                    "answers": [{"text": t, "answer_start": 0} for t in row["answers"]["text"]],
                }
            ],
        }
        for row in tydi_rows()
    ]
    path = tmp_path / "tydiqa.json"
    path.write_text(json.dumps({"version": "1", "data": [{"paragraphs": paragraphs}]}, indent=1))
    assert read_documents("tydiqa", path) == read_documents("tydiqa", data["tydiqa"])


BAD = {
    "missing": ("lambada", None, "No such file"),
    "not JSON": ("lambada", "{} {}", "line 1 is no JSON"),
    "a list": ("lambada", "[1]\n[2]", "row 1 is no JSON object"),
    "no field": ("lambada", '{"context": "a"}', "no field 'continuation'"),
    "no text": ("triviaqa", '{"context": "a", "answer": 3}', "'answer' is no text: 3"),
    "aliases": ("triviaqa", '{"context": "a", "answer": "b", "aliases": "c"}', "'aliases' is no"),
    "one item": ("lambada", '{"context": "a", "continuation": "b"}', "1 items .* at least 2"),
    "no gold": ("tydiqa", json.dumps(tydi_rows()[2]), "0 items .* 1 in another language"),
    "no articles": ("wikitext", "some text", "no line like ' = Title = '"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_with_the_form_expected(case, tmp_path):
    task, text, message = BAD[case]
    path = tmp_path / "file.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message) as raised:
        read_documents(task, path)
    assert str(path) in str(raised.value)
    assert "Expected " in str(raised.value)


def test_a_folder_needs_exactly_one_file_of_a_task(tmp_path):
    with pytest.raises(DataError, match="no file for the task lambada"):
        find_file("lambada", [tmp_path])
    for name in ("lambada-a.jsonl", "lambada-b.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(DataError, match="2 files"):
        find_file("lambada", [tmp_path])


def test_without_the_harness_the_command_that_installs_it_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(RunError, match=r"lm_eval is not installed.*pip install .*\[eval\]"):
        harness.require_harness()


# A run directory with a checkpoint and the states of two candidates.


def byte_tokenizer(path):
    """A token a byte, and the end of a document."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END])
    path.parent.mkdir(parents=True)
    backend.save(str(path))


def save(config, folder):
    train_and_save(config, folder, client_state={"model": asdict(config.model)})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    folder, config = runs / "pico", pico_config(seq_length=64)
    run_ranks(save, 1, config, folder / "stage00")
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "run.json").write_text(json.dumps({"data_digest": "abc"}))
    words = {END: 0} | {word: i for i, word in enumerate(["the", "dog", "ate", "bone"], 1)}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token=END))
    backend.add_special_tokens([END])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    (runs / ".cache" / "data" / "abc").mkdir(parents=True)
    backend.save(str(runs / ".cache" / "data" / "abc" / "tokenizer.json"))
    for candidate in ("index0", "index1"):
        shutil.copytree(folder / "stage00" / "step3", folder / "growth01" / candidate / "step3")
    return folder


def test_the_tool_scores_a_run(run, data, tmp_path, capsys):
    out, kept = tmp_path / "out" / "scores.json", tmp_path / "hf"
    options = ["--data", data["lambada"].parent, "--tasks", "lambada,triviaqa"]
    assert tool()(run, *options, "--limit", 2, "--output", out, "--export-dir", kept) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["lambada", "acc"]
    results = json.loads(out.read_text())["results"]
    assert {task: result["items"] for task, result in results.items()} == {
        "lambada": 2,
        "triviaqa": 2,
    }
    assert 0 <= results["lambada"]["metrics"]["acc"]["value"] <= 1
    assert results["lambada"]["metrics"]["perplexity"]["value"] > 1
    capsys.readouterr()
    (tmp_path / "mine").mkdir()
    assert tool()(run, *options, "--export-dir", tmp_path / "mine") == 2
    assert "exists already" in capsys.readouterr().err
    assert tool()(kept, *options, "--limit", 2, "--output", out) == 0  # what was kept, again
    assert json.loads(out.read_text())["results"] == results


def test_the_tool_scores_every_candidate_for_the_report(run, data, capsys):
    options = ["--data", f"lambada={data['lambada']}", "--tasks", "lambada"]
    assert tool()(run, "--candidates", *options) == 0
    assert "growth01/index1" in capsys.readouterr().out
    for candidate in ("index0", "index1"):
        scores = json.loads((run / "growth01" / candidate / "scores.json").read_text())
        assert list(scores) == ["lambada"]
        assert 0 <= scores["lambada"] <= 1


def test_a_uniform_model_has_its_vocabulary_as_perplexity(data, tmp_path):
    import torch
    import transformers

    byte_tokenizer(tmp_path / "hf" / "bytes.json")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "hf" / "bytes.json"), eos_token=END, bos_token=END
    )
    tokenizer.save_pretrained(tmp_path / "hf")
    config = transformers.GPT2Config(
        vocab_size=257, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=256
    )
    model = transformers.GPT2LMHeadModel(config)
    torch.nn.init.zeros_(model.transformer.wte.weight)  # tied: all logits are 0
    model.save_pretrained(tmp_path / "hf")
    found = harness.evaluate(tmp_path / "hf", {"wikitext": data["wikitext"]})
    metrics = found["wikitext"]["metrics"]  # a token is a byte, in windows of 16
    assert metrics["byte_perplexity"]["value"] == pytest.approx(257, rel=1e-5)
    size, words = len("".join(PAGES).encode()), len("".join(PAGES).split())
    assert metrics["word_perplexity"]["value"] == pytest.approx(257 ** (size / words), rel=1e-4)


def test_a_window_with_no_room_for_an_answer_is_refused(data, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_positions": 32}))
    with pytest.raises(RunError, match=r"tydiqa .* 32 tokens .* window of 32"):
        harness.evaluate(tmp_path, {t: data[t] for t in ("lambada", "tydiqa")})


def test_what_cannot_be_evaluated_is_refused(run, tmp_path):
    (tmp_path / "config.yaml").touch()
    (tmp_path / "run.json").touch()
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        resolve(tmp_path)
    with pytest.raises(RunError, match="no candidate's state was kept"):
        kept_states(tmp_path)
    elsewhere = tmp_path / "step3"
    shutil.copytree(run / "stage00" / "step3", elsewhere)
    (tmp_path / "run.json").unlink()
    assert resolve(elsewhere) == elsewhere
    with pytest.raises(DataError, match=r"not in a run directory.*--tokenizer"):
        tokenizer_of(elsewhere, None)
    assert tokenizer_of(run / "stage00" / "step3", None).end_id == 0


def test_wrong_options_are_refused(run, data, capsys):
    assert tool()(run, "--data", data["lambada"].parent, "--tasks", "glue") == 2
    assert "'glue' is no task" in capsys.readouterr().err
    assert tool()(run, "--data", "nowhere") == 2
    assert "neither a folder nor TASK=FILE" in capsys.readouterr().err
    assert tool()(run, "--data", f"lambada={data['lambada']}") == 2
    assert "no file for the task triviaqa" in capsys.readouterr().err
