"""The sizes of the package: files that fit in a head, functions that fit on a screen."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "dllm").rglob("*.py"))
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 450, 60
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def lines_without_tables(source: str) -> int:
    """Lines of a module without the tables at its top level, which may be as long as what they list."""
    tables = [n for n in ast.parse(source).body if isinstance(n, ast.Assign | ast.AnnAssign)]
    literal = (ast.Dict, ast.List, ast.Tuple, ast.Set, ast.Constant)
    return len(source.splitlines()) - sum(n.end_lineno - n.lineno for n in tables if isinstance(n.value, literal))


def test_no_file_is_longer_than_a_reader_can_hold():
    long = {path.relative_to(ROOT).as_posix(): lines_without_tables(path.read_text()) for path in FILES}
    assert len(long) > 100
    assert not {name: lines for name, lines in long.items() if lines > MOST_LINES_OF_A_FILE}


def test_no_function_is_longer_than_a_screen():
    lengths = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, FUNCTIONS)
    }
    assert len(lengths) > 1000
    assert not {name: lines for name, lines in lengths.items() if lines > MOST_LINES_OF_A_FUNCTION}
