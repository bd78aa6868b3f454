"""The house: sizes of files, directions of imports. `python tests/test_house.py` prints both."""
import ast
import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = sorted(path for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
                 if path.parent.name in ("", ROOT.name, "kernels", "twin", "bench", "weights"))
FILES = [*PRODUCT, *sorted(ROOT.glob("tests/*.py"))]
# Who may import whom: each name's row holds all that it may import.
BELOW = {
    "console": set(),
    "options": {"console"},
    "images": {"console"},
    "data": {"console", "images", "twin"},
    "eval": {"data"},
    "runs": {"console", "data", "kernels", "options"},
    "backbone": {"data", "options", "runs"},
    "scores": set(),
    "published": {"kernels", "runs"},
    "predict": {"backbone", "data", "eval"},
    "ladmim": {"backbone", "data", "eval", "kernels", "options", "predict", "published", "runs",
               "scores"},
    "weights": {"backbone", "data", "runs"},
    "bench": {"backbone", "bench", "data", "eval", "kernels", "ladmim", "options", "runs", "scores",
              "twin", "weights"},
    "kernels": {"kernels"},
    "twin": {"twin"},
}
# Where ladmim.py computes the paper's equations; those of a group stand on one screen.
EQUATIONS = [{"3": "quantise", "4": "quantise"}, {"5": "decode"}, {"7": "loss"},
             {"8": "ViT.forward", "9": "ViT.forward"}, {"11": "mim_error", "12": "mim_error"}]
SCREEN = 50                                          # lines


def name_of(path: Path) -> str:
    """twin/render.py -> twin.render, ladmim.py -> ladmim."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in PRODUCT}


def imports(path: Path) -> set[str]:
    """Our modules that a file imports, inside functions, too."""
    names, package = set(), name_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, (package if node.level else "", node.module or "")))
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    siblings = {f"{package}.{name}" for name in names - MODULES.keys() if package == "bench"}
    return {name for name in (names | siblings) & MODULES.keys() if name != name_of(path)}


GRAPH = {name: imports(path) for name, path in MODULES.items()}


def functions(path: Path) -> dict[str, int]:
    """Name -> lines of each function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: node.end_lineno - node.lineno + 1 for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_is_no_longer_and_no_wider_than_agreed(path):
    config = configparser.ConfigParser(strict=False)
    config.read_string("[top]\n" + (ROOT / ".editorconfig").read_text())
    width = config.getint("*.py", "max_line_length")
    assert width == 100 and max(map(len, lines(path)), default=0) <= width
    limit = 800 if path.name == "ladmim.py" else 250 if path.parent.name == "twin" else 550
    assert len(lines(path)) <= limit


def test_the_product_is_no_longer_than_agreed():
    assert sum(len(lines(path)) for path in PRODUCT) <= 7973


def test_imports_go_one_way():
    for name, used in GRAPH.items():
        top = name.partition(".")[0]
        foreign = {other.partition(".")[0] for other in used} - BELOW[top] - {top}
        assert not foreign, f"{name} imports {foreign}"


@pytest.mark.parametrize("folder", ["twin", "kernels"])
def test_a_folder_that_stands_alone_imports_nothing_else_of_ours(tmp_path, folder):
    """Neither inside functions nor where the rest of the project is not there."""
    names = [name for name in MODULES if name.partition(".")[0] == folder]
    for name in names:
        assert {other.partition(".")[0] for other in GRAPH[name]} <= {folder}, name
    shutil.copytree(ROOT / folder, tmp_path / folder)
    done = subprocess.run([sys.executable, "-c", f"import {', '.join(names)}"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_imports_in_a_circle():
    left = {name: set(used) for name, used in GRAPH.items()}
    while left:
        free = {name for name, used in left.items() if not used & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {name: used for name, used in left.items() if name not in free}


def test_a_circle_and_an_import_inside_a_function_would_be_found(tmp_path, monkeypatch):
    inside = tmp_path / "data.py"
    inside.write_text("def f():\n    from bench import report\n    import ladmim\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert imports(inside) == {"bench.report", "ladmim"}
    monkeypatch.setitem(GRAPH, "data", imports(inside))
    for test in (test_imports_go_one_way, test_nothing_imports_in_a_circle):
        with pytest.raises(AssertionError):
            test()


def equation_lines() -> list[dict[str, int]]:
    """Each group's equations -> the line of the function that computes it and says so."""
    tree, groups = ast.parse((ROOT / "ladmim.py").read_text(encoding="utf-8")), []
    named = {}                                       # function, or Class.method -> node
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                named[child.name] = child
                named[f"{getattr(node, 'name', '')}.{child.name}"] = child
    for group in EQUATIONS:
        groups.append({})
        for number, name in group.items():
            first = (ast.get_docstring(named[name]) or "").partition(".")[0].partition(":")[0]
            assert re.search(rf"Equations? .*\b{number}\b", first), f"{name}: no equation {number}"
            groups[-1][number] = named[name].lineno
    return groups


def test_equations_stand_within_a_screen_of_their_neighbours():
    for group in equation_lines():
        assert max(group.values()) - min(group.values()) < SCREEN


def main():
    print(f"{'file':28}{'lines':>6}{'longest line':>14}  longest function")
    total = 0
    for path in PRODUCT:
        found = functions(path)
        longest = max(found, key=found.get, default="")
        total += len(lines(path))
        print(f"{path.relative_to(ROOT).as_posix():28}{len(lines(path)):6}"
              f"{max(map(len, lines(path)), default=0):14}  "
              f"{f'{longest}, {found[longest]}' if longest else ''}")
    print(f"{'product':28}{total:6}\n")
    for name, used in sorted(GRAPH.items()):
        print(f"{name} -> {', '.join(sorted(used)) or '(nothing of ours)'}")
    print()
    for group in equation_lines():
        for number, line in group.items():
            print(f"equation {number:>2}: ladmim.py:{line}")


if __name__ == "__main__":
    main()
