"""Each altered file ends in one error that names it, or in the sound file's result."""

import checkpoint_kinds
import pytest
from conftest import sparing
from kinds import KINDS
from trials import Folders, Trials, try_kind

_EXAMPLES = 25


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return Folders(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize(
    "kind",
    sparing(KINDS, slow=lambda kind: kind in checkpoint_kinds.KINDS),
    ids=lambda kind: kind.name,
)
@pytest.mark.filterwarnings("default")
def test_altered_files_are_refused_by_name_or_change_nothing(kind, folders):
    trials = Trials()
    try_kind(folders.example(kind), trials, count=_EXAMPLES, seed_=None)
    assert not trials.breaks
    assert sum(trials.counts.values()) > _EXAMPLES // 2
