"""What the suites compile: anew exactly when something that it depends on has changed."""

from __future__ import annotations

import subprocess

import compiled
import pytest

OPTIONS = ["-std=c++17", "-O0"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "STORE", tmp_path / "store")
    return sources(tmp_path / "sources")


def sources(folder, value=1):
    folder.mkdir()
    (folder / "value.h").write_text(f"inline int value() {{ return {value}; }}\n")
    (folder / "main.cpp").write_text('#include "value.h"\nint main() { return value(); }\n')
    return folder


def status(folder, options=OPTIONS):
    """The object file of main.cpp, and what its program exits with."""
    found = compiled.object_file(folder / "main.cpp", options, [folder])
    program = compiled.linked(folder.with_name("program"), [found], [])
    return found, subprocess.run([program], check=False).returncode


def test_unchanged_is_compiled_once(folder, monkeypatch):
    first = status(folder)
    assert first[1] == 1
    monkeypatch.setattr(compiled, "_compile", lambda *_: pytest.fail("compiled again"))
    assert status(folder) == first


def test_the_same_files_in_another_folder(folder, tmp_path, monkeypatch):
    first = status(folder)
    monkeypatch.setattr(compiled, "_compile", lambda *_: pytest.fail("compiled again"))
    assert status(sources(tmp_path / "copy")) == first


def test_changed_header(folder):
    first, _ = status(folder)
    (folder / "value.h").write_text("inline int value() { return 2; }\n")
    second, code = status(folder)
    assert second != first and code == 2
    (folder / "value.h").write_text("inline int value() { return 1; }\n")
    assert status(folder) == (first, 1)


def test_header_that_includes_another_from_now_on(folder):
    status(folder)
    (folder / "more.h").write_text("constexpr int kValue = 3;\n")
    (folder / "value.h").write_text('#include "more.h"\ninline int value() { return kValue; }\n')
    assert status(folder)[1] == 3
    (folder / "more.h").write_text("constexpr int kValue = 4;\n")
    assert status(folder)[1] == 4


def test_new_file_that_hides_another(folder, tmp_path):
    first = tmp_path / "first"
    first.mkdir()
    (folder / "main.cpp").write_text("#include <value.h>\nint main() { return value(); }\n")
    folders = [first, folder]
    before = compiled.object_file(folder / "main.cpp", OPTIONS, folders)
    (first / "value.h").write_text("inline int value() { return 5; }\n")
    assert compiled.object_file(folder / "main.cpp", OPTIONS, folders) != before


def test_other_options(folder):
    first, _ = status(folder)
    assert status(folder, ["-std=c++20", "-O0"])[0] != first


def test_lost_object_file(folder):
    first, code = status(folder)
    first.unlink()
    assert status(folder) == (first, code)


def test_error_is_raised_each_time_and_nothing_kept(folder):
    (folder / "value.h").write_text("int value(\n")
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            status(folder)
    assert not list(compiled.STORE.glob("*.o"))
