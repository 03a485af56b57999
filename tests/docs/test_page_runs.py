"""The documents' commands and programs run, each page's in one shell from top to bottom."""

import pytest
from doc_pages import OWN_TEST, PAGES, blocks_of, is_slow, run_page

FAST_S, SLOW_S = 120, 1500
SLOW = [pytest.mark.slow, pytest.mark.timeout(SLOW_S + 60)]


def runs(page):
    """Whether anything on the page can run here."""
    blocks = blocks_of(page)
    return any(b.language in ("bash", "python") and not b.needs_cluster for b in blocks)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=SLOW if is_slow(page) else [])
        for page in PAGES
        if runs(page) and page.stem not in OWN_TEST
    ],
)
def test_commands_run_as_they_stand(page, tmp_path):
    done = run_page(page, tmp_path, timeout=SLOW_S if is_slow(page) else FAST_S)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]


def test_a_page_ends_at_the_command_that_fails(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n\n```bash\ntouch first\n```\n\n```python\nopen('second', 'w').close()\n```\n\n"
        "<!-- cluster -->\n```bash\ntouch elsewhere\n```\n\n```bash\nlag-inspect nothing\n```\n\n"
        "```bash\ntouch later\n```\n"
    )
    done = run_page(page, tmp_path / "run", timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("== page.md:") == 3
    assert "== page.md:17\n" in done.stderr
    made = {path.name for path in (tmp_path / "run" / "checkout").iterdir() if path.is_file()}
    assert {"first", "second"} <= made
    assert not {"elsewhere", "later"} & made
