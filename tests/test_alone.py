"""Each of the three model files works after being copied alone into another project, which has only torch."""
import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHAPTERS = ["iris_tokenizer", "iris_world_model", "iris_agent"]
OTHER_LIBRARIES = ["ale_py", "cv2", "gymnasium", "tensorboard", "tqdm", "tyro"]  # of requirements.txt


def source(chapter):
    return (Path(__file__).parents[1] / f"{chapter}.py").read_text()


def example(chapter):
    """The indented lines after the docstring's "Reuse it"."""
    _, _, rest = ast.get_docstring(ast.parse(source(chapter))).partition("Reuse it:")
    lines = rest.splitlines()[1:]
    first = next(i for i, line in enumerate(lines) if line.startswith("    "))
    last = next(i for i, line in enumerate(lines) if i > first and line and not line.startswith("    "))
    return "\n".join(line[4:] for line in lines[first:last])


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_docstrings_example_runs_beside_the_copied_file_alone(chapter, tmp_path):
    shutil.copy(Path(__file__).parents[1] / f"{chapter}.py", tmp_path)
    assert f"from {chapter} import" in example(chapter)
    missing = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.modules.update(dict.fromkeys({OTHER_LIBRARIES}))"
    command = [sys.executable, "-I", "-c", f"{missing}\n{example(chapter)}"]  # -I: no PYTHONPATH, no current folder
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_imports_torch_and_the_standard_library_only(chapter):
    def imported(node):  # outside functions: those are the lessons, and the reader of published checkpoints
        if isinstance(node, ast.Import):
            return {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            return {"." * node.level + (node.module or "")}
        inner = [] if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else ast.iter_child_nodes(node)
        return set().union(*map(imported, inner))

    packages = {name.split(".")[0] for name in imported(ast.parse(source(chapter)))}
    assert "torch" in packages and packages - {"torch"} <= sys.stdlib_module_names
