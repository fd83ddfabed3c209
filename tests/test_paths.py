"""Data files: from the data folder, or from the release where the package was installed alone."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from interp_utils import paths
from interp_utils.errors import InterpError
from interp_utils.ledger import load_ledger
from interp_utils.paths import data_file, find_data, writable
from interp_utils.records import load_record

ROOT = Path(__file__).resolve().parent.parent
ENTITIES = "facts/entities.csv"


class Server(ThreadingHTTPServer):
    """Serves a folder and remembers what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        assert isinstance(self.server, Server)
        if format.startswith('"'):
            self.server.asked.append(self.path)


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package without a repository around it, and an empty cache; returns the folder it stands in."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.setattr(paths, "ROOT", site)
    monkeypatch.delenv("INTERP_DATA", raising=False)
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    return site


@pytest.fixture
def release(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A local server in place of the repository's address; its release 1.2.3 is a copy of `data/`."""
    shutil.copytree(ROOT / "data", tmp_path / "served" / "raw" / "v1.2.3" / "data")
    server = Server(tmp_path / "served")
    monkeypatch.setattr(paths, "release", lambda: (f"http://127.0.0.1:{server.server_port}", "1.2.3"))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def served(release: Server, tmp_path: Path) -> Path:
    return tmp_path / "served" / "raw" / "v1.2.3" / "data"


def test_a_clone_uses_the_folder_beside_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INTERP_DATA", raising=False)
    assert data_file(ENTITIES) == ROOT / "data" / "facts" / "entities.csv"


def test_the_variable_wins_even_over_a_registered_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTERP_DATA", str(tmp_path))
    with pytest.raises(InterpError, match="'facts/entities.csv' is missing from .*restore.*INTERP_DATA"):
        data_file(ENTITIES)
    assert find_data(ENTITIES) is None
    (tmp_path / "facts").mkdir()
    (tmp_path / ENTITIES).write_text("mine", encoding="utf-8")
    assert data_file(ENTITIES).read_text(encoding="utf-8") == "mine"


def test_an_unregistered_file_has_its_near_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERP_DATA", str(tmp_path))
    with pytest.raises(InterpError, match=f"no data file 'facts/entity.csv' in .*Did you mean '{ENTITIES}'"):
        data_file("facts/entity.csv")


def test_a_bare_installation_fetches_a_file_once(
    release: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    path = data_file(ENTITIES)
    assert path == tmp_path / "cache" / "data" / "1.2.3" / ENTITIES
    assert path.read_bytes() == (ROOT / "data" / ENTITIES).read_bytes()
    assert data_file(ENTITIES) == find_data(ENTITIES) == path
    assert release.asked == [f"/raw/v1.2.3/data/{ENTITIES}"]
    assert [path.name for path in path.parent.iterdir()] == ["entities.csv"]
    assert not [record for record in caplog.records if record.name == "pooch"]
    assert capfd.readouterr() == ("", f"fetching data/{ENTITIES} of release 1.2.3\n")


def test_a_damaged_copy_in_the_cache_is_fetched_again(release: Server) -> None:
    path = data_file(ENTITIES)
    path.write_bytes(path.read_bytes()[:100])
    assert data_file(ENTITIES).read_bytes() == (ROOT / "data" / ENTITIES).read_bytes()
    assert len(release.asked) == 2


def test_a_stray_data_folder_of_another_package_is_no_clone(release: Server, bare: Path) -> None:
    (bare / "data" / "facts").mkdir(parents=True)
    assert data_file(ENTITIES).is_file()
    assert len(release.asked) == 1


def test_another_content_than_the_registered_one_is_refused(served: Path, tmp_path: Path) -> None:
    (served / ENTITIES).write_text("changed", encoding="utf-8")
    with pytest.raises(InterpError, match=f"'{ENTITIES}' from http.* its registered sha256.*clone"):
        data_file(ENTITIES)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_release_without_the_file_is_named_with_its_status(served: Path) -> None:
    (served / ENTITIES).unlink()
    with pytest.raises(InterpError, match=rf"'{ENTITIES}' could not be fetched.*\(HTTP 404\).*INTERP_DATA"):
        data_file(ENTITIES)


def test_a_server_that_is_down_is_an_error_in_one_sentence(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setattr(paths, "release", lambda: (f"http://127.0.0.1:{port}", "1.2.3"))
    with pytest.raises(
        InterpError, match="could not be fetched.*clone the repository or set INTERP_DATA"
    ) as e:
        data_file(ENTITIES)
    assert "(ConnectionError)" in str(e.value) and "\n" not in str(e.value)


def test_what_is_not_registered_is_never_asked_for(release: Server) -> None:
    with pytest.raises(InterpError, match=f"among those of the release. Did you mean '{ENTITIES}'"):
        data_file("facts/Entities.csv")
    assert find_data("facts/Entities.csv") is None
    assert release.asked == []


def test_a_cache_that_cannot_be_written_is_named(
    release: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "file"))
    with pytest.raises(InterpError, match="cache folder .* cannot be written .*set INTERP_CACHE"):
        data_file(ENTITIES)


def test_a_bare_installation_has_the_ledger(release: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_ledger(ROOT / "data" / "claims.toml")
    assert load_ledger() == expected
    registered = hashes(ROOT / "data", "claims.toml")
    monkeypatch.setattr(paths, "_index", lambda: registered)
    assert not any(spec.recorded for spec in load_ledger().values())


def hashes(folder: Path, *names: str) -> dict[str, str]:
    """An index of these files only."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def write_study(folder: Path, text: str) -> None:
    """A record of one row, as `run_study` leaves it."""
    folder.mkdir(parents=True)
    table = gzip.compress(f"text\n{text}\n".encode(), mtime=0)
    (folder / "table.csv.gz").write_bytes(table)
    card = {"table_sha256": hashlib.sha256(table).hexdigest()}
    (folder / "card.json").write_text(json.dumps(card), encoding="utf-8")


def test_a_bare_installation_has_the_records_and_prefers_its_own(
    served: Path, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_study(served / "records" / "lens" / "tiny", "released")
    assert load_record("lens/tiny") is None
    study = [f"records/lens/tiny/{name}" for name in ("card.json", "table.csv.gz")]
    registered = hashes(served, ENTITIES, *study)
    monkeypatch.setattr(paths, "_index", lambda: registered)
    record = load_record("lens/tiny")
    assert record and record.table.text.tolist() == ["released"]
    write_study(bare / "data" / "records" / "lens" / "tiny", "own")
    record = load_record("lens/tiny")
    assert record and record.table.text.tolist() == ["own"]
    assert data_file(ENTITIES).is_file()


def test_the_release_is_what_the_installed_package_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = tmp_path / "interp_utils-4.5.6.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text(
        "Metadata-Version: 2.4\nName: interp_utils\nVersion: 4.5.6\n"
        "Project-URL: Documentation, https://example.org/a, b\nProject-URL: Repository, https://example.org/c\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert paths.release() == ("https://example.org/c", "4.5.6")
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(InterpError, match="not installed.*INTERP_DATA"):
        paths.release()


@pytest.mark.parametrize("below", [".", "folder/deeper"])
def test_a_folder_that_is_a_file_is_named_with_its_variable(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / below
    with pytest.raises(InterpError) as error:
        writable(folder, "build folder", "INTERP_BUILD")
    assert str(error.value).startswith(f"The build folder {folder} cannot be written (")
    assert str(error.value).endswith("set INTERP_BUILD to a folder that can.")


def test_writable_makes_the_folder_and_leaves_it_empty(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    assert writable(folder, "build folder", "INTERP_BUILD") == folder
    assert list(folder.iterdir()) == []


def test_the_module_is_imported_without_what_only_a_download_needs() -> None:
    code = "import sys, interp_utils.paths; print({'pooch', 'requests'} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "set()\n"
