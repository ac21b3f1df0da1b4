"""Tests that the pages name are there, and so are the pages and files that they link to."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]


def rows(page: Path, heading: str) -> list[str]:
    """The rows of the first table under ``heading``."""
    section = page.read_text(encoding="utf-8").partition(f"# {heading}\n")[2].partition("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("| ")][2:]


def functions_in(file: str) -> list[str]:
    body = ast.parse((HERE / file).read_text(encoding="utf-8")).body
    return [each.name for each in body if isinstance(each, ast.FunctionDef)]


def test_every_promise_of_the_contract_names_tests_that_exist() -> None:
    found = rows(ROOT / "docs" / "contract.md", "The contract")
    assert len(found) > 10
    for row in found:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert named, row
        for file, test in named:
            assert test in functions_in(file), (file, test)


def test_everything_it_works_with_links_to_tests_that_exist() -> None:
    """The README's links read as the names of tests, in words."""
    found = rows(ROOT / "README.md", "Works with")
    assert len(found) > 15
    for row in found:
        linked = re.findall(r"\[([\w ]+)\]\(tests/(test_\w+\.py)\)", row)
        assert linked, row
        for words, file in linked:
            assert f"test_{words.replace(' ', '_')}" in functions_in(file), (file, words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_hold(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
