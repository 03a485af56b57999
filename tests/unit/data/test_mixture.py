"""Several sources with one tokenizer, drawn from by weight."""

import contextlib
import json
import random
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT
from synthetic_run import SyntheticRun

from lag_megatron.config import DataConfig, SourceConfig, TokenizerConfig, parse_config
from lag_megatron.data import (
    PreparedMixture,
    TrainingData,
    ValidationData,
    load_tokenizer,
    open_prepared,
    prepare_data,
)
from lag_megatron.data.datasets.blended_dataset import MIXTURE
from lag_megatron.data.datasets.prepared_dataset import TOKENIZER
from lag_megatron.data.prepare import prepare
from lag_megatron.errors import ConfigError, DataError
from lag_megatron.report import report_data, write_report

WEIGHTS = {"code": 57, "wiki": 17, "web": 17, "papers": 9}
LENGTH, BATCH = 16, 10


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("texts")
    sources = []
    for number, (name, weight) in enumerate(WEIGHTS.items()):
        # Only this source has its letter, so that a sample tells where it comes from.
        draw, letter = random.Random(number), "abcd"[number]
        texts = [letter * draw.randint(20, 200) for _ in range(40)]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        sources.append(SourceConfig(name=name, weight=weight, source="jsonl", paths=(str(path),)))
    return DataConfig(
        mixture=tuple(sources),
        tokenizer=TokenizerConfig(vocab_size=257),
        validation_fraction=0.3,
    )


@pytest.fixture(scope="module")
def mixture(config: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> PreparedMixture:
    made = prepare_data(config, cache_dir=tmp_path_factory.mktemp("cache"))
    assert isinstance(made, PreparedMixture)
    return made


def training(mixture: PreparedMixture, *, global_batch: int = BATCH) -> TrainingData:
    return TrainingData(mixture, seq_length=LENGTH, global_batch=global_batch, seed=7)


def letters(mixture: PreparedMixture, batch: dict[str, torch.Tensor]) -> list[int]:
    """The source of each row, read from its text."""
    tokenizer = mixture.tokenizer()
    text = [tokenizer.decode(row.tolist()).replace("<|endoftext|>", "") for row in batch["tokens"]]
    assert all(len(set(row)) == 1 for row in text)
    return ["abcd".index(row[0]) for row in text]


def test_each_batch_has_its_share_of_each_source(mixture: PreparedMixture) -> None:
    data, seen, total = training(mixture), Counter(), sum(WEIGHTS.values())
    for step in range(20):
        found = letters(mixture, data.batch(step, range(BATCH)))
        assert found == [source for source, _, _ in data.indices(step)]
        seen.update(found)
        for source, weight in enumerate(WEIGHTS.values()):
            assert abs(seen[source] - (step + 1) * BATCH * weight / total) < 1
    assert data.samples_by_source(20) == [seen[source] for source in range(4)]


def test_samples_depend_on_seed_and_step_alone(mixture: PreparedMixture) -> None:
    """Not on the global batch's parts, the order of steps, or what was read before."""
    data, other = training(mixture), training(mixture)
    for step in (31, 0, 7, 7, 300):
        whole = data.batch(step, range(BATCH))
        for ranks in (1, 2, 5):
            size = BATCH // ranks
            parts = [
                other.batch(step, range(rank * size, (rank + 1) * size)) for rank in range(ranks)
            ]
            for key, value in whole.items():
                assert torch.equal(torch.cat([part[key] for part in parts]), value)
    halves = [training(mixture, global_batch=5).batch(step, range(5)) for step in (14, 15)]
    joined = torch.cat([half["tokens"] for half in halves])
    assert torch.equal(joined, data.batch(7, range(BATCH))["tokens"])


def test_every_source_wraps_around_its_own_epochs(mixture: PreparedMixture) -> None:
    data = training(mixture)
    places = [place for step in range(200) for place in data.indices(step)]
    for source, prepared in enumerate(mixture.sources):
        own = [(epoch, index) for found, epoch, index in places if found == source]
        samples = (prepared.data.train_tokens - 1) // LENGTH
        assert own == [divmod(number, samples) for number in range(len(own))]
    assert len({epoch for source, epoch, _ in places if source == 0}) > 3


def test_validation_is_fixed_and_by_weight(mixture: PreparedMixture) -> None:
    options = {"seq_length": LENGTH, "global_batch": BATCH}
    data = ValidationData(mixture, num_tokens=5 * BATCH * LENGTH, **options)
    assert data.num_batches == 5
    found = Counter(
        source
        for number in range(5)
        for source in letters(mixture, data.batch(number, range(BATCH)))
    )
    for source, weight in enumerate(WEIGHTS.values()):
        assert abs(found[source] - 50 * weight / sum(WEIGHTS.values())) < 1
    most = ValidationData(mixture, num_tokens=10**9, **options)
    available = (mixture.sources[0].data.validation_tokens - 1) // LENGTH
    assert 5 < most.num_batches <= available / 0.57 / BATCH + 1
    most.batch(most.num_batches - 1, range(BATCH))
    assert torch.equal(most.batch(4, [3])["tokens"], data.batch(4, [3])["tokens"])
    with pytest.raises(DataError, match=r"validation text of data\.mixture\.\w+ has \d+ tokens"):
        ValidationData(mixture, seq_length=LENGTH, global_batch=10**4, num_tokens=10**9)


def test_a_mixture_is_opened_again(
    config: DataConfig, mixture: PreparedMixture, tmp_path: Path
) -> None:
    assert prepare_data(config, cache_dir=mixture.folder.parent) == mixture
    assert open_prepared(mixture.folder) == mixture
    assert mixture.tokenizer().digest == mixture.sources[2].data.tokenizer().digest
    facts = mixture.facts()
    assert facts["train_tokens"] == sum(source["train_tokens"] for source in facts["sources"])
    assert [source["share"] for source in facts["sources"]] == [0.57, 0.17, 0.17, 0.09]
    sources = (replace(config.mixture[0], weight=1), *config.mixture[1:])
    made = prepare_data(replace(config, mixture=sources), cache_dir=mixture.folder.parent)
    assert made.digest != mixture.digest
    placed = prepare_data(config, cache_dir=tmp_path, output=tmp_path / "out")
    assert sorted(p.name for p in placed.folder.iterdir()) == [
        "code", "mixture.json", "papers", "tokenizer.json", "web", "wiki",
    ]  # fmt: skip
    assert placed.digest == mixture.digest
    moved = placed.folder.rename(tmp_path / "moved")
    again = prepare_data(DataConfig(source="prepared", paths=(str(moved),)), cache_dir=tmp_path)
    assert again.facts() == mixture.facts()


def test_a_source_that_was_moved_is_found_again(
    config: DataConfig, mixture: PreparedMixture, tmp_path: Path
) -> None:
    cache, old = tmp_path / "runs" / "cache", tmp_path / "old"
    shutil.copytree(mixture.sources[0].data.folder, old)

    def prepare(place: Path) -> PreparedMixture:
        ready = replace(config.mixture[0], source="prepared", paths=(str(place),))
        made = prepare_data(replace(config, mixture=(ready, *config.mixture[1:])), cache_dir=cache)
        assert isinstance(made, PreparedMixture)
        assert sorted(path.name for path in made.folder.iterdir()) == [MIXTURE, TOKENIZER]
        return made

    before = prepare(old)
    text = (before.folder / MIXTURE).read_text()
    new = old.rename(tmp_path / "new")
    after = prepare(new)
    assert after.folder == before.folder
    assert after.digest == before.digest
    assert [source.data.folder for source in after.sources] == [
        new, *(source.data.folder for source in before.sources[1:])
    ]  # fmt: skip
    assert (after.folder / MIXTURE).read_text() == text.replace(str(old), str(new))
    link = tmp_path / "link"
    link.symlink_to(after.folder)
    assert open_prepared(link).sources == after.sources


def test_two_processes_prepare_one_mixture(config: DataConfig, tmp_path: Path) -> None:
    """The second finds at its turn what the first has made, whenever it comes."""
    cache, failures, waiting = tmp_path / "cache", [], threading.Event()
    exclusive = prepare.staging_dir.exclusive

    @contextlib.contextmanager
    def slow(folder: Path, *, digest: str, complete: Path) -> Iterator[Path]:
        with exclusive(folder, digest=digest, complete=complete) as made:
            if not complete.is_file():
                assert waiting.wait(60)
            yield made

    def work() -> None:
        try:
            prepare_data(config, cache_dir=cache)
        except Exception as error:
            failures.append(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare.staging_dir, "_tell_waiting", lambda folder: waiting.set())
        staging_dir = SimpleNamespace(exclusive=slow, finish=prepare.staging_dir.finish)
        patch.setattr(prepare, "staging_dir", staging_dir)
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
    assert failures == []
    assert waiting.is_set()
    (folder,) = (path.parent for path in cache.glob(f"*/{MIXTURE}"))
    assert sorted(path.name for path in folder.iterdir()) == [MIXTURE, TOKENIZER]


def test_a_folder_that_is_refused_is_left_as_it_was(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds files that are not prepared data \(notes\.txt\)"):
        prepare_data(config, cache_dir=tmp_path, output=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_prepared_sources_bring_their_tokenizer(
    config: DataConfig, mixture: PreparedMixture, tmp_path: Path
) -> None:
    ready = [
        SourceConfig(name=s.name, weight=s.weight, paths=(str(s.data.folder),))
        for s in mixture.sources[:2]
    ]
    both = replace(config, mixture=(*ready, config.mixture[2]))
    made = prepare_data(both, cache_dir=tmp_path)
    assert made.tokenizer().digest == mixture.tokenizer().digest
    assert made.sources[0].data == mixture.sources[0].data
    file = TokenizerConfig(type="file", path=str(mixture.tokenizer_path))
    assert prepare_data(replace(both, tokenizer=file), cache_dir=tmp_path).digest == made.digest
    trained = TokenizerConfig(vocab_size=270)
    alone = DataConfig(source="jsonl", paths=config.mixture[3].paths, tokenizer=trained)
    other = prepare_data(alone, cache_dir=tmp_path)
    assert load_tokenizer(other.tokenizer_path).digest != mixture.tokenizer().digest
    strange = SourceConfig(name="papers", weight=1, paths=(str(other.folder),))
    differ = (
        r"data\.mixture: the tokenizers differ \(code: 257 tokens with 0 sentinels, digest \w+; "
        r"wiki: .*; papers: 2\d\d tokens .* the same --tokenizer .* and the same --sentinels"
    )
    with pytest.raises(DataError, match=differ):
        prepare_data(replace(config, mixture=(*ready, strange)), cache_dir=tmp_path)
    single = DataConfig(source="prepared", paths=strange.paths, tokenizer=file)
    with pytest.raises(DataError, match=r"data: .* \(data\.paths: .*; data\.tokenizer\.path: 257"):
        prepare_data(single, cache_dir=tmp_path)
    suits = replace(single, paths=ready[0].paths)
    assert prepare_data(suits, cache_dir=tmp_path) == mixture.sources[0].data
    nested = SourceConfig(name="all", weight=1, paths=(str(mixture.folder),))
    with pytest.raises(DataError, match=r"data\.mixture\.all\.paths: .* is a mixture itself"):
        prepare_data(replace(config, mixture=(nested,)), cache_dir=tmp_path)
    with pytest.raises(DataError, match=r"prepared as whole documents, which does not suit"):
        prepare_data(replace(both, objective="mlm"), cache_dir=tmp_path)
    (tmp_path / "empty").mkdir()
    lost = DataConfig(source="prepared", paths=(str(tmp_path / "empty"),))
    with pytest.raises(DataError, match=r"has no meta\.json or mixture\.json"):
        prepare_data(lost, cache_dir=tmp_path)


def test_settings_of_a_mixture_are_checked() -> None:
    def source(name: str, weight: float, **more: object) -> dict[str, object]:
        return {"name": name, "weight": weight, "paths": ["x"], **more}

    tree = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    tree["data"] |= {"mixture": [source("a", 1), source("b", 2)]}
    assert len(parse_config(tree).data.mixture) == 2
    tree["data"]["mixture"] = [
        source("../a", 1),
        source("b", 0),
        source("b", 1, paths=["x", "y"]),
        source("c", 1, source="stdlib"),
        source("d", 1, source="jsonl", paths=[]),
        source("tokenizer.json", 1),
        source("d.part", 1),
    ]
    tree["data"] |= {"source": "jsonl", "paths": ["x"], "text_key": "body"}
    with pytest.raises(ConfigError) as raised:
        parse_config(tree)
    for line in (
        "data.mixture.0.name: must be letters, digits",
        "data.mixture.1.weight: must be above 0 and finite (got 0.0)",
        "data.mixture.2.name: 'b' is taken by another source",
        "data.mixture.2.paths: the source 'prepared' is one folder (got ['x', 'y'])",
        "data.mixture.3.paths: the source 'stdlib' takes no paths",
        "data.mixture.4.paths: the source 'jsonl' needs at least one file",
        "data.mixture.5.name: must not be tokenizer.json, mixture.json",
        "data.mixture.6.name: must not be tokenizer.json, mixture.json",
        "data.source: is not used beside data.mixture, whose sources have their own (got 'jsonl')",
        "data.paths: is not used beside data.mixture, whose sources have their own (got ['x'])",
        "data.text_key: is not used beside data.mixture",
    ):
        assert line in str(raised.value)


def test_the_report_counts_tokens_by_source(mixture: PreparedMixture, tmp_path: Path) -> None:
    run = SyntheticRun(tmp_path / "run")
    path = run.path / "run.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "data": mixture.facts()}))
    run.train(0, until=200)
    config = run.config
    drawn = config.parallel.global_batch * 200
    data = report_data(run.path)
    assert [source["name"] for source in data["sources"]] == list(WEIGHTS)
    for source, weight in zip(data["sources"], WEIGHTS.values(), strict=True):
        samples = source["seen_tokens"] / config.model.seq_length
        assert abs(samples - drawn * weight / 100) < 1
        assert source["epochs"] == source["seen_tokens"] / source["train_tokens"]
    page = write_report(run.path)
    assert "Sources of the text" in page.read_text()
    assert "57.00%" in page.with_suffix(".md").read_text()
