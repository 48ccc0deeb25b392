import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "dataset_conversion"


@pytest.mark.parametrize(
    ("script", "archive"), [("isic2018", "ISIC2018_Task1_Test_GroundTruth.zip"), ("ph2", "PH2Dataset.rar")]
)
def test_without_data_the_script_says_what_to_fetch_from_any_folder(script, archive, nnunet_environment, tmp_path):
    command = [sys.executable, str(SCRIPTS / f"{script}.py"), "--source", str(tmp_path / "empty")]
    result = subprocess.run(command, cwd=tmp_path, env=nnunet_environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert archive in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("script", ["isic2018", "ph2"])
def test_help_names_the_default_source_in_the_repository(script, tmp_path):
    command = [sys.executable, str(SCRIPTS / f"{script}.py"), "--help"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert str(SCRIPTS.parent / "data" / ("ISIC2018" if script == "isic2018" else "PH2")) in "".join(
        result.stdout.split()
    )


@pytest.mark.parametrize("script", ["isic2018", "ph2"])
def test_without_the_package_it_is_said_how_to_install_it(script):
    command = [sys.executable, "-S", str(SCRIPTS / f"{script}.py")]  # without site-packages
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"pip install {SCRIPTS.parent}" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture
def nnunet_environment(tmp_path):
    return {**os.environ, "nnUNet_raw": str(tmp_path / "raw")}
