"""The README's section on evaluation."""

import pytest
from readme_code import code_of

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize(("language", "code"), code_of("Evaluate"))
def test_code(language, code, reader):
    printed = reader.run(language, code)
    if language == "bash":
        assert "scores/report" in printed
    else:
        assert "Score(name='top-1'" in printed
        assert "torch.Size([8, 10])" in printed
