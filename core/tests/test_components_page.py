"""docs/reference/components.md names every built-in component with every option it has."""

from __future__ import annotations

from pathlib import Path

import attrs

from tesaiot_connect import builtin

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "components.md"


def test_every_component_and_option_is_described_and_no_other() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for heading, recipes in (
        ("## Sources", builtin.tesaiot_sources()),
        ("## Sinks", builtin.tesaiot_sinks()),
    ):
        part = text.split(heading)[1].split("\n## ")[0]
        sections = {section.split("`")[1]: section for section in part.split("\n### ")[1:]}
        assert set(sections) == set(recipes)
        for name, recipe in recipes.items():
            rows = [line.split("`")[1] for line in sections[name].splitlines() if line.startswith("| `")]
            assert rows == [field.name for field in attrs.fields(recipe)], name  # type: ignore[arg-type]
    for name in builtin.tesaiot_serializers():
        assert f"| `{name}` |" in text.split("## Serializers")[1]
