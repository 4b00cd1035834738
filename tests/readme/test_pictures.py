"""The README's section on predictions and features, with digits as pictures."""

import pytest
from readme_code import Reader, code_of

from vitreg_hub.images.embedded import digits

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module", autouse=True)
def _pictures(reader: Reader) -> None:
    (reader.folder / "pictures").mkdir()
    for i, row in enumerate(digits("test").select(range(40))):
        row["image"].save(reader.folder / "pictures" / f"{i}.png")


@pytest.mark.parametrize(("language", "code"), code_of("Predictions and features"))
def test_code(language, code, reader):
    assert reader.run(language, code)
