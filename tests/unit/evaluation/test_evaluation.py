"""Downstream tasks: scores of models whose answers are known."""

import json
import math

import pytest
import tokenizers
from evaluating import END, LAMBADA, PAGES, TRIVIA, TYDI, write_tasks
from tokenizers import decoders, models, pre_tokenizers

from lag_megatron.errors import RunError
from lag_megatron.evaluation import harness
from lag_megatron.evaluation.scoring import exact_match, normalize, trivia_match

data = pytest.fixture(write_tasks, scope="module")


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
    lines = harness.format_results(found).splitlines()
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


def test_without_the_harness_the_command_that_installs_it_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(RunError, match=r"lm_eval is not installed.*pip install .*\[eval\]"):
        harness.require_harness()


def byte_tokenizer(path):
    """A token a byte, and the end of a document."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END])
    path.parent.mkdir(parents=True)
    backend.save(str(path))


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
