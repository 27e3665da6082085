"""What a worker says of the libnng it was pointed at: found, wrong, incomplete, or not there."""

from __future__ import annotations

import ctypes.util
from pathlib import Path

import nng_stub
import pytest
from nng_peers import worker

from tesaiot_connect_quic_nng.control import Failed, Job, Loaded, Report
from tesaiot_connect_quic_nng.library import MSQUIC, NNG


def probed(environment: dict[str, str] | None = None, **job: str) -> Report | None:
    """The worker's word when it is only to load. No library of this machine gets in the way."""
    quiet = {NNG: "", MSQUIC: "", **(environment or {})}
    with worker(Job(**job), quiet) as one:  # type: ignore[arg-type]
        word = one.last_word()
        assert one.process.wait(20) == 0
    return word


def refused(environment: dict[str, str] | None = None, **job: str) -> Failed:
    word = probed(environment, **job)
    assert isinstance(word, Failed), word
    assert word.unsupported
    assert word.fix
    return word


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(nng_stub.installed(tmp_path_factory.mktemp("installed")))


def test_the_option_names_it(installed: str) -> None:
    word = probed(library=installed)
    assert isinstance(word, Loaded)
    assert word.library == installed
    assert word.version


def test_the_environment_names_it(installed: str) -> None:
    assert isinstance(probed({NNG: installed}), Loaded)


def test_the_option_counts_more_than_the_environment(installed: str, tmp_path: Path) -> None:
    assert isinstance(probed({NNG: str(tmp_path / "absent.so")}, library=installed), Loaded)
    missing = refused({NNG: installed}, library=str(tmp_path / "absent.so"))
    assert "absent.so (from `library`)" in missing.what


def test_nowhere() -> None:
    word = probed()
    if isinstance(word, Loaded):
        pytest.skip("this machine has NanoSDK where the system looks for libraries")
    assert isinstance(word, Failed) and word.unsupported
    assert NNG in word.fix


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    word = refused({NNG: str(tmp_path / "libnng.so")})
    assert f"{tmp_path / 'libnng.so'} (from {NNG})" in word.what
    assert NNG in word.fix


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    (tmp_path / "libnng.so").write_text("no library")
    assert "cannot be loaded" in refused(library=str(tmp_path / "libnng.so")).what


def test_plain_nng() -> None:
    word = refused(library=str(nng_stub.plain()))
    assert "is plain NNG, without MQTT over QUIC" in word.what
    assert "quic_aioquic" in word.fix


def test_a_library_that_is_no_nng() -> None:
    assert "is no NNG" in refused(library=str(nng_stub.libraries()[1])).what


def test_a_missing_symbol(tmp_path: Path) -> None:
    (tmp_path / "libmsquic.so").symlink_to(nng_stub.libraries()[1])
    (tmp_path / "libnng.so").symlink_to(nng_stub.without("nng_mqtt_quic_ack_callback_set"))
    assert "lacks nng_mqtt_quic_ack_callback_set" in refused(library=str(tmp_path / "libnng.so")).what


def test_nanosdk_is_no_nanonng(installed: str) -> None:
    word = refused(library=installed, backend="nanonng")
    assert "is NanoSDK, not NanoNNG" in word.what
    assert 'backend = "nanosdk"' in word.fix


def test_nanonng_is_no_nanosdk() -> None:
    word = refused(library=str(nng_stub.built("nanonng")), msquic=str(nng_stub.libraries()[1]))
    assert "is NanoNNG, not NanoSDK" in word.what
    assert 'backend = "nanonng"' in word.fix


def test_msquic_is_not_there(tmp_path: Path) -> None:
    if ctypes.util.find_library("msquic"):
        pytest.skip("this machine has msquic where the system looks for libraries")
    word = refused(library=str(nng_stub.installed(tmp_path, msquic=False)))
    assert "no libmsquic beside it or in the system" in word.what
    assert MSQUIC in word.fix


def test_msquic_is_elsewhere(tmp_path: Path) -> None:
    library, msquic = str(nng_stub.installed(tmp_path, msquic=False)), str(nng_stub.libraries()[1])
    assert isinstance(probed(library=library, msquic=msquic), Loaded)
    assert isinstance(probed({MSQUIC: msquic}, library=library), Loaded)


def test_a_named_msquic_that_is_not_there_is_not_passed_over(installed: str, tmp_path: Path) -> None:
    word = refused({MSQUIC: str(tmp_path / "absent.so")}, library=installed)
    assert f"absent.so (from {MSQUIC})" in word.what
    assert MSQUIC in word.fix
