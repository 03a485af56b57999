"""From a configuration with an objective to micro-batches of ranks."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import pico_config
from sample_text import stories

from lag_megatron.config import (
    DataConfig,
    MlmConfig,
    RunConfig,
    SourceConfig,
    TokenizerConfig,
    Ul2Config,
)
from lag_megatron.config.validation.run import find_problems
from lag_megatron.data import BatchLoader, Prepared, prepare_data
from lag_megatron.data.preview import describe_samples
from lag_megatron.errors import DataError

SEQ_LENGTH = 32
GLOBAL_BATCH = 8
WORDPIECE = TokenizerConfig(type="wordpiece", vocab_size=300, sentinels=16)
BPE = TokenizerConfig(vocab_size=300, sentinels=16)
CAUSAL_KEYS = {"tokens", "labels", "loss_mask", "position_ids"}
MLM_KEYS = CAUSAL_KEYS | {"token_types", "padding_mask", "masked_positions"}
OBJECTIVES = {
    "causal": ({"tokenizer": BPE}, CAUSAL_KEYS),
    "mlm": ({"objective": "mlm", "tokenizer": WORDPIECE}, MLM_KEYS),
    "mlm_order": (
        {"objective": "mlm", "tokenizer": WORDPIECE, "mlm": MlmConfig(sentence_pairs="order")},
        MLM_KEYS | {"sentence_labels"},
    ),
    "mlm_next": (
        {
            "objective": "mlm",
            "tokenizer": WORDPIECE,
            "mlm": MlmConfig(sentence_pairs="next", whole_word=True),
        },
        MLM_KEYS | {"sentence_labels"},
    ),
    "ul2": ({"objective": "ul2", "tokenizer": BPE}, CAUSAL_KEYS | {"prefix_length"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    lines = [json.dumps({"text": text}) + "\n" for text in stories(120)]
    (folder / "corpus.jsonl").write_text("".join(lines))
    return folder


def config_of(folder: Path, name: str) -> RunConfig:
    pico = pico_config(seq_length=SEQ_LENGTH)
    data = DataConfig(
        source="jsonl",
        paths=(str(folder / "corpus.jsonl"),),
        validation_fraction=0.3,
        validation_tokens=2 * GLOBAL_BATCH * SEQ_LENGTH,
        **OBJECTIVES[name][0],
    )
    parallel = dataclasses.replace(pico.parallel, global_batch=GLOBAL_BATCH, micro_batch=2)
    return dataclasses.replace(pico, data=data, parallel=parallel)


def prepared_for(config: RunConfig, folder: Path) -> Prepared:
    return prepare_data(config.data, cache_dir=folder / "cache")


def loaders(
    config: RunConfig, folder: Path, *, ranks: int, prefetch: bool = False
) -> list[BatchLoader]:
    prepared = prepared_for(config, folder)
    return [
        BatchLoader(
            prepared, config, SimpleNamespace(data_rank=rank, data_size=ranks), prefetch=prefetch
        )
        for rank in range(ranks)
    ]


def whole(batches: list[list[dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """The global batch of all ranks' micro-batches."""
    parts = [micro for rank in batches for micro in rank]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_batches_of_an_objective(folder: Path, name: str) -> None:
    config = config_of(folder, name)
    _, keys = OBJECTIVES[name]
    (alone,) = loaders(config, folder, ranks=1)
    width = config.data.mlm.predictions(SEQ_LENGTH) if "mlm" in name else SEQ_LENGTH
    shapes = dict.fromkeys(keys, (2, SEQ_LENGTH)) | dict.fromkeys(
        ("labels", "loss_mask"), (2, width)
    )
    shapes |= {"masked_positions": (2, width), "sentence_labels": (2,), "prefix_length": (2,)}
    for micro in (*alone.micro_batches(0), *next(alone.validation())):
        assert {key: tuple(value.shape) for key, value in micro.items()} == {
            key: shapes[key] for key in keys
        }
        floats = {key for key, value in micro.items() if value.dtype == torch.float32}
        assert floats == {"loss_mask"}
        assert micro["loss_mask"].any(dim=1).all(), "a sample without anything to predict"


def test_batches_made_ahead_are_the_same(folder: Path) -> None:
    config = config_of(folder, "mlm")
    (plain,) = loaders(config, folder, ranks=1)
    (prefetching,) = loaders(config, folder, ranks=1, prefetch=True)
    half = SimpleNamespace(data_rank=1, data_size=2)
    for one, other in ((plain, prefetching), (plain.for_world(half), prefetching.for_world(half))):
        for step in (0, 1, 2, 7, 3, 3):
            assert same(one.micro_batches(step), other.micro_batches(step))
        next(other.validation())  # given up after the first batch
        parts = zip(one.validation(), other.validation(), strict=True)
        assert all([same(*pair) for pair in parts])


def same(one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_global_batch_does_not_depend_on_the_ranks(folder: Path, name: str) -> None:
    config = config_of(folder, name)
    (alone,) = loaders(config, folder, ranks=1)
    four = loaders(config, folder, ranks=4)
    steps = [0, 40, 3, 40]  # passes of the text end between them
    for step in steps:
        expected = whole([alone.micro_batches(step)])
        found = whole([loader.micro_batches(step) for loader in four])
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    fixed = [whole([batch]) for batch in alone.validation()]
    again = [whole(list(batches)) for batches in zip(*(f.validation() for f in four), strict=True)]
    assert len(fixed) == len(again) == 2
    for expected, found in zip(fixed, again, strict=True):
        assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_passes_differ(folder: Path, name: str) -> None:
    config = config_of(folder, name)
    (loader,) = loaders(config, folder, ranks=1)
    samples = loader._training.samples_per_epoch
    text = [whole([loader.micro_batches(step)])["tokens"] for step in range(samples // 2)]
    rows = torch.cat(text)[: 2 * samples]
    assert not torch.equal(rows[:samples], rows[samples : 2 * samples])


def test_samples_are_described(folder: Path) -> None:
    config = config_of(folder, "ul2")
    text = describe_samples(prepared_for(config, folder), config, count=40)
    assert text.count("--- sample ") == 40
    assert "[[[S]" in text
    assert "<extra_id_0>" in text
    assert "]]{" in text
    lines = dict(line.split(": ") for line in text.split("--- measured over")[1].splitlines()[1:])
    assert {"causal", "prefix [S]", "predicted"} <= lines.keys()
    assert any(name.startswith("span [") for name in lines)
    config = config_of(folder, "mlm_order")
    text = describe_samples(prepared_for(config, folder), config, count=3)
    assert text.count("sentence label: ") == 3
    assert "{[MASK] -> " in text
    assert "[CLS] " in text
    assert "predicted: 15" in text
    assert "masked: " in text


def test_text_too_short_for_one_batch_of_sentences(folder: Path) -> None:
    config = config_of(folder, "mlm")
    parallel = dataclasses.replace(config.parallel, global_batch=4096)
    with pytest.raises(DataError, match=r"samples .* one global batch"):
        loaders(dataclasses.replace(config, parallel=parallel), folder, ranks=1)


@pytest.mark.parametrize(
    ("data", "model", "message"),
    [
        ({"mlm": MlmConfig(whole_word=True)}, {}, "data.mlm: .* 'mlm' .got 'causal'.. Remove it"),
        (
            {"objective": "mlm", "ul2": Ul2Config(mode_tokens=False)},
            {},
            "data.ul2: is for the objective 'ul2' .got 'mlm'.",
        ),
        ({"objective": "mlm"}, {}, "data.tokenizer.type: .* 'wordpiece'"),
        ({"objective": "mlm", "mlm": MlmConfig(probability=1.0)}, {}, "data.mlm.probability: "),
        ({"objective": "mlm"}, {"sentence_head": True}, "data.mlm.sentence_pairs: .* 'none'"),
        (
            {"objective": "mlm", "mlm": MlmConfig(sentence_pairs="next")},
            {},
            "model.sentence_head: .* 'next'",
        ),
        ({"objective": "mlm"}, {"seq_length": 4}, "model.seq_length: .* at least 5"),
        ({"objective": "ul2"}, {}, r"data.tokenizer.sentinels: .* needs \d+ .* got 0"),
        ({"objective": "ul2", "ul2": Ul2Config(span=0.3)}, {}, "data.ul2: the shares .* = 1.1"),
        (
            {"objective": "ul2", "ul2": Ul2Config(causal=1.2, span=-0.4)},
            {},
            r"data.ul2.causal: .* \(got 1.2\)",
        ),
        (
            {"objective": "ul2", "ul2": Ul2Config(span_denoisers=((3.0, 1.0),))},
            {},
            r"data.ul2.span_denoisers.0: .* \(0, 1\)",
        ),
        (
            {"objective": "ul2", "ul2": Ul2Config(span_denoisers=((0.5, 0.15),))},
            {},
            "data.ul2.span_denoisers.0: the mean length",
        ),
        (
            {"objective": "ul2", "ul2": Ul2Config(span_denoisers=())},
            {},
            "data.ul2.span_denoisers: at least one",
        ),
        ({"objective": "ul2"}, {"seq_length": 4}, "model.seq_length: 4 has no room"),
        ({"tokenizer": TokenizerConfig(path="x")}, {}, "data.tokenizer.path: only the type 'file'"),
        ({"tokenizer": TokenizerConfig(sentinels=-1)}, {}, "data.tokenizer.sentinels: must be 0"),
        (
            {"tokenizer": TokenizerConfig(type="wordpiece", vocab_size=100)},
            {},
            "data.tokenizer.vocab_size: WordPiece .* at least 257",
        ),
    ],
)
def test_settings_that_cannot_work(data: dict, model: dict, message: str) -> None:
    config = dataclasses.replace(pico_config(**model), data=DataConfig(**data))
    found = "\n".join(find_problems(config))
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(found)


@pytest.mark.parametrize("objective", ["mlm", "ul2"])
def test_only_a_prepared_folder_tells_its_tokenizer(objective: str) -> None:
    data = DataConfig(source="prepared", paths=("folder",), objective=objective)
    ready = SourceConfig(name="ready", weight=1, paths=("folder",))
    lines = SourceConfig(name="lines", weight=1, source="jsonl", paths=("x",))
    mixed = DataConfig(mixture=(lines, ready), objective=objective)
    for known in (data, mixed):
        problems = find_problems(dataclasses.replace(pico_config(), data=known))
        assert not [problem for problem in problems if "data.tokenizer" in problem]
    problems = find_problems(
        dataclasses.replace(pico_config(), data=dataclasses.replace(mixed, mixture=(lines,)))
    )
    assert [problem for problem in problems if "data.tokenizer" in problem]
