import json

import pytest
from sklearn.model_selection import train_test_split

from nnunetv2_dermomamba.conversion.errors import ConversionError
from nnunetv2_dermomamba.conversion.paper_split import paper_split, write_paper_split

IDS = [f"ISIC_{number:07d}" for number in range(3, 3 + 2 * 2594, 2)]


def test_fold_0_is_the_released_hold_out():
    train, validation = train_test_split(IDS, test_size=520, random_state=257)
    fold = paper_split(IDS[::-1])[0]
    assert fold["train"] == sorted(train)
    assert fold["val"] == sorted(validation)
    # Known values: scikit-learn must not change what a seed means.
    assert [IDS.index(case) for case in fold["val"][:4]] == [4, 9, 10, 13]


def test_the_folds_validate_every_case_once():
    folds = paper_split(IDS)
    assert len(folds) == 5
    assert sorted(case for fold in folds for case in fold["val"]) == IDS
    assert sorted(len(fold["val"]) for fold in folds) == [518, 518, 519, 519, 520]
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == IDS


def test_too_few_cases():
    assert all(fold["train"] and fold["val"] for fold in paper_split(IDS[:524]))
    with pytest.raises(ConversionError, match="524"):
        paper_split(IDS[:523])


def test_another_split_is_not_overwritten_unasked(tmp_path):
    file = write_paper_split(IDS, tmp_path / "Dataset118_ISIC2018")
    assert file.name == "splits_final.json"
    assert json.loads(file.read_text()) == paper_split(IDS)
    write_paper_split(IDS, file.parent)
    with pytest.raises(ConversionError, match="another split"):
        write_paper_split(IDS[1:], file.parent)
    assert json.loads(file.read_text()) == paper_split(IDS)
    write_paper_split(IDS[1:], file.parent, overwrite=True)
    assert json.loads(file.read_text()) == paper_split(IDS[1:])
    assert [path.name for path in file.parent.iterdir()] == ["splits_final.json"]


def test_a_damaged_split_is_another_one(tmp_path):
    (tmp_path / "splits_final.json").write_text('[{"train": [')
    with pytest.raises(ConversionError, match=r"splits_final.json' holds another split. Remove it"):
        write_paper_split(IDS, tmp_path)
