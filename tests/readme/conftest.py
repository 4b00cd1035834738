"""What the tests of the README share."""

from collections.abc import Iterator

import pytest
from hub_server import HubServer
from readme_code import Reader
from warm_python import WarmPython


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, warm_python: WarmPython) -> Iterator[Reader]:
    """Somebody who follows the README in an empty folder."""
    with HubServer({"hf_reader_of_this": "your-name"}) as hub:
        yield Reader(tmp_path_factory.mktemp("readme"), hub, warm_python)
