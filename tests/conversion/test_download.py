import contextlib
import http.server
import io
import os
import shutil
import threading
import zipfile

import pytest

from nnunetv2_dermomamba.conversion import download as module
from nnunetv2_dermomamba.conversion.download import download, download_archives
from nnunetv2_dermomamba.conversion.errors import ConversionError
from nnunetv2_dermomamba.conversion.isic2018 import ARCHIVES, SUBSETS, main


class Server:
    """Serves `files` on loopback, with ranges, and breaks off as told."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.break_after: list[int] = []  # of the next answers' bodies
        self.ranges = True
        self.length = True
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                wanted = self.headers.get("Range")
                server.requests.append((self.path, wanted))
                data = server.files.get(self.path.lstrip("/"))
                if data is None:
                    self.send_error(404)
                    return
                start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.ranges else 0
                if start and start >= len(data):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(data)}")
                    self.end_headers()
                    return
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                if server.length:
                    self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                stop = start + server.break_after.pop(0) if server.break_after else None
                self.wfile.write(data[start:stop])

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}/"


@pytest.fixture
def server(monkeypatch):
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


DATA = os.urandom(300_000)


def test_downloads(server, tmp_path):
    server.files["a.zip"] = DATA
    download(server.address + "a.zip", tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == DATA
    assert os.listdir(tmp_path) == ["a.zip"]


def test_resumes_within_a_call(server, tmp_path):
    server.files["a.zip"] = DATA
    server.break_after = [100_000, 50_000]
    download(server.address + "a.zip", tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == DATA
    assert [wanted for _, wanted in server.requests] == [None, "bytes=100000-", "bytes=150000-"]


def test_resumes_in_the_next_call(server, tmp_path):
    server.files["a.zip"] = DATA
    server.break_after = [1000] * module.ATTEMPTS
    with pytest.raises(ConversionError, match="Run again to go on from 5,000 bytes"):
        download(server.address + "a.zip", tmp_path / "a.zip")
    assert os.listdir(tmp_path) == ["a.zip.part"]
    download(server.address + "a.zip", tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == DATA
    assert server.requests[-1][1] == "bytes=5000-"


def test_starts_again_where_the_server_knows_no_ranges(server, tmp_path):
    server.files["a.zip"] = DATA
    server.ranges = False
    server.break_after = [1000]
    download(server.address + "a.zip", tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == DATA


@pytest.mark.parametrize("more", [b"", b"more"])
def test_a_part_as_long_as_the_file_or_longer(server, tmp_path, more):
    server.files["a.zip"] = DATA
    (tmp_path / "a.zip.part").write_bytes(DATA + more)
    download(server.address + "a.zip", tmp_path / "a.zip")
    assert (tmp_path / "a.zip").read_bytes() == DATA


def test_refusals(server, tmp_path, monkeypatch):
    with pytest.raises(ConversionError, match="404"):
        download(server.address + "a.zip", tmp_path / "a.zip")
    server.files["a.zip"] = DATA
    server.length = False
    with pytest.raises(ConversionError, match="how large"):
        download(server.address + "a.zip", tmp_path / "a.zip")
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    with pytest.raises(ConversionError, match="cannot be fetched"):
        download("http://127.0.0.1:1/a.zip", tmp_path / "a.zip")
    with pytest.raises(ConversionError, match=r"'nonsense/a\.zip' is no address"):
        download("nonsense/a.zip", tmp_path / "a.zip")
    assert not (tmp_path / "a.zip").exists()


def archive(folder, name, compression=zipfile.ZIP_STORED, wrapped=True):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as content:
        for file in folder.iterdir():
            content.write(file, f"{name}/{file.name}" if wrapped else file.name)
    return buffer.getvalue()


def test_archives_become_folders(server, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.txt").write_text("x")
    server.files = {"A.zip": archive(tmp_path / "in", "A"), "B.zip": archive(tmp_path / "in", "B", wrapped=False)}
    for _ in range(2):
        download_archives(["A", "B"], server.address, tmp_path / "out")
        assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*")) == [
            "A",
            "A/x.txt",
            "B",
            "B/x.txt",
        ]
    assert len(server.requests) == 2


def test_an_empty_folder_is_as_good_as_none(server, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.txt").write_text("x")
    server.files["A.zip"] = archive(tmp_path / "in", "A")
    (tmp_path / "out" / "below" / "A").mkdir(parents=True)
    download_archives(["A"], server.address, tmp_path / "out")
    assert (tmp_path / "out" / "A" / "x.txt").read_text() == "x"
    assert not (tmp_path / "out" / "below" / "A").exists()


def test_a_damaged_archive_leaves_no_folder(server, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.txt").write_text("x" * 1000)
    whole = archive(tmp_path / "in", "A")
    compressed = archive(tmp_path / "in", "A", zipfile.ZIP_DEFLATED)
    stream = compressed.index(b"x.txt") + len("x.txt")
    damage = [whole[:-30], whole.replace(b"x" * 1000, b"x" * 999 + b"y")]
    for damaged in (*damage, compressed[:stream] + b"\xff" + compressed[stream + 1 :]):
        server.files["A.zip"] = damaged
        with pytest.raises(ConversionError, match="damaged"):
            download_archives(["A"], server.address, tmp_path / "out")
        assert os.listdir(tmp_path / "out") == ["A.zip"]
        (tmp_path / "out" / "A.zip").unlink()


def test_an_archive_stays_within_its_folder(server, tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as content:
        content.writestr("../../escaped", "x")
        content.writestr(f"{tmp_path}/absolute", "x")
    server.files["A.zip"] = buffer.getvalue()
    download_archives(["A"], server.address, tmp_path / "deep" / "out")
    assert not list(tmp_path.glob("*escaped*")) + list(tmp_path.glob("*/escaped")) + list(tmp_path.glob("absolute"))


def test_downloads_and_converts(server, isic, nnunet, tmp_path):
    for number, subset in enumerate(SUBSETS):
        isic.add(f"ISIC_{number:07d}", subset=subset)
    for name in ARCHIVES:
        server.files[f"{name}.zip"] = archive(isic.root / name, name)
    server.break_after = [300]
    options = ["--download", server.address, "--source", str(tmp_path / "data"), "--workers", "1"]
    assert main(options) == 0
    assert len(list((nnunet / "nnUNet_raw" / "Dataset118_ISIC2018").rglob("*.png"))) == 6
    with contextlib.suppress(KeyError):
        del server.files[f"{ARCHIVES[-1]}.zip"]
    assert main([*options, "--overwrite"]) == 0


@pytest.mark.parametrize("source", ["..", ".", ARCHIVES[0]])
def test_what_the_conversion_finds_is_not_downloaded_again(server, isic, nnunet, source):
    for number, subset in enumerate(SUBSETS):
        isic.add(f"ISIC_{number:07d}", subset=subset)
    missing = isic.root / ARCHIVES[-1]
    server.files[f"{ARCHIVES[-1]}.zip"] = archive(missing, ARCHIVES[-1])
    shutil.rmtree(missing)
    options = ["--download", server.address, "--source", str(isic.root / source), "--workers", "1"]
    assert main(options) == 0
    assert [path for path, _ in server.requests] == [f"/{ARCHIVES[-1]}.zip"]
    assert len(list((nnunet / "nnUNet_raw" / "Dataset118_ISIC2018").rglob("*.png"))) == 6


def test_a_refused_download_is_an_error(server, nnunet, tmp_path, capsys):
    assert main(["--download", server.address, "--source", str(tmp_path / "data")]) == 1
    assert "404" in capsys.readouterr().err
