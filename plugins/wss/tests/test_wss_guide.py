"""What the guide shows is right: its files pass `lint`, and it names what is said when something fails."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
from guides import REST, blocks

from tesaiot_connect.testing import Certificates
from tesaiot_connect_wss import Wss

ROOT = Path(__file__).resolve().parents[3]
GUIDE = (ROOT / "docs" / "guide" / "websocket.md").read_text(encoding="utf-8")
README = (ROOT / "plugins" / "wss" / "README.md").read_text(encoding="utf-8")
BLOCKS = blocks(GUIDE, "toml")
TOOL = Path(sys.executable).with_name("tesaiot-connect")


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_the_configurations_of_the_guide(block: int, tmp_path: Path) -> None:
    own = Certificates(tmp_path / "certificates").server()
    for name, file in (("server.pem", own.certificate), ("server.key", own.key)):
        (tmp_path / name).write_bytes(file.read_bytes())
    config, text = tmp_path / "config.toml", BLOCKS[block]
    config.write_text(text if "[listeners" in text else text + REST)
    done = subprocess.run([TOOL, "lint", config], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_option_of_its_own_is_explained() -> None:
    for field in attrs.fields(Wss):
        assert f"`{field.name}" in GUIDE + README or field.name.startswith(("keepalive_", "url", "tls")), (
            field.name
        )


def test_what_is_said_is_what_the_guide_lists() -> None:
    source = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "plugins/wss/src").rglob("*.py"))
    source += (ROOT / "core/src/tesaiot_connect/tls.py").read_text(encoding="utf-8")
    section = GUIDE.split("## When something goes wrong")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE)[2:]
    assert rows
    for row in rows:
        for part in re.split(r" \.\.\. | ?\([\d, ]+\)(?:, )?|, (?=wants)|`.*", row):
            assert part in source, f"{row}: {part!r}"


def test_nothing_of_the_library_is_loaded_before_it_is_needed() -> None:
    code = (
        "import sys, tesaiot_connect_wss; print('websockets' in sys.modules, 'python_socks' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
