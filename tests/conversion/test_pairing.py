from pathlib import Path

import pytest

from nnunetv2_dermomamba.conversion.errors import ConversionError
from nnunetv2_dermomamba.conversion.pairing import find_folder, image_files, merge, pair


def named(*names):
    return [(Path(name).stem, Path(name)) for name in names]


def test_pairs_by_identifier():
    inventory = pair(named("i/b.jpg", "i/a.JPG"), named("m/a.png", "m/b.png"))
    assert [(c.case_id, c.image, c.mask, c.subset) for c in inventory.cases] == [
        ("a", Path("i/a.JPG"), Path("m/a.png"), "training"),
        ("b", Path("i/b.jpg"), Path("m/b.png"), "training"),
    ]
    assert not inventory.problems


def test_no_masks_at_all_is_a_test_set():
    assert [c.mask for c in pair(named("i/a.jpg"), None, "test").cases] == [None]


def test_everything_unpaired_is_a_problem():
    inventory = pair(
        named("i/a.jpg", "i/b.jpg", "i/b.png", "i/C.jpg", "i/c.jpg"), named("m/b.png", "m/c.png", "m/d.png")
    )
    assert not inventory.cases
    found = {problem.case_id: (problem.reason, len(problem.files)) for problem in inventory.problems}
    assert found == {
        "a": ("an image without mask", 1),
        "b": ("the identifier occurs more than once", 3),
        "c": ("the identifier occurs more than once", 3),
        "C": ("the identifier occurs more than once", 3),
        "d": ("a mask without image (looked for .jpg, .jpeg, .png, .bmp, .tif, .tiff)", 1),
    }


def test_composed_and_decomposed_unicode_are_the_same():
    inventory = pair([("e\u0301", Path("1.jpg"))], [("\u00e9", Path("1.png"))])
    assert [case.case_id for case in inventory.cases] == ["\u00e9"]


@pytest.mark.parametrize(("name", "reason"), [("x" * 247, "too long by 1"), ("\udcff", "Unicode"), ("", "no case")])
def test_names_that_nnunet_cannot_have(name, reason):
    inventory = pair([(name, Path("i"))], [(name, Path("m"))])
    assert reason in inventory.problems[0].reason
    assert pair([("x" * 246, Path("i"))], None).cases


def test_a_case_in_two_subsets_is_a_problem():
    merged = merge([pair(named("a.jpg", "b.jpg"), None), pair(named("B.jpg"), None, "test")])
    assert [case.case_id for case in merged.cases] == ["a"]
    assert "training and test" in merged.problems[0].reason


def test_hidden_and_other_files_are_no_images(tmp_path):
    for name in ("a.jpg", "._a.jpg", ".b.png", "LICENSE.txt", "b.PNG"):
        (tmp_path / name).touch()
    assert [file.name for file in image_files(tmp_path)] == ["a.jpg", "b.PNG"]


def test_finds_a_folder_through_wrappers_and_link_loops(tmp_path):
    (tmp_path / "x" / "want" / "want").mkdir(parents=True)
    (tmp_path / "x" / "loop").symlink_to(tmp_path)
    assert find_folder(tmp_path, "want") == tmp_path / "x" / "want" / "want"
    assert find_folder(tmp_path / "x" / "want", "want") == tmp_path / "x" / "want" / "want"
    assert find_folder(tmp_path, "other") is None
    (tmp_path / "y" / "want").mkdir(parents=True)
    with pytest.raises(ConversionError, match="several folders"):
        find_folder(tmp_path, "want")
