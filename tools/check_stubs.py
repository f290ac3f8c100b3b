"""Checks gradclip_ext/_C.pyi against the compiled module; `make stubs` runs it.

pybind11-stubgen writes a stub from the module's docstrings. Its types are rough, so only what it
gets right is compared: public names, and the parameter names of every function.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tempfile
from pathlib import Path

STUB = Path(__file__).resolve().parent.parent / "gradclip_ext" / "_C.pyi"


def generated_stub() -> str:
    """Returns the stub that pybind11-stubgen writes for the compiled module."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pybind11_stubgen", "gradclip_ext._C", "-o", folder]
        # It reports types that it cannot express; types are not compared.
        subprocess.run([*command, "--ignore-all-errors"], check=True)
        return Path(folder, "gradclip_ext", "_C.pyi").read_text(encoding="utf-8")


def signatures(stub: str) -> dict[str, set[tuple[str, ...]]]:
    """Returns each public name in `stub` with its parameter lists, one for each overload."""
    found: dict[str, set[tuple[str, ...]]] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef) and _is_public(node.name):
                found[prefix + node.name] = set()
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef) and _is_public(node.name):
                found.setdefault(prefix + node.name, set()).add(_parameters(node.args))
            elif isinstance(node, ast.AnnAssign) and _is_public(ast.unparse(node.target)):
                found[prefix + ast.unparse(node.target)] = set()

    visit(ast.parse(stub).body, "")
    return found


def differences(written: str, generated: str) -> list[str]:
    """Returns a line for each difference between the two stubs."""
    ours, compiled = signatures(written), signatures(generated)
    lines = [f"{name}: in the module, not in the stub" for name in compiled.keys() - ours.keys()]
    lines += [f"{name}: in the stub, not in the module" for name in ours.keys() - compiled.keys()]
    lines += [
        f"{name}: the stub has {_text(ours[name])}, the module {_text(compiled[name])}"
        for name in ours.keys() & compiled.keys()
        if ours[name] != compiled[name]
    ]
    return sorted(lines)


def _is_public(name: str) -> bool:
    return not name.startswith("_") or name == "__init__"


def _parameters(arguments: ast.arguments) -> tuple[str, ...]:
    """Returns the parameter names, keyword-only ones after a star."""
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    if arguments.vararg is not None:
        names.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        names.append("*")
    names += [argument.arg for argument in arguments.kwonlyargs]
    if arguments.kwarg is not None:
        names.append(f"**{arguments.kwarg.arg}")
    return tuple(names)


def _text(overloads: set[tuple[str, ...]]) -> str:
    return " and ".join(f"({', '.join(names)})" for names in sorted(overloads)) or "no parameters"


def main() -> int:
    lines = differences(STUB.read_text(encoding="utf-8"), generated_stub())
    for line in lines:
        print(f"{STUB.name}: {line}", file=sys.stderr)
    if not lines:
        print(f"{STUB.name} agrees with the compiled module")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
