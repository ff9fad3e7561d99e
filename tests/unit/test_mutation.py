"""The command that plants faults: which ones it makes, and what it writes."""

from __future__ import annotations

import ast

import pytest
from helpers import ROOT
from mutation import GUARDS, faults_of, merged, section

SOURCE = '''"""Words with 1 < 2 are left alone, µ included."""

def f(x: int = 3) -> bool:
    assert x > 0
    if x < 2 and not x:
        g(f"{x + 1}")
        return False
    x += 1
    return min(x, 4.0) == x
'''.encode()


def test_faults_are_other_comparisons_operators_constants_and_missing_calls() -> None:
    found = {(fault.line, fault.was, fault.becomes) for fault in faults_of(SOURCE)}
    assert found == {
        (3, "3", "4"),
        (5, "x < 2 and not x", "((x < 2) or (not x))"),
        (5, "x < 2 and not x", "(not (x < 2 and (not x)))"),
        (5, "x < 2", "x <= 2"),
        (5, "2", "3"),
        (5, "not x", "(x)"),
        (6, 'g(f"{x + 1}")', "pass"),
        (7, "False", "True"),
        (8, "x += 1", "x -= 1"),
        (8, "x += 1", "pass"),
        (8, "1", "2"),
        (9, "min(x, 4.0) == x", "min(x, 4.0) != x"),
        (9, "min", "max"),
        (9, "4.0", "8.0"),
    }


@pytest.mark.parametrize("module", ["netem/link.py", "netem/network.py", "node/data/batches.py"])
def test_each_fault_is_a_program_that_differs(module: str) -> None:
    source = (ROOT / module).read_bytes()
    whole = ast.dump(ast.parse(source))
    for fault in faults_of(source):
        assert ast.dump(ast.parse(fault.applied(source))) != whole, fault


def test_the_table_names_modules_and_tests_that_exist() -> None:
    for module, guards in GUARDS.items():
        assert all((ROOT / path).exists() for path in (module, *guards)), module


def test_only_sections_of_modules_that_were_tried_are_replaced() -> None:
    fault = next(fault for fault in faults_of(b"a = 1 < 2\n") if fault.was == "1 < 2")
    first = merged("", {"x.py": section("x.py", 3, 3, [fault], ["t.py"]), "y.py": section("y.py", 9, 2, [], ["u.py"])})
    assert "3 faults (all), 2 noticed, 1 not. Tests: `t.py`." in first
    assert "| `1 < 2` | `1 <= 2` |" in first
    assert "2 faults (a sample of 2 from 9), 2 noticed, 0 not." in first
    again = merged(first + "\nBy hand.\n", {"x.py": section("x.py", 3, 3, [], ["t.py"])})
    assert "1 <= 2" not in again
    assert again.index("## x.py") < again.index("## y.py") < again.index("By hand.")
