"""Private words in .codespell-words, which `make lint` looks for, and the size of kernels."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def codespell(*arguments):
    command = [sys.executable, "-m", "codespell_lib", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_private_word_and_phrase_is_found(tmp_path):
    """Phrases are found only if the regular expression in pyproject.toml has them, too."""
    words = [line.partition("->")[0] for line in (ROOT / ".codespell-words").read_text().splitlines()]
    file = tmp_path / "page.md"
    file.write_text("\n".join(f"A sentence with {word} in it." for word in words))
    done = codespell(file)
    found = [line.split(": ")[1].partition(" ==> ")[0] for line in done.stdout.splitlines()]
    assert done.returncode != 0 and found == words


def test_words_of_the_field_are_accepted(tmp_path):
    file = tmp_path / "page.md"
    file.write_text("transpose_block_lists returns integers for each tile; apply_mask continues here.\n")
    assert codespell(file).returncode == 0


def kernels():
    """Name, lines and parameters of each function that runs on a GPU."""
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(each) for each in node.decorator_list):
                yield node.name, node.end_lineno - node.lineno + 1, len(node.args.args)


def test_kernels_have_at_most_120_lines_and_40_parameters():
    found = list(kernels())
    assert len(found) > 100
    assert not [each for each in found if each[1] > 120 or each[2] > 40]
