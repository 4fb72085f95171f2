"""May a name that is no local path be asked of the hub?"""

import pytest

from component.error import UserError
from component.loading import resolve_model
from component.model import load_config
from component.storage.hub import check_links, check_source, fetch
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


@pytest.mark.parametrize(
    ("load", "field"),
    [
        (load_config, "model_name_or_path"),
        (load_tokenizer, "model_name_or_path"),
        (lambda name: resolve_model(None, name), "adapter_name_or_path"),
    ],
)
def test_neither_a_folder_nor_in_the_hubs_cache(load, field, tmp_path, monkeypatch):
    """`outptu/RUN` may be a hub id, as there is no folder `outptu`; without a network nobody can tell."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{field}: there is no folder 'outptu/run', nor .* model or adapter in the"):
        load("outptu/run")


def test_a_model_of_the_hubs_cache_without_the_file(tmp_path, monkeypatch):
    """What the cache has of a model, and what the hub has said it lacks, is not an unknown model."""
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    for name, folder, file in (("o/model", "snapshots", "config.json"), ("o/other", ".no_exist", "a.json")):
        home = tmp_path / f"models--{name.replace('/', '--')}"
        (home / folder / "abc").mkdir(parents=True)
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text("abc")
        (home / folder / "abc" / file).write_text("{}")
        assert fetch(name, "a.json") is None
    with pytest.raises(UserError, match="there is no folder 'o/other'"):
        fetch("o/other", "b.json")


# ---- files of a folder


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "model" / "sub" / "a.json").write_text("{}")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "name", ["../secret.json", "sub/../../secret.json", "/etc/hostname", "..\\secret.json", "", 5]
)
def test_k16_names_that_lead_out_of_the_folder(folder, name):
    with pytest.raises(UserError, match=f"{folder} names .* which leads out of it"):
        fetch(str(folder), name)


def test_k16_links_that_lead_out_of_the_folder(folder, tmp_path):
    (folder / "tokenizer.model").symlink_to(tmp_path / "secret.json")
    (folder / "out").symlink_to(tmp_path)
    for name in ("tokenizer.model", "out/secret.json"):
        with pytest.raises(UserError, match=f"{folder}/{name} is a link to {tmp_path}/secret.json, outside"):
            fetch(str(folder), name)
    with pytest.raises(UserError, match=r"tokenizer\.model is a link"):
        check_links(str(folder))


def test_k16_a_linked_folder_of_chat_templates(folder, tmp_path):
    (folder / "additional_chat_templates").symlink_to(tmp_path)
    with pytest.raises(UserError, match="additional_chat_templates is a link"):
        check_links(str(folder))


def test_links_inside_of_the_folder_and_to_it(folder, tmp_path):
    (folder / "b.json").symlink_to("sub/a.json")
    (folder / "train.jsonl").symlink_to(tmp_path / "secret.json")  # no file of a model
    (tmp_path / "link").symlink_to(folder)
    check_links(str(tmp_path / "link"))
    assert fetch(str(tmp_path / "link"), "b.json") == tmp_path / "link" / "b.json"
    assert fetch(str(folder), "sub/a.json") == folder / "sub" / "a.json"
    assert fetch(str(folder), "none.json") is None
    assert fetch(str(folder), "sub") is None


def test_k16_links_of_the_hubs_cache(tmp_path):
    """A snapshot's files are links into `blobs` beside it, and work; any other link does not."""
    snapshot, blobs = tmp_path / "models--o--n" / "snapshots" / "abc", tmp_path / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_text("{}")
    (tmp_path / "secret.json").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/123")
    check_links(str(snapshot))
    assert fetch(str(snapshot), "config.json") == snapshot / "config.json"
    (snapshot / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(UserError, match=r"tokenizer\.json is a link"):
        check_links(str(snapshot))


def test_k12_a_file_is_no_model(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"^--base_model: .*model.gguf is a file; name the model folder, or a hub id"):
        check_source(str(tmp_path / "model.gguf"), "--base_model")
