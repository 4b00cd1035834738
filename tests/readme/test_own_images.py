"""The README's section on one's own images, with some that are drawn here."""

import pytest
from readme_code import Reader, code_of
from training_files import write_folder

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module", autouse=True)
def _pictures(reader: Reader) -> None:
    write_folder(reader.folder / "pictures", 40, classes=("cat", "dog"))


@pytest.mark.parametrize(("language", "code"), code_of("Your own images"))
def test_code(language, code, reader):
    printed = reader.run(language, code)
    assert "model    mine/model\n" in printed
    assert "best     mine/best, accuracy " in printed
