"""Planted faults: does a test fail when the source is wrong? Writes the faults that no test noticed as Markdown.

    python tests/mutation.py netem/bucket.py netem/link.py
    python tests/mutation.py node/subspace --sample 20
    python tests/mutation.py netem/lane.py --list

Each fault is one change of the source: another comparison, another arithmetic operator, another constant, a negated
condition, a call or an assignment left out. It is made in a copy of the source tree, and the tests that guard the
module (`GUARDS`) run there in a process of their own, up to the first that fails. A fault that fails no test survives.
Some survivors change nothing that can be observed; the others are missing tests. Modules that are not named keep their
sections in the document, and so does whatever else is written there by hand.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from netem.tables import markdown_table  # noqa: E402

NETEM, NODE = "tests/unit/netem", "tests/unit/node"
GUARDS = {
    "netem/assembly.py": [f"{NETEM}/test_assembly.py"],
    "netem/bucket.py": [f"{NETEM}/test_bucket.py", f"{NETEM}/test_reshape.py"],
    "netem/changes.py": [f"{NETEM}/test_network_schedule.py", "tests/unit/coordinator/test_live.py"],
    "netem/counters.py": [f"{NETEM}/test_counters.py", f"{NETEM}/test_trust.py"],
    "netem/delay.py": [f"{NETEM}/test_delay.py"],
    "netem/frames.py": [f"{NETEM}/test_frames.py"],
    "netem/ingress.py": [f"{NETEM}/test_ingress.py", f"{NETEM}/test_fabric.py", f"{NETEM}/test_reshape.py"],
    "netem/lane.py": [
        *(f"{NETEM}/test_{name}.py" for name in ("shaper", "reshape", "trust", "fabric", "link", "acknowledgement"))
    ],
    "netem/link.py": [*(f"{NETEM}/test_{name}.py" for name in ("link", "acknowledgement", "reshape"))],
    "netem/network.py": [f"{NETEM}/test_profile.py", f"{NETEM}/test_reshape.py"],
    "netem/peers.py": [f"{NETEM}/test_peers.py"],
    "netem/profile.py": [f"{NETEM}/test_profile.py", f"{NETEM}/test_network_schedule.py"],
    "netem/schedule.py": [f"{NETEM}/test_network_schedule.py"],
    "netem/segments.py": [f"{NETEM}/test_assembly.py", f"{NETEM}/test_shaper.py", f"{NETEM}/test_link.py"],
    "netem/shaper.py": [f"{NETEM}/test_shaper.py", f"{NETEM}/test_reshape.py", f"{NETEM}/test_fabric.py"],
    "netem/tables.py": [f"{NETEM}/test_tables.py"],
    "netem/trace.py": [f"{NETEM}/test_trace.py"],
    "node/data": [f"{NODE}/data"],
    "node/exchange": [f"{NODE}/exchange"],
    "node/exchange/documents.py": [f"{NODE}/exchange/test_documents.py"],
    "node/exchange/formats.py": [f"{NODE}/exchange/test_formats.py"],
    "node/exchange/inbox.py": [f"{NODE}/exchange/test_inbox.py", f"{NODE}/exchange/test_wire.py"],
    "node/exchange/payload.py": [f"{NODE}/exchange/test_payload.py"],
    "node/exchange/tags.py": [f"{NODE}/exchange/test_tags.py", f"{NODE}/exchange/test_inbox.py"],
    "node/subspace": [f"{NODE}/subspace"],
    "node/subspace/basis.py": [f"{NODE}/subspace/test_basis.py", f"{NODE}/train/test_basis_stage.py"],
    "node/subspace/codec.py": [f"{NODE}/subspace/test_codec.py"],
    "node/subspace/rotation.py": [f"{NODE}/subspace/test_rotation.py", f"{NODE}/subspace/test_codec.py"],
    "node/train": [f"{NODE}/train"],
    "node/train/agreed.py": [f"{NODE}/train/test_streaming.py", f"{NODE}/train/test_outer.py"],
    "node/train/averaging.py": [f"{NODE}/train/test_averaging.py", f"{NODE}/train/test_streaming.py"],
    "node/train/basis.py": [f"{NODE}/train/test_basis_stage.py", f"{NODE}/train/test_refresh.py"],
    "node/train/checkpoint.py": [f"{NODE}/train/test_checkpoint.py"],
    "node/train/evaluate.py": [f"{NODE}/train/test_trainer.py"],
    "node/train/finite.py": [f"{NODE}/train/test_finite.py"],
    "node/train/fragments.py": [f"{NODE}/train/test_streaming.py"],
    "node/train/head.py": [f"{NODE}/train/test_head.py"],
    "node/train/optimizer.py": [f"{NODE}/train/test_optimizer.py"],
    "node/train/outer.py": [f"{NODE}/train/test_outer.py"],
    "node/train/passes.py": [f"{NODE}/train/test_trainer.py"],
    "node/train/resume.py": [f"{NODE}/train/test_resume.py"],
    "node/train/ring_formats.py": [f"{NODE}/train/test_ring_formats.py"],
    "node/train/schedule.py": [
        *(f"{NODE}/train/test_{name}.py" for name in ("schedule", "finite", "refresh", "unplug"))
    ],
    "node/train/tensor_files.py": [f"{NODE}/train/test_checkpoint.py"],
    "node/train/trainer.py": [f"{NODE}/train/test_{name}.py" for name in ("trainer", "finite", "basis_stage")],
}
"""The tests that guard a module, or all modules of a folder. The closest entry holds; what is not there is left out."""

COPIED = ("netem", "coordinator", "node", "tests", "configs", "pyproject.toml")
CONFTEST = """\
from hypothesis import Phase, settings

settings.register_profile("mutation", phases=(Phase.explicit, Phase.generate), database=None, derandomize=True)
settings.load_profile("mutation")
"""
"""In the copy, hypothesis neither shrinks a counterexample nor keeps it, and draws the same in each run."""
LEAST_TIMEOUT_S = 20.0
PATIENCE = 5
"""A run of the tests may take this many times as long as without a fault; a fault that takes longer is noticed."""


class Fault(NamedTuple):
    """One change: the text between two places of the source, given as byte offsets, and what stands there instead."""

    line: int
    start: int
    end: int
    was: str
    becomes: str

    def applied(self, source: bytes) -> bytes:
        """The source with the fault in it."""
        return source[: self.start] + self.becomes.encode() + source[self.end :]


# ── Which faults there are ───────────────────────────────────────────────────────────────────────────────────────────

_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
_ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*", ast.Pow: "*",
    ast.LShift: ">>", ast.RShift: "<<", ast.BitAnd: "|", ast.BitOr: "&", ast.MatMult: "*",
}  # fmt: skip
_TWINS = {"min": "max", "max": "min", "any": "all", "all": "any"}
_UNTOUCHED = ("TYPE_CHECKING", "__name__", "__all__", "__slots__")


def faults_of(source: bytes) -> list[Fault]:
    """All faults that can be planted, in the order of the source."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))

    def place(node: ast.AST, text: str) -> Fault:
        assert isinstance(node, ast.expr | ast.stmt)
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        return Fault(node.lineno, start, end, source[start:end].decode(), text)

    found = [place(node, text) for node, text in _changes(ast.parse(source))]
    return sorted({fault for fault in found if fault.was != fault.becomes}, key=lambda fault: (fault.start, fault.end))


def _changes(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Each node that can be wrong, with the text that would be. Annotations, texts and assertions are left alone."""
    for node in _visited(tree):
        match node:
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                yield node, f"{_text(left)} {_COMPARISONS[type(op)]} {_text(right)}"
            case ast.BinOp(left=left, op=op, right=right) if not _is_text(left) and not _is_text(right):
                yield node, f"({_text(left)}) {_ARITHMETIC.get(type(op), '+')} ({_text(right)})"
            case ast.AugAssign(target=target, op=op, value=value):
                yield node, f"{_text(target)} {_ARITHMETIC.get(type(op), '+')}= {_text(value)}"
                yield node, "pass"
            case ast.BoolOp(op=op, values=values):
                other = " and " if isinstance(op, ast.Or) else " or "
                yield node, "(" + other.join(f"({_text(value)})" for value in values) + ")"
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                yield node, f"({_text(operand)})"
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                yield node, f"({_text(operand)})"
            case ast.Constant(value=bool(value)):
                yield node, str(not value)
            case ast.Constant(value=int(number)):
                yield node, str(number + 1)
            case ast.Constant(value=float(number)):
                yield node, repr(2 * number + (number == 0))
            case ast.Call(func=ast.Name(id=name), args=args) if name in _TWINS and args:
                yield node.func, _TWINS[name]
            case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test) if not _has_opposite(test):
                yield test, f"(not ({_text(test)}))"
            case ast.Expr(value=ast.Call()) | ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
                yield node, "pass"
            case ast.Delete() | ast.Raise() | ast.Continue() | ast.Break():
                yield node, "pass"


def _visited(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return
    if isinstance(node, ast.If | ast.Assign) and any(name in ast.unparse(node)[:40] for name in _UNTOUCHED):
        return
    if isinstance(node, ast.keyword) and node.arg in ("frozen", "kw_only", "gc"):
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params", "type_comment"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _visited(child)


def _has_opposite(test: ast.AST) -> bool:
    """Whether its negation is planted anyway, as another comparison."""
    return isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Is | ast.IsNot | ast.In | ast.NotIn | ast.Eq)


def _text(node: ast.AST) -> str:
    return ast.unparse(node)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


# ── Which tests notice them ──────────────────────────────────────────────────────────────────────────────────────────


def guards_of(module: str) -> list[str]:
    """The tests that guard a module. Raises `SystemExit` if the table has none."""
    for key in (module, *(str(folder) for folder in Path(module).parents)):
        if key in GUARDS:
            return GUARDS[key]
    raise SystemExit(f"mutation: {module}: no tests guard it; add it to GUARDS in tests/mutation.py")


def survivors(copy: Path, module: str, faults: Sequence[Fault], guards: Sequence[str]) -> list[Fault]:
    """Those of `faults` that no test notices, tried one after the other in the tree `copy`."""
    path, source = copy / module, (copy / module).read_bytes()
    began = time.monotonic()
    if not _passes(copy, guards, 600.0):
        raise SystemExit(f"mutation: {module}: its tests fail without any fault: {' '.join(guards)}")
    timeout_s = max(LEAST_TIMEOUT_S, PATIENCE * (time.monotonic() - began))
    found = []
    for number, fault in enumerate(faults, start=1):
        path.write_bytes(fault.applied(source))
        for cached in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
            cached.unlink()  # as old and as long as what it was made of, it would be taken for current
        if survived := _passes(copy, guards, timeout_s):
            found.append(fault)
        print(f"{module}:{fault.line} {number}/{len(faults)} {'SURVIVED' if survived else 'noticed'}", flush=True)
    path.write_bytes(source)
    return found


def _passes(copy: Path, guards: Sequence[str], timeout_s: float) -> bool:
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    command += ["-o", "timeout=0", *guards]  # pytest's own timeout would print the stacks of all threads
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


# ── The document ─────────────────────────────────────────────────────────────────────────────────────────────────────

_HEAD = """\
# Planted faults that no test notices

Written by `python tests/mutation.py MODULE…`, whose head says which faults are planted. A survivor is a missing test,
or a change that nothing can observe.
"""


def section(module: str, total: int, tried: int, found: Sequence[Fault], guards: Iterable[str]) -> str:
    """One module's part of the document, its heading included."""
    which = "all" if tried == total else f"a sample of {tried} from {total}"
    count = f"{tried} faults ({which}), {tried - len(found)} noticed, {len(found)} not. Tests: "
    parts = [f"## {module}", count + ", ".join(f"`{guard}`" for guard in guards) + "."]
    if found:
        rows = [[str(fault.line), _code(fault.was), _code(fault.becomes)] for fault in found]
        parts.append(markdown_table(["line", "source", "fault"], rows, align="rl"))
    return "\n\n".join(parts) + "\n"


def merged(document: str, sections: dict[str, str]) -> str:
    """`document` with these sections in place of those of the same headings; new ones come last."""
    head, *old = (document or _HEAD).split("\n## ")
    kept = {part.partition("\n")[0].strip(): f"## {part.strip()}\n" for part in old}
    return "\n".join([head.rstrip() + "\n", *(kept | sections).values()])


def _code(text: str) -> str:
    line = " ".join(text.split())
    return f"`{line if len(line) <= 70 else line[:67] + '...'}`"


def main() -> None:
    parser = argparse.ArgumentParser(description="Plant faults in modules, and list those that no test notices.")
    parser.add_argument("modules", nargs="+", metavar="MODULE", help="a source file, or a folder of them")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="try this many faults per module, drawn")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="print the faults, and try none")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "mutation.md", help="the document to write")
    options = parser.parse_args()
    sections: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="isthmus-mutation-") as folder:
        copy = Path(folder)
        for module in _modules(options.modules):
            every = faults_of((ROOT / module).read_bytes())
            faults = every
            if 0 < options.sample < len(every):
                drawn = random.Random(f"{options.seed} {module}").sample(every, options.sample)
                faults = sorted(drawn, key=lambda fault: (fault.start, fault.end))
            if options.list:
                print(
                    *(f"{module}:{fault.line}: {_code(fault.was)} → {_code(fault.becomes)}" for fault in faults),
                    sep="\n",
                )
                continue
            if not any(copy.iterdir()):
                _copy(copy)
            guards = guards_of(module)
            found = survivors(copy, module, faults, guards)
            sections[module] = section(module, len(every), len(faults), found, guards)
            document = options.out.read_text(encoding="utf-8") if options.out.exists() else ""
            options.out.write_text(merged(document, sections), encoding="utf-8")


def _modules(given: Sequence[str]) -> list[str]:
    found: list[str] = []
    for name in given:
        path = (Path.cwd() / name).resolve()
        if not path.exists() or not path.is_relative_to(ROOT):
            raise SystemExit(f"mutation: {name}: expected a source file of this repository, or a folder of them")
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        found += [file.relative_to(ROOT).as_posix() for file in files if file.name != "__init__.py"]
    return found


def _copy(target: Path) -> None:
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target / name)
    (target / "conftest.py").write_text(CONFTEST, encoding="utf-8")


if __name__ == "__main__":
    main()
