"""Import one module right after another, however and whenever that other one is imported."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def import_after(module: str, follower: str) -> None:
    """Import `follower` as soon as `module` has been imported: now, if it has been or is about to be.

    Args:
        module: Dotted name of a module inside a package. Its import returns when both are there, unless the import of
            the follower began first.
        follower: Dotted name of the module to import, which may import `module` itself.
    """
    hook = _Hook(module, follower)
    sys.meta_path.insert(0, hook)
    # Look for the package, not the module: another thread that has already found the module, without this hook, may
    # not have entered it into sys.modules yet.
    if module.rpartition(".")[0] in sys.modules:
        import_module(module.partition(".")[0])  # waits for a thread that is in the middle of the whole library
        hook.finish()


class _Hook(MetaPathFinder):
    """Finds the module as the other finders do, and imports the follower after it. Leaves all other modules alone."""

    def __init__(self, module: str, follower: str) -> None:
        self.module, self.follower = module, follower

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        for finder in sys.meta_path:
            if not isinstance(finder, _Hook) and (spec := finder.find_spec(fullname, path, target)) is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None

    def finish(self) -> None:
        if self.follower not in sys.modules:  # otherwise a thread that waits for this module may be importing it
            import_module(self.follower)
        # A new list, because other threads may be walking through the old one and would miss a finder.
        sys.meta_path = [f for f in sys.meta_path if not (isinstance(f, _Hook) and f.module == self.module)]


class _Loader(Loader):
    """Loads the module with its own loader, the only one that the module sees, and then calls the hook."""

    def __init__(self, loader: Loader, hook: _Hook) -> None:
        self.loader, self.hook = loader, hook

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.hook.finish()
