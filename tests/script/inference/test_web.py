"""web.py: errors at start, and requests without a browser. tests/end_to_end/test_browser.py has the page in one."""

import socket
import sys
import time

import httpx
import pytest

from tests.outcome import refused
from tests.pdf import pdf
from tests.web_server import WEB, Visitor, served


class TestWrong:
    @pytest.mark.parametrize("port", ["0", "65536"])
    def test_an_invalid_port(self, port, run_program, base_folder):
        outcome = run_program(WEB, "--model_name_or_path", base_folder, "--port", port)
        refused(outcome, "--port", port, "from 1 to 65535")

    def test_a_port_in_use(self, run_program, base_folder):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            outcome = run_program(WEB, "--model_name_or_path", base_folder, "--port", port)
        refused(outcome, "--port", f"127.0.0.1:{port}", "name another port")

    def test_without_gradio(self, run_program, base_folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "gradio", None)
        outcome = run_program(WEB, "--model_name_or_path", base_folder)
        refused(outcome, "web.py needs the package gradio", "pip install -r requirements.txt")

    @pytest.mark.parametrize("value", ["secret", "secret:", ":secret", " :secret"])
    def test_k19_an_incomplete_password(self, value, run_program, base_folder):
        outcome = run_program(WEB, "--model_name_or_path", base_folder, f"--auth={value}")
        refused(outcome, "--auth: user or password is missing; use USER:PASSWORD")
        assert "secret" not in outcome.err

    def test_local_by_default(self, run_program):
        outcome = run_program(WEB, "--help")
        assert "(default 127.0.0.1)" in outcome.out


def test_k19_requests(tmp_path):
    """Another site, somebody without the password, odd values, and a visitor who leaves, in front of one server."""
    with served(tmp_path, "--auth", "me:secret") as address, httpx.Client(base_url=address, timeout=60) as client:
        evil = client.get("/", headers={"host": "evil.com"})
        assert (evil.status_code, evil.text.split(";")[0]) == (403, "Host: 'evil.com' is no name of this server")
        files = {"files": ("a.txt", b"x")}
        assert client.post("/gradio_api/upload", files=files).status_code == 401
        assert client.post("/login", data={"username": "me", "password": "wrong"}).status_code == 400
        assert client.post("/login", data={"username": "me", "password": "secret"}).status_code == 200
        foreign = client.post("/gradio_api/upload", files=files, headers={"origin": "http://evil.com"})
        assert (foreign.status_code, foreign.text.split(" is")[0]) == (403, "Origin: 'http://evil.com'")

        visitor = Visitor(client)
        opened = visitor.call("opened", visitor.upload("a.pdf", pdf("The dog.")))
        assert "a.pdf: <b>" in opened["output"]["data"][1]
        assert visitor.ask("Who?")["output"]["data"][3].startswith("⚠ ") is False
        assert "; use a number" in visitor.ask("Who?", "abc")["output"]["data"][3]
        outside = visitor.call("opened", {"path": "/etc/hostname", "meta": {"_type": "gradio.FileData"}})
        assert "was not uploaded by a user" in outside["output"]["error"]

        # the other's answer comes long before the 2000 tokens of the one who left could have been generated
        gone, other = Visitor(client), Visitor(client)
        gone.send("ask", "Who?", None, 2000, False, 0.35, 0.9, 1.0, "", "refuse")
        assert any(message["msg"] == "process_generating" for message in gone.messages(12))
        start = time.monotonic()
        assert "tokens of context used" in other.ask("Who?")["output"]["data"][3]
        assert time.monotonic() - start < 5
