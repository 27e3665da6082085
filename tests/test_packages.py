"""Each package builds a wheel, and the wheels install alone, without the workspace."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ["core", *sorted(f"plugins/{file.parent.name}" for file in ROOT.glob("plugins/*/pyproject.toml"))]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    for package in PACKAGES:
        command = [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            str(folder),
            package,
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_wheels_install_in_an_empty_environment(wheels: Path, tmp_path: Path) -> None:
    assert len(list(wheels.glob("*.whl"))) == len(PACKAGES)
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    bin_folder = venv / ("Scripts" if os.name == "nt" else "bin")
    files = [str(file) for file in wheels.glob("*.whl")]
    pip = [str(bin_folder / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    constraints = ["-c", str(ROOT / "constraints.txt")]
    done = subprocess.run([*pip, *constraints, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    shown = subprocess.run(
        [str(bin_folder / "tesaiot-connect"), "plugins"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=environment,
    )
    assert "tcp_tls" in shown.stdout
    code = "from importlib.resources import files; print((files('tesaiot_connect') / 'py.typed').is_file())"
    typed = subprocess.run(
        [str(bin_folder / "python"), "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert typed.stdout.strip() == "True"
