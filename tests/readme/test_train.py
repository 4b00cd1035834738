"""The README's section on training."""

import pytest
from readme_code import code_of

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@pytest.mark.parametrize(("language", "code"), code_of("Train"))
def test_code(language, code, reader):
    assert reader.run(language, code)
