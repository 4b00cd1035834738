"""The README's section on conversion."""

import pytest
from readme_code import code_of

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize(("language", "code"), code_of("Convert"))
def test_code(language, code, reader):
    assert reader.run(language, code)
