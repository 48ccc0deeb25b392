"""Archives fetched over HTTP, resumed where they broke off, checked and unpacked."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path

from tqdm import tqdm

from nnunetv2_dermomamba.conversion.errors import ConversionError
from nnunetv2_dermomamba.conversion.pairing import find_folder, folder_around

__all__ = ["download", "download_archives"]

TIMEOUT_SECONDS = 60
ATTEMPTS = 5
CHUNK_BYTES = 1 << 20


def download_archives(names: Collection[str], address: str, folder: Path) -> None:
    """Fetch ``<name>.zip`` for every name whose folder is missing, and unpack it to ``folder/<name>``.

    Missing is what the conversion would not find, wherever below the folder, and what is empty; one of the names'
    folders stands for that around it.

    A folder appears only when it is complete; its archive is removed then, so that the disk need not hold all twice.

    Args:
        names: Archives without ".zip"; each holds one folder of its own name, or the files directly.
        address: Where the archives are, ending in "/" or not.
        folder: Made if missing.

    Raises:
        ConversionError: An archive cannot be fetched, or is damaged, or its folder is there twice.
        OSError: It cannot be written.
    """
    folder = folder_around(folder, names)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        found = find_folder(folder, name)
        if found is not None and not any(found.iterdir()):
            found.rmdir()
            found = None
        if found is None:
            archive = folder / f"{name}.zip"
            if not archive.exists():
                download(f"{address.rstrip('/')}/{archive.name}", archive)
            _unpack(archive, folder / name)
            archive.unlink()


def download(url: str, file: Path) -> None:
    """Fetch one file with a progress bar; it appears under its name only when its size is right.

    A broken download is kept as ``<file>.part`` and resumed with an HTTP range request, five times within a call and
    again by the next call.

    Raises:
        ConversionError: It is no address, or the server refuses, breaks off five times within a call, or sends another
            size than it announced.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ConversionError(f"{url!r} is no address; it begins with https:// or http://")
    part = file.with_name(file.name + ".part")
    for attempt in range(ATTEMPTS):
        have = _size(part)
        try:
            total = _fetch(url, part)
        except urllib.error.HTTPError as error:
            raise ConversionError(f"{url}: the server answers {error.code} {error.reason}") from None
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", None) or error
        else:
            if _size(part) == total:
                os.replace(part, file)
                return
            reason = f"it broke off at {_size(part):,} of {total:,} bytes"
        if _size(part) == have:  # a server that sends nothing is given time
            time.sleep(min(2**attempt, 10) / 10)
    raise ConversionError(f"{url} cannot be fetched: {reason}. Run again to go on from {_size(part):,} bytes.")


def _fetch(url: str, part: Path) -> int:
    """Append to the part what is missing of it; returns the size the whole must have."""
    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        # Nothing lies beyond what is here: it is whole, or it is longer than the file and must be fetched anew.
        match = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        if match and int(match[1]) == have:
            return have
        part.unlink()
        return _fetch(url, part)
    with response:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        resumes = response.status == http.client.PARTIAL_CONTENT and match is not None and int(match[1]) == have
        if response.status == http.client.PARTIAL_CONTENT and not resumes:
            raise ConversionError(f"{url}: the server answers with another part than asked for")
        total = int(match[2]) if resumes and match else int(response.headers.get("Content-Length", -1))
        if total < 0:
            raise ConversionError(f"{url}: the server does not say how large the file is")
        name = urllib.parse.unquote(url.rsplit("/", 1)[-1])
        bar = tqdm(desc=name, total=total, initial=have if resumes else 0, unit="B", unit_scale=True)
        with part.open("ab" if resumes else "wb") as out, bar:
            while chunk := response.read(CHUNK_BYTES):
                out.write(chunk)
                bar.update(len(chunk))
    return total


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack to a folder that appears only when it is complete; `zipfile` checks every checksum and keeps within it."""
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as content:
            for member in tqdm(content.infolist(), desc=f"unpacking {archive.name}", unit="file"):
                content.extract(member, temporary)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ConversionError(f"{str(archive)!r} is damaged ({error}). Remove it and run again.") from error
    wrapped = temporary / folder.name
    (wrapped if wrapped.is_dir() else temporary).rename(folder)
    shutil.rmtree(temporary, ignore_errors=True)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
