"""The user's state folder."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from tesaiot_connect import state

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state.state_folder("x") == tmp_path / "tesaiot-connect" / "x"
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_STATE_HOME", unset)
        assert state.state_folder("x") == Path("/home/me/.local/state/tesaiot-connect/x")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert state.state_folder("x") == Path("/home/me/Library/Application Support/tesaiot-connect/x")
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert state.state_folder("x") == tmp_path / "tesaiot-connect" / "x"
    monkeypatch.delenv("LOCALAPPDATA")
    assert state.state_folder("x") == Path("/home/me/AppData/Local/tesaiot-connect/x")
    assert not (tmp_path / "tesaiot-connect").exists()


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert state.state_folder("x") == tmp_path / "tesaiot-connect" / "x"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.delenv("LOCALAPPDATA")
    alone = state.state_folder("x")
    assert alone.is_absolute()
    assert alone != state.state_folder("y")


@posix
@pytest.mark.parametrize(("mode", "private"), [(0o700, True), (0o755, True), (0o770, False), (0o702, False)])
def test_a_folder_is_private_where_nobody_else_may_write(tmp_path: Path, mode: int, private: bool) -> None:
    tmp_path.chmod(mode)
    if private:
        state.check_private(tmp_path)
        state.make_private(tmp_path)
    else:
        for check in (state.check_private, state.make_private):
            with pytest.raises(PermissionError, match="others may write"):
                check(tmp_path)


def test_no_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        state.check_private(tmp_path / "no")
    state.make_private(tmp_path / "no" / "yes")
    state.check_private(tmp_path / "no" / "yes")


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "one.txt"
    state.write_private(file, b"before")
    if os.name == "posix":
        assert stat.S_IMODE(file.stat().st_mode) == 0o600

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        state.write_private(file, b"after")
    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file]
