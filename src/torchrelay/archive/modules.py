"""Which of a component's own modules its handler needs: they travel in the archive, training code does not."""

import ast
from collections.abc import Iterator
from pathlib import Path

from torchrelay.archive.mar import BASE_HANDLER
from torchrelay.errors import ArchiveError


def serving_modules(component: Path) -> dict[str, Path]:
    """`handler.py`, `model.py` and the modules beside them that they import, however far down the chain."""
    found: dict[str, Path] = {}
    waiting = ["handler", "model"]
    while waiting:
        path = component / f"{waiting.pop()}.py"
        if path.name not in found:
            found[path.name] = path
            waiting.extend(name for name in sorted(set(_imports(path))) if _is_own(component, name))
    if BASE_HANDLER in found:
        raise ArchiveError(
            f"{component / BASE_HANDLER} has the name of the base handler", "another name", f"rename {BASE_HANDLER}"
        )
    return found


def _is_own(component: Path, name: str) -> bool:
    if (component / name / "__init__.py").is_file():
        raise ArchiveError(
            f"the handler imports the package {component / name}",
            "single modules beside handler.py: an archive is flat",
            f"move what it needs into {component / name}.py",
        )
    return (component / f"{name}.py").is_file()


def _imports(path: Path) -> Iterator[str]:
    """Top-level names that the module imports, also inside functions."""
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level or not node.module:
                raise ArchiveError(
                    f"{path}, line {node.lineno}: a relative import", "from model import …", f"edit {path}"
                )
            yield node.module.partition(".")[0]


def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except FileNotFoundError as error:
        raise ArchiveError(
            f"{path} does not exist", "handler.py and model.py in every component", f"write {path}"
        ) from error
    except (SyntaxError, ValueError) as error:
        raise ArchiveError(f"{path} is not Python: {error}", "a module that compiles", f"edit {path}") from error
