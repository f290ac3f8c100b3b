"""Every test file is in a folder that says where it runs, so that none is silently left out."""

from __future__ import annotations

import suites


def test_every_test_file_is_in_a_known_folder():
    files = [*suites.TESTS.rglob("test_*.py"), *suites.TESTS.rglob("*_test.py")]
    outside = [
        str(file.relative_to(suites.TESTS))
        for file in files
        if suites.folder_of(file) not in suites.FOLDERS
    ]
    assert outside == []


def test_every_known_folder_holds_suites():
    folders = {suites.folder_of(file) for file in suites.TESTS.rglob("test_*.py")}
    assert folders == suites.FOLDERS


def test_a_folder_is_of_one_kind():
    kinds = (
        suites.ON_EVERY_DEVICE,
        suites.ON_EVERY_BUILD,
        suites.OF_THE_SOURCES,
        suites.WITH_FRAMEWORKS,
    )
    assert sum(map(len, kinds)) == len(suites.FOLDERS)
