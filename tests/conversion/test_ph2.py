import numpy as np
import pytest
from PIL import Image

from nnunetv2_dermomamba.conversion.errors import SourceNotFoundError
from nnunetv2_dermomamba.conversion.ph2 import FOLDER, find_ph2, main
from nnunetv2_dermomamba.synthetic import draw_case


@pytest.fixture
def ph2(tmp_path):
    rng = np.random.default_rng(0)
    for case in ("IMD002", "IMD003"):
        image, mask = draw_case(rng, (64, 86))
        folder = tmp_path / "source" / "PH2Dataset" / FOLDER / case
        for kind, pixels in (("Dermoscopic_Image", image), ("lesion", mask)):
            (folder / f"{case}_{kind}").mkdir(parents=True)
            name = f"{case}.bmp" if kind == "Dermoscopic_Image" else f"{case}_lesion.bmp"
            Image.fromarray(pixels).save(folder / f"{case}_{kind}" / name)
        (folder / f"{case}_roi").mkdir()
        Image.fromarray(mask).save(folder / f"{case}_roi" / f"{case}_R1_Label2.bmp")
    return tmp_path / "source"


def test_found_from_above_and_below(ph2):
    for source in (ph2, ph2 / "PH2Dataset", ph2 / "PH2Dataset" / FOLDER, ph2 / "PH2Dataset" / FOLDER / "IMD002"):
        inventory = find_ph2(source)
        assert [case.case_id for case in inventory.cases] == ["IMD002", "IMD003"]
        assert not inventory.problems


def test_incomplete_cases_are_problems(ph2):
    (ph2 / "PH2Dataset" / FOLDER / "IMD002" / "IMD002_lesion" / "IMD002_lesion.bmp").unlink()
    (ph2 / "PH2Dataset" / FOLDER / "IMD004").mkdir()
    inventory = find_ph2(ph2)
    assert {problem.case_id: problem.reason for problem in inventory.problems} == {
        "IMD002": "an image without mask",
        "IMD004": "neither image nor mask in its folder",
    }


def test_missing_source(nnunet, capsys):
    with pytest.raises(SourceNotFoundError):
        find_ph2(nnunet)
    assert main([], default_source=nnunet / "data") == 2
    assert "PH2Dataset.rar" in capsys.readouterr().err


def test_converts(ph2, nnunet):
    assert main(["--source", str(ph2), "--workers", "1", "--size", "native", "--normalization", "rgb_to_0_1"]) == 0
    folder = nnunet / "nnUNet_raw" / "Dataset119_PH2"
    image = np.asarray(Image.open(folder / "imagesTr" / "IMD002_0000.png"))
    np.testing.assert_array_equal(image, draw_case(np.random.default_rng(0), (64, 86))[0])
    assert '"rgb_to_0_1"' in (folder / "dataset.json").read_text()
    assert '"native"' in (folder / "dataset.json").read_text()
