"""Libraries that tests need beside ours: where they and their neighbours refuse each other, the tests are skipped.

Which versions go together is not ours to know: the libraries say it themselves.
"""

import importlib
import warnings
from importlib.metadata import requires, version
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from transformers.dependency_versions_check import dep_version_check


def refusal(project: str) -> str | None:
    """What stands between the installed version of a project and its neighbours, None if nothing does.

    Both sides are asked: the project's own requirements, and what transformers checks before it uses the project.
    """
    for requirement in map(Requirement, requires(project) or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            installed = version(requirement.name)
            if not requirement.specifier.contains(installed, prereleases=True):
                return f"{project} {version(project)} wants {requirement}, not {installed}"
    try:
        dep_version_check(project)
    except KeyError:  # it has no opinion
        return None
    except ImportError as error:
        return f"transformers {version('transformers')}: {error}"
    return None


def usable(module: str, *, project: str | None = None) -> ModuleType:
    """Import a library, or skip the test, or the whole file of tests, with the reason why it is not to be used.

    Args:
        module: Its name in Python.
        project: What pip calls it, if not the same.
    """
    if reason := refusal(project or module):
        warnings.warn(reason, stacklevel=2)  # seen in the summary; reasons of skips are not
        pytest.skip(reason, allow_module_level=True)
    return importlib.import_module(module)
