"""The README's quickstart, and the sections that speak of the model that it leaves."""

import re

import pytest
from readme_code import Reader, code_of

SECTIONS = ("Install and run", "Use with timm", "Use with transformers", "Bundles", "Publish")
INSTALL, TESTS, *CODE = code_of(*SECTIONS)

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def printed(reader: Reader, request: pytest.FixtureRequest) -> str:
    """What the README's first command printed; by default, it trains for a sixth of the time."""
    command = INSTALL[1].partition("&& ")[2]
    return reader.run("bash", command if request.config.getoption("--slow") else f"{command} --epochs 4", cold=True)


def test_quickstart_learns(printed, request):
    promised = 0.97 if request.config.getoption("--slow") else 0.5
    assert float(re.search(r"held-out accuracy (\S+)", printed)[1]) >= promised
    assert printed.count("largest difference 0\n") == 4


def test_what_the_quickstart_says_to_type_next_works(printed, reader):
    timm_line, auto_line, push_line = printed.partition("next:\n")[2].splitlines()
    assert reader.run("bash", timm_line).startswith("VisionTransformer(")
    assert reader.run("bash", auto_line).startswith("VitRegModel(")
    assert push_line.split() == ["vitreg", "push", "quickstart/model", "your-name/vit_nano_reg4.digits"]


@pytest.mark.parametrize(("language", "code"), CODE)
def test_code(language, code, printed, reader):
    assert reader.run(language, code)
