"""Recipes: lists of passes with their settings as YAML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from regraft.passes import Pass, pass_named
from regraft.program import RegraftError


def read_recipe(path: str | Path) -> list[Pass]:
    """Passes of a YAML file: {version: 1, passes: [{KVQuant: {bits: 4}}, ...]}."""
    try:
        recipe = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise RegraftError(f"recipe {path} cannot be read: {error}") from error
    if not isinstance(recipe, dict) or recipe.get("version") != 1:
        raise RegraftError(f"recipe {path} needs 'version: 1' and a list 'passes'")
    if extra := set(recipe) - {"version", "passes"}:
        raise RegraftError(f"recipe {path}: unknown key {sorted(extra)[0]!r}")
    found = []
    for item in recipe.get("passes") or []:
        entry = {item: {}} if isinstance(item, str) else item
        if not isinstance(entry, dict) or len(entry) != 1:
            raise RegraftError(f"recipe {path}: {item!r} is not a pass with its settings")
        ((name, settings),) = entry.items()
        found.append(pass_named(name, settings))
    return found


def write_recipe(passes: Sequence[Pass], path: str | Path) -> None:
    """The YAML that read_recipe reads back."""
    entries = [{type(item).__name__: item.settings()} for item in passes]
    Path(path).write_text(yaml.safe_dump({"version": 1, "passes": entries}, sort_keys=False))
