"""`python -m benchmarks NAME [ARGUMENTS]` runs a benchmark; without a name, it lists all."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import typer

from puzzle_nas.errors import PuzzleError

FOLDER = Path(__file__).parent


def benchmarks() -> dict[str, str]:
    """Every module with a `main`, by name, with the first line of its docstring; nothing is imported."""
    found = {}
    for path in sorted((*FOLDER.glob("*.py"), *FOLDER.glob("*/__init__.py"))):
        tree = ast.parse(path.read_text())
        name = path.parent.name if path.stem == "__init__" else path.stem
        if name != "__main__" and any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[name] = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")
    return found


def run(words: list[str]) -> int:
    """Run the benchmark that the words name; the exit code, 2 with one sentence for what a user can mend."""
    names = benchmarks()
    if not words or words[0] in ("-h", "--help"):
        print("python -m benchmarks NAME [ARGUMENTS]; figures go to benchmarks/results/. NAME --help says more.\n")
        for name, line in names.items():
            print(f"  {name:16} {line}")
        return 0
    name, *rest = words
    try:
        if name not in names:
            raise PuzzleError(f"There is no benchmark '{name}'; benchmarks: {', '.join(names)}.")
        module = importlib.import_module(f"benchmarks.{name}")
        app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        # Each paragraph of the module's docstring as its lines are.
        app.command(help="\b\n" + (module.__doc__ or "").strip().replace("\n\n", "\n\n\b\n"))(module.main)
        app(rest, prog_name=f"python -m benchmarks {name}")
    except PuzzleError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
