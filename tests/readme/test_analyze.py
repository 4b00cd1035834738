"""The README's section on analysis, with the weights that ship in the place of those that the quickstart trains."""

import pytest
from readme_code import Reader, code_of

from vitreg_hub.bundle import ModelBundle

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module", autouse=True)
def _quickstart(reader: Reader) -> None:
    ModelBundle.load("vit_nano_reg4.digits").save(reader.folder / "quickstart" / "model")


@pytest.mark.parametrize(("language", "code"), code_of("Analyze"))
def test_code(language, code, reader):
    assert reader.run(language, code)
