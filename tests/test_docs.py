"""What the pages promise exists: commands and their options, links, files, tests, and what snippets import."""

import argparse
import ast
import importlib
import re
import shlex
from pathlib import Path
from unittest import mock

import pytest

from wallvla import cli


ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
# Without the templates of cards (model_card.md, kernels/CARD.md), which are filled in elsewhere
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / "kernels" / "README.md", ROOT / "spaces" / "grounding" / "README.md"]
TEXTS = {page: page.read_text() for page in PAGES}
LINES = [  # continuations joined, remarks cut off, `accelerate launch ... -m wallvla.cli` read as `wallvla`
    (page.name, part.strip())
    for page in [*PAGES, *EXAMPLES]
    for line in re.sub(r"\\\n[#\s]*", " ", page.read_text()).splitlines()
    for part in re.sub(r"^(#|command)?\s*(accelerate .* -m (?=wallvla))?|\s#.*", "", line).split(";")
]
COMMANDS = [
    (page, line.replace("wallvla.cli", "wallvla")) for page, line in LINES if re.match(r"wallvla(\.cli)? ", line)
]
SCRIPTS = [(page, line) for page, line in LINES if re.match(r"python (benchmarks|kernels)/", line)]


def parser_and_arguments(words: list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser of `wallvla WORDS`, which every command shows to `_read_config`, and the words that it gets."""
    length = 2 if " ".join(words[:2]) in cli.COMMANDS else 1
    with mock.patch.object(cli, "_read_config", side_effect=InterruptedError) as read:
        with pytest.raises(InterruptedError):
            cli.COMMANDS[" ".join(words[:length])]([])
    return read.call_args.args[0], words[length:]


def test_commands_parse(monkeypatch, capsys):
    """Also that the options in `examples/*.yaml` exist, which a command names with `--config`."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli, "_checkpoint", lambda path, file="": path)  # those of the pages do not lie here
    assert len(COMMANDS) > 60
    for page, line in COMMANDS:
        parser, arguments = parser_and_arguments(shlex.split(line.replace(" ... ", " --model M "))[1:])
        parser.allow_abbrev = False
        try:
            parser.parse_args(cli._read_config(parser, arguments))
        except SystemExit:
            pytest.fail(f"{page}: {line}\n{capsys.readouterr().err}")


def test_scripts_have_the_options_that_are_named():
    assert len(SCRIPTS) > 20
    for page, line in SCRIPTS:
        script = (ROOT / line.split()[1]).read_text()
        for option in re.findall(r" --([\w-]+)", line):
            assert re.search(rf"\b{option.replace('-', '[-_]')}\b", script), f"{page}: {line}: --{option}"


def test_commands_in_sentences_exist():
    found = [(page, words) for page, text in TEXTS.items() for words in re.findall(r"`wallvla ([^`]+)`", text)]
    assert len(found) > 30
    for page, words in found:
        parser, arguments = parser_and_arguments(words.split())
        options = {word for word in arguments if word.startswith("--")}
        assert options <= set(parser._option_string_actions), (page.name, words)


def test_links_lead_somewhere():
    links = [(page, target) for page, text in TEXTS.items() for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    assert len(links) > 30
    for page, target in links:
        file, _, anchor = target.partition("#")
        if file.startswith("https://"):
            continue
        path = page.parent / file if file else page
        assert path.exists(), (page.name, target)
        headings = re.findall(r"(?m)^#+ (.+)$", path.read_text()) if anchor else []
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, (page.name, target)


def test_files_and_tests_exist():
    """A path is one of the repository or of the folder of its page."""
    tests = "\n".join(path.read_text() for path in [*ROOT.glob("tests/*.py"), *ROOT.glob("kernels/tests/*.py")])
    folders = "|".join(
        path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and path.name != "runs"
    )
    for page, text in TEXTS.items():
        for name in re.findall(rf"`((?:{folders})/[\w./-]+\.\w+)[` ]", text):
            assert (ROOT / name).exists() or (page.parent / name).exists(), (page.name, name)
        for name in re.findall(r"`(\w+_wallvla\.py)`", text):
            assert (ROOT / name).exists(), (page.name, name)
        for name in re.findall(r"`(test_\w+)`", text):
            assert f"def {name}(" in tests, (page.name, name)
    assert "`tests/" in TEXTS[ROOT / "docs" / "architecture.md"]


def test_snippets_import_what_exists():
    blocks = [(page, code) for page, text in TEXTS.items() for code in re.findall(r"```python\n(.*?)```", text, re.S)]
    assert len(blocks) > 8
    for page, code in blocks:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("wallvla"):
                module = importlib.import_module(node.module)
                assert {name.name for name in node.names} <= set(dir(module)), (page.name, ast.unparse(node))


def test_estimates_are_those_of_the_examples():
    """docs/scaling.md repeats the totals of the examples, which a slow test of test_estimate.py computes."""
    rows = re.findall(r"\| `(examples/\S+)` .* \| ([\d.]+) GiB \|", TEXTS[ROOT / "docs" / "scaling.md"])
    totals = {name: re.search(r"# total +([\d.]+) GiB", (ROOT / name).read_text()).group(1) for name, _ in rows}
    assert len(rows) == 4 and {name: f"{float(total):.1f}" for name, total in totals.items()} == dict(rows)
