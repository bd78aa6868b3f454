"""What all commands do alike: exit codes, and streams that are closed, full, or of few letters."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_data import loco, picture

import console

ROOT = Path(console.__file__).parent
FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device")


def run_code(body, shell='"$@"', cwd=None, **environment):
    """A process that ends with `run_command`'s exit code of the function body, started by a shell
    line."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    script = (f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom console import *\n"
              f"def command():\n{lines}sys.exit(run_command(command, 'stopped here'))\n")
    return subprocess.run(["sh", "-c", shell, "sh", sys.executable, "-c", script], cwd=cwd,
                          env=os.environ | environment, capture_output=True, encoding="utf-8",
                          errors="replace")


@pytest.mark.parametrize("body, code, error", [
    ("return 0", 0, ""), ("return 1", 1, ""), ("raise SystemExit", 0, ""),
    ("raise InputError('a\\nb')", 2, "error: a\\nb\n"),
    ("raise KeyboardInterrupt", 130, "\nstopped here\n"),
    ("open('no\\nne')", 2, "error: no\\nne: cannot be used (No such file or directory); check name "
     "and permissions, or name another\n"),
    ("os.listdir(b'\\xff')", 2, "error: \\udcff: cannot be used (No such file or directory); check "
     "name and permissions, or name another\n"),
    ("raise BrokenPipeError", 141, "")])
def test_each_ending_has_its_exit_code_and_at_most_one_line(body, code, error):
    done = run_code(f"print('so far')\n{body}")
    assert (done.returncode, done.stderr) == (code, error)
    assert done.stdout == "so far\n" or code == 141


WORK = "say('for all to read')\ntell('going on')\nopen('finished', 'w').close()\nreturn 0"
UNWRITTEN = "error: standard output: cannot be written (No space left on device)"


@FULL
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("streams, code, out, err", [
    ("", 0, "for all to read\n", "going on\n"), (">&-", 0, "", "going on\n"),
    ("2>&-", 0, "for all to read\n", ""), ("<&- >&- 2>&-", 0, "", ""),
    (">/dev/full", 2, "", "going on\n" + UNWRITTEN), ("2>/dev/full", 0, "for all to read\n", ""),
    (">/dev/full 2>&1", 2, "", "")])
def test_work_is_finished_whatever_becomes_of_its_words(tmp_path, streams, code, out, err,
                                                        unbuffered):
    done = run_code(WORK, f'"$@" {streams}', tmp_path, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == code and (tmp_path / "finished").exists()
    assert done.stdout == out and done.stderr.startswith(err)
    assert done.stderr.count("\n") == err.count("\n") + (UNWRITTEN in err)


@FULL
def test_a_command_whose_output_is_all_it_makes_stops_where_it_cannot_be_written():
    done = run_code("for i in range(10**6): print('a line of a table')\nreturn 0",
                    '"$@" >/dev/full')
    assert done.returncode == 2 and done.stderr.startswith(UNWRITTEN)
    assert done.stderr.count("\n") == 1


def test_a_file_does_not_take_the_place_of_a_closed_stream(tmp_path):
    body = ("with open('mine', 'w') as file:\n    os.system('echo a; echo b >&2')\n"
            "    assert file.fileno() > 2\nreturn 0")
    done = run_code(body, '"$@" <&- >&- 2>&-', tmp_path)
    assert done.returncode == 0 and (tmp_path / "mine").read_text() == ""


@pytest.mark.parametrize("encoding", ["ascii:strict", "latin-1:strict", "utf-8:strict"])
def test_names_that_a_terminal_cannot_show_are_escaped(encoding):
    done = run_code("print('gr\\xf6\\u017ee \\udcff \\xb1')\nreturn 0", PYTHONIOENCODING=encoding,
                    PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr


def test_only_a_command_hides_pillows_warnings_and_that_of_the_mapped_cache():
    done = run_code("import warnings\ndef ours():\n"
                    "    return [one for one in warnings.filters if 'PIL' in str(one)\n"
                    "            or 'writable' in str(one)]\n"
                    "before = ours()\nimport torch, backbone\nassert ours() == before\n"
                    "warnings.warn_explicit('of Pillow', UserWarning, 'x.py', 1, 'PIL.Image')\n"
                    "array = backbone.np.zeros(1)\narray.flags.writeable = False\n"
                    "torch.from_numpy(array)\n"
                    "warnings.warn_explicit('another', UserWarning, 'x.py', 1, 'torch')\nreturn 0")
    assert done.returncode == 0 and "another" in done.stderr, done.stderr
    assert "Pillow" not in done.stderr and "writable" not in done.stderr


# A folder without permission

def find_without_permission(folder, mode, find):
    """`find`, an expression, in a process that may not read the folder. -> the process"""
    # For root, permissions hold only without these capabilities.
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] * (os.geteuid() == 0)
    if drop and not shutil.which("setpriv"):
        pytest.skip("needs setpriv, or another user than root")
    script = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data; "
              f"from pathlib import Path; sys.exit(data.run_command(lambda: print({find}) or 0))")
    folder.chmod(mode)
    try:
        return subprocess.run([*drop, sys.executable, "-c", script], capture_output=True, text=True)
    finally:
        folder.chmod(0o755)


@pytest.mark.parametrize("mode", [0o000, 0o111, 0o444])
@pytest.mark.parametrize("where", ["", "pushpins", "pushpins/train", "pushpins/train/good",
                                   "pushpins/test", "pushpins/test/logical_anomalies",
                                   "pushpins/validation"])
def test_a_data_set_that_may_not_be_read_is_refused_or_read_whole(tmp_path, where, mode):
    """Folders whose names are known may do without the permission to list them."""
    root = loco(tmp_path / "photos", "pushpins").parent
    find = "len(data.find_photos(root, *data.find_data(root, 'all')[1], 0))"
    find = find.replace("root", f"Path({str(root)!r})")
    whole = find_without_permission(root, 0o755, find)
    done = find_without_permission(root / where, mode, find)
    assert whole.returncode == 0 and done.returncode in (0, 2), done.stderr
    if done.returncode:
        assert done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("error: ") and "(Permission denied)" in done.stderr
    else:
        assert done.stdout == whole.stdout


def test_photos_in_a_folder_that_may_not_be_read_are_not_passed_over(tmp_path):
    picture(tmp_path / "in/a.png")
    picture(tmp_path / "closed/b.png")
    images = f"data.load_images(data.find_images([Path({str(tmp_path)!r})]), 8)"
    find = f"[str(image) for image in {images}]"
    done = find_without_permission(tmp_path / "closed", 0o000, find)
    assert done.returncode == 0 and f"{tmp_path}/closed: cannot be read (Perm" in done.stdout
    assert done.stdout.count("cannot be read") == 1


def test_a_linked_photo_that_may_not_be_read_costs_itself_only(tmp_path):
    for name in ("in/a.png", "closed/b.png"):
        picture(tmp_path / name)
    (tmp_path / "in/link.png").symlink_to(tmp_path / "closed/b.png")
    for given in ("Path('in')", "Path('in/a.png'), Path('in/link.png')"):
        images = f"data.load_images(data.find_images([{given}]), 8)"
        find = f"__import__('os').chdir({str(tmp_path)!r}) or [str(image) for image in {images}]"
        done = find_without_permission(tmp_path / "closed", 0o000, find)
        assert done.returncode == 0 and "in/link.png" in done.stdout + done.stderr, done.stderr
        assert done.stdout.count("[[[") == 1         # a.png was read


@pytest.mark.parametrize("error, code", [
    ("MemoryError", 2), ("RuntimeError('DefaultCPUAllocator: cannot allocate memory')", 2),
    ("RuntimeError('CUDA out of memory.')", 2), ("RuntimeError('shapes')", 1),
    ("RuntimeError('elements refer to a single memory location')", 1),
    ("RuntimeError('CUDA error: an illegal memory access was encountered')", 1)])
def test_too_little_memory_is_one_line(error, code):
    done = run_code(f"raise {error}")
    assert done.returncode == code
    assert ("error: out of memory; choose smaller batches" in done.stderr) == (code == 2)
    assert ("Traceback" in done.stderr) == (code == 1)
