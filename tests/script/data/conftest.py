"""What the tests of the programs that build data share."""

import pytest

from tests.words import word_tokenizer


@pytest.fixture(scope="session")
def word_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    word_tokenizer().save_pretrained(folder)
    return folder
