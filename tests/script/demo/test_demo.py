"""make demo deletes what an earlier demo left, and nothing else."""

import pytest

from component.error import UserError
from component.storage.claim import work_folder
from script.demo.demo import DATA, MERGED, RESULTS, RUN, check_folders, remove_earlier


@pytest.mark.parametrize("name", [DATA, RUN, MERGED])
def test_k7_folders_of_others(name, tmp_path):
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(UserError, match=f"{name}: exists, but no demo wrote it"):
        check_folders(tmp_path)
    (tmp_path / RESULTS).mkdir()
    (tmp_path / RESULTS / "base.json").write_text("mine")
    message = "make demo: .* holds files that demo.py did not write"
    with pytest.raises(UserError, match=message), work_folder(tmp_path / RESULTS, "demo.py", {}, "make demo"):
        raise AssertionError("never begun")


def test_an_earlier_demo_is_replaced(tmp_path):
    check_folders(tmp_path)
    for _ in range(2):
        with work_folder(tmp_path / RESULTS, "demo.py", {}, "make demo"):
            remove_earlier(tmp_path)
            assert not list((tmp_path / RESULTS).glob("*.json"))
            for name in (DATA, RUN, MERGED):
                (tmp_path / name).mkdir()
            (tmp_path / RESULTS / "base.json").write_text("{}")
        check_folders(tmp_path)
