"""May a name that is no local path be asked of the hub?"""

import pytest

from component.error import UserError
from component.model import load_config
from component.storage.hub import check_source
from component.tokenizer import load_tokenizer


@pytest.mark.parametrize(
    "name",
    [
        "./owner/name",
        "../owner/name",
        "/owner/name",
        "~/name",
        "a/b/c",
        "owner/",
        "owner/.name",
        "-x/y",
        "a\\b",
    ],
)
def test_k21_what_looks_like_a_path_is_not_asked_of_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--flag: there is no adapter folder") as error:
        check_source(name, "--flag", "adapter folder")
    assert f"{name!r}; name one, or a hub id such as owner/name" in str(error.value)


@pytest.mark.parametrize("name", ["NousResearch/Llama-2-7b-hf", "o/n_1.5", "gpt2"])
def test_hub_ids_and_paths_that_exist(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_source(name, "--flag")
    (tmp_path / "output").mkdir()
    check_source("output", "--flag")


@pytest.mark.parametrize("load", [load_config, load_tokenizer])
def test_k21_a_mistyped_run(load, tmp_path, monkeypatch):
    """`output/RUN` has the shape of a hub id; nothing is asked."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output").mkdir()
    monkeypatch.setattr("socket.socket", None)
    with pytest.raises(
        UserError, match=r"model_name_or_path: .* no (model )?folder 'output/rnu' in the folder output"
    ):
        load("output/rnu")


def test_a_hub_id_beside_a_folder_of_its_owner(tmp_path, monkeypatch):
    """Refused as a mistyped path, unless it was downloaded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    with pytest.raises(UserError, match="hf download owner/name --local-dir owner/name"):
        check_source("owner/name", "--flag")
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "hub" / "models--owner--name" / "refs").mkdir()
    (tmp_path / "hub" / "models--owner--name" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    check_source("owner/name", "--flag")
