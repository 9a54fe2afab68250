"""What a reader of train_gpt2.py meets; ruff checks the rest (pyproject.toml)."""
import ast
import io
import tokenize

import pytest

from conftest import ROOT, run

TRAINER = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
# what a tokenizer adds to what is read: line ends, indentation, the file's beginning and end
LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENDMARKER, tokenize.ENCODING)


def count_tokens(source):
    tokens = tokenize.tokenize(io.BytesIO(source.encode()).readline)
    return sum(token.type not in LAYOUT for token in tokens)


def packed_assignments(source):
    """Line numbers of `one, two = x, y`.

    Not of swaps, nor where all targets are single letters: sizes (B, T), or those of an equation (a, b, c).
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)):
            continue
        for target in node.targets:
            if not isinstance(target, ast.Tuple):
                continue
            names = [ast.unparse(element) for element in target.elts]
            values = [ast.unparse(element) for element in node.value.elts]
            swaps = sorted(names) == sorted(values)
            letters = all(len(name) == 1 for name in names)
            if not swaps and not letters:
                found.append(node.lineno)
    return found


def packed_statements(source):
    """Line numbers of tuples that stand as a statement, `f(), g()`."""
    nodes = ast.walk(ast.parse(source))
    return [node.lineno for node in nodes if isinstance(node, ast.Expr) and isinstance(node.value, ast.Tuple)]


def test_the_trainer_is_one_sitting():
    lines = TRAINER.splitlines()
    assert len(lines) <= 1640
    assert count_tokens(TRAINER) <= 11790


def test_lines_of_the_trainer_are_short():
    widths = [len(line) for line in TRAINER.splitlines() if line.strip()]
    assert sum(widths) / len(widths) <= 57


def test_the_trainer_assigns_one_thing_at_a_time():
    assert packed_assignments(TRAINER) == []


def test_no_tuple_is_two_statements():
    found = []
    for name in run("git", "ls-files", "*.py", cwd=ROOT).stdout.splitlines():
        path = ROOT / name
        if path.exists():  # not one that is about to be removed
            found += [f"{name}:{line}" for line in packed_statements(path.read_text(encoding="utf-8"))]
    assert found == []


# the checks themselves


def test_comments_and_layout_are_no_tokens():
    assert count_tokens("# a\nif x:  # b\n\n    y = 1\n") == len("if x : y = 1".split())


@pytest.mark.parametrize("source, packed", [
    ("a, b = b, a", False),
    ("self.old, self.new = self.new, self.old", False),
    ("B, T, C = x.size()", False),
    ("B, T = config.batch_size, config.sequence_length", False),
    ("first, rest = split(x)", False),
    ("loss, step = 0.0, 1", True),
    ("B, step = 8, 0", True),
    ("x = loss, step = 0.0, 1", True),
    ("self.a, self.b = a, b", True),
])
def test_packed_assignments_are_found(source, packed):
    assert packed_assignments(source) == [1] * packed


@pytest.mark.parametrize("source, packed", [
    ("f(), g()", True),
    ("x = f(), g()", False),
    ("f((1, 2))", False),
])
def test_packed_statements_are_found(source, packed):
    assert packed_statements(source) == [1] * packed
