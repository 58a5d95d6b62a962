"""What the README shows, runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import write_class_folders, write_demo_and_photos

from quickstudy import engine
from quickstudy.__main__ import COMMANDS
from quickstudy.engine import recipe_names

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_its_python(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "runs/demo" in code:
        write_demo_and_photos(tmp_path)
        monkeypatch.chdir(tmp_path)
    exec(code, {})


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", README, re.DOTALL))
def test_its_recipes(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUICKSTUDY_CACHE", str(tmp_path / "cache"))
    classes = [f"class {number}" for number in range(25)]
    write_class_folders(tmp_path, {"photos": classes}, images=6)
    few = ["--train.updates=1", "--train.trace=false", "--validation.tasks=1", "--dataset.image_size=16"]
    run = engine.train(engine.parse_recipe(text, few), tmp_path / "runs/photos", name="photos")
    assert run.finished


def test_its_commands_and_recipes_exist() -> None:
    lines = re.findall(r"^    (?:\S+/)?quickstudy (.+)$", README, re.MULTILINE)
    assert len(lines) > 8
    for line in lines:
        assert any(line.startswith(name) for name in COMMANDS), line
        for recipe in re.findall(r"(?:train|recipes) ((?:omniglot|sine|glyphs)/\S+)", line):
            assert recipe in recipe_names(), line


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.search(r"^[A-Z]{4,}$", README, re.MULTILINE)
