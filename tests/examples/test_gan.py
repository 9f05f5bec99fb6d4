"""The example of two networks in turns, run as a user would run it, for a short time."""

from __future__ import annotations

import re
from pathlib import Path

from _starting import run

GAN = Path(__file__).parents[2] / "examples" / "gan.py"


def test_gan_trains_two_networks_and_prints_what_the_generator_has_learned(tmp_path):
    result = run(GAN, "--epochs", "2", cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr
    places, share = result.stdout.splitlines()[-2:]
    assert re.fullmatch(r"Places that the generator has learned: \d of 8", places)
    assert re.fullmatch(r"Points near one of them: \d+%", share)
    assert "train discriminator loss" in result.stdout
    assert len(re.findall(r"^  [12]/2 .* \d\.\d+\*?$", result.stdout, flags=re.MULTILINE)) == 2
