import os

import pytest

from nnunetv2_dermomamba.predict.photos import InputError, find_photos


def touch(folder, *names):
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def named(photos, root):
    return {photo.path.relative_to(root).as_posix(): photo.name for photo in photos}


def test_folders_are_searched_and_kept(tmp_path):
    touch(tmp_path, "a.jpg", "b/c.PNG", "b/d/e.webp", "b/notes.txt", ".hidden.jpg", ".git/f.jpg", "b/._c.png")
    assert named(find_photos(tmp_path, tmp_path / "out"), tmp_path) == {
        "a.jpg": "a",
        "b/c.PNG": "b/c",
        "b/d/e.webp": "b/d/e",
    }


def test_results_within_the_photographs_are_no_photographs(tmp_path):
    touch(tmp_path, "a.jpg", "masks/a_mask.png")
    assert named(find_photos(tmp_path, tmp_path / "masks"), tmp_path) == {"a.jpg": "a"}


def test_the_folder_of_the_photographs_is_refused_for_results(tmp_path):
    touch(tmp_path, "a.jpg")
    with pytest.raises(InputError, match="holds the photographs"):
        find_photos(tmp_path, tmp_path / "b" / "..")


def test_photographs_of_one_name_get_different_names(tmp_path):
    files = ("a.jpg", "a.png", "A.bmp", "a.jpg.png", "b.jpg", "B.JPG", "c/a.jpg")
    touch(tmp_path, *files)
    names = named(find_photos(tmp_path, tmp_path / "out"), tmp_path)
    assert set(names) == set(files)
    assert len({name.casefold() for name in names.values()}) == len(files)
    assert names["a.png"] == "a.png"
    assert names["c/a.jpg"] == "c/a"


def test_links_are_followed_but_not_in_circles(tmp_path):
    touch(tmp_path, "photos/a.jpg", "elsewhere/b.jpg")
    os.symlink(tmp_path / "elsewhere", tmp_path / "photos" / "more")
    os.symlink(tmp_path / "photos", tmp_path / "photos" / "circle")
    photos = find_photos(tmp_path / "photos", tmp_path / "out")
    assert named(photos, tmp_path / "photos") == {"a.jpg": "a", "more/b.jpg": "more/b"}


def test_odd_names(tmp_path):
    names = ["with space.jpg", "new\nline.jpg", "皮膚.png", "-i.jpg", "100%.jpg", "[x].jpg", "a.b.c.jpg"]
    touch(tmp_path, *names)
    assert {photo.path.name for photo in find_photos(tmp_path, tmp_path / "out")} == set(names)
    assert find_photos(tmp_path / "[x].jpg", tmp_path / "out")[0].name == "[x]"


def test_a_glob_keeps_the_folders_below_its_fixed_part(tmp_path):
    touch(tmp_path, "p1/a.jpg", "p2/a.jpg", "p2/b.txt")
    photos = find_photos(f"{tmp_path}/p*/*", tmp_path / "out")
    assert named(photos, tmp_path) == {"p1/a.jpg": "p1/a", "p2/a.jpg": "p2/a"}


@pytest.mark.parametrize(
    ("pattern", "expected"), [("**/*.*", {"a.jpg", "c.jpg"}), ("**", {"a.jpg", "c.jpg"}), ("[a-z]*/*.*", {"c.jpg"})]
)
def test_a_glob_passes_over_the_results_of_earlier_runs(tmp_path, pattern, expected):
    touch(tmp_path, "ph/a.jpg", "ph/b/c.jpg", "ph/out/a_mask.png", "ph/out/b/c_mask.png")
    os.symlink(tmp_path / "ph" / "out", tmp_path / "ph" / "link")
    found = find_photos(f"{tmp_path}/ph/{pattern}", tmp_path / "ph" / "link")
    assert {photo.path.name for photo in found} == expected


@pytest.mark.parametrize("pattern", ["ph/*.jpg", "ph/**/*.*", "p[h]/*.jpg"])
def test_the_folder_of_a_globs_photographs_is_refused_for_results(tmp_path, pattern):
    touch(tmp_path, "ph/a.jpg")
    with pytest.raises(InputError, match="holds the photographs"):
        find_photos(f"{tmp_path}/{pattern}", tmp_path / "ph")


def test_a_glob_passes_over_no_photograph_in_the_output_folder(tmp_path):
    touch(tmp_path, "ph/a/1.png", "ph/b/2.png")
    with pytest.raises(InputError, match="holds the photographs"):
        find_photos(f"{tmp_path}/ph/*/*.png", tmp_path / "ph" / "a")


def test_a_glob_may_look_within_the_output_folder_when_it_is_told_to(tmp_path):
    touch(tmp_path, "photos/a.jpg")
    assert named(find_photos(f"{tmp_path}/photos/*.jpg", tmp_path), tmp_path) == {"photos/a.jpg": "a"}


@pytest.mark.parametrize(
    ("separator", "encoding"), [("\n", "utf-8"), ("\r\n", "utf-8-sig"), ("\r\n", "utf-16"), ("\0", "utf-8")]
)
def test_a_list_names_files(tmp_path, separator, encoding):
    touch(tmp_path, "p1/a.jpg", "p2/a b.jpg")
    listed = ["p1/a.jpg", str(tmp_path / "p2" / "a b.jpg"), "p2/missing.jpg"]
    (tmp_path / "list.txt").write_bytes(separator.join(listed).encode(encoding))
    photos = find_photos(tmp_path / "list.txt", tmp_path / "out")
    assert [photo.name for photo in photos] == ["p1/a", "p2/a b", "p2/missing"]


def test_only_txt_is_a_list(tmp_path):
    (tmp_path / "photos.lst").write_text("a.jpg\n")
    touch(tmp_path, "a.jpg")
    assert [photo.path.name for photo in find_photos(tmp_path / "photos.lst", tmp_path / "out")] == ["photos.lst"]


def test_one_file(tmp_path):
    touch(tmp_path, "a.jpg")
    assert find_photos(tmp_path / "a.jpg", tmp_path)[0].name == "a"


@pytest.mark.parametrize("source", ["missing.jpg", "empty", "*.jpg"])
def test_nothing_found_is_an_error(tmp_path, source):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"does not exist|no photographs"):
        find_photos(tmp_path / source, tmp_path / "out")


def test_dicom_without_suffix_is_found_by_its_mark(tmp_path):
    (tmp_path / "1.2.840").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "IM0001").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "README").write_text("no photograph")
    assert {photo.path.name for photo in find_photos(tmp_path, tmp_path / "out")} == {"1.2.840", "IM0001"}
