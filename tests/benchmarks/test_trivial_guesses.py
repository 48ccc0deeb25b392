import json
import math
import sys

import numpy as np
import trivial_guesses
from PIL import Image


def test_what_the_guesses_score(tmp_path, monkeypatch, capsys) -> None:
    """One lesion that fills the image and one image without any, which the empty guess and the network leave so."""
    cases = []
    for name, value, scored in (("full", 255, 0.9), ("none", 0, math.nan)):
        file = tmp_path / f"{name}.png"
        Image.fromarray(np.full((20, 30), value, np.uint8)).save(file)
        cases.append({"reference_file": str(file), "metrics": {"1": {"Dice": scored}}})
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "summary.json").write_text(json.dumps({"metric_per_case": cases}))
    monkeypatch.setattr(sys, "argv", ["trivial_guesses.py", str(tmp_path)])
    trivial_guesses.main()
    network, background, ellipse = capsys.readouterr().out.splitlines()
    assert network.endswith("mean Dice 0.9000 over 1 images")
    assert background.endswith("mean Dice 0.0000 over 1 images")
    assert ellipse.endswith("over 2 images")
