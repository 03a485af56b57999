"""A live engine overwritten in place equals one that loads the grown checkpoint, bit for bit."""

import pytest
from conftest import run_ranks, sparing
from switching import PLANS, config_of, same_files, save_base, switch_in_place

base = pytest.fixture(save_base, scope="module")
QUICK = [(0, "fp32", 1), (3, "fp32", 1), (2, "bf16", 1), (1, "fp32", 2)]
CASES = [
    *((stage, precision, 1) for stage in range(4) for precision in ("fp32", "bf16")),
    *((stage, "fp32", 2) for stage in (0, 1, 3)),
]


@pytest.mark.parametrize(
    ("stage", "precision", "tensor"), sparing(CASES, slow=lambda at: at not in QUICK)
)
def test_in_place_equals_disk(stage, precision, tensor, base, tmp_path):
    config = config_of(stage, precision, tensor, layers=4)
    results = run_ranks(switch_in_place, 2, config, base, tmp_path)
    for losses in results:
        for name, (loaded, grown) in losses.items():
            assert loaded == grown, name
    assert len({tuple(pair[1]) for pair in results[0].values()}) == len(PLANS)
    for name in PLANS:
        assert same_files(tmp_path / f"{name}-loaded", tmp_path / f"{name}-grown") > 0
        assert same_files(tmp_path / f"{name}-saved", tmp_path / f"{name}-written") > 0
