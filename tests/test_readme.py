"""The commands and snippets of README.md and docs/ run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "BUILD.md"]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder in which the README's commands can write."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("tests", "examples", "conversion", "lmm_jax", "train"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(command, folder):
    scripts = os.path.dirname(sys.executable)
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "XLA_FLAGS": ""}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_two_commands_and_every_snippet(checkout):
    first, tests = blocks(PAGES[0], "bash")
    assert tests == "pip install -e '.[test]' && pytest\n"
    install, _, rest = first.partition(" && ")
    assert install == "pip install -e ."
    done = run(["bash", "-ec", rest], checkout)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    for page in PAGES:
        for snippet in blocks(page, "python"):
            done = run([sys.executable, "-c", snippet], checkout)
            assert done.returncode == 0, f"{page.name}:\n{snippet}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_options_in_the_docs_exist():
    from lmm_jax.cli import _parser

    known = {
        o
        for action in _parser(True)._subparsers._group_actions
        for p in action.choices.values()
        for o in p._option_string_actions
    }
    text = (ROOT / "docs" / "asking.md").read_text()
    assert set(re.findall(r"`(--[a-z-]+)", text)) <= known
