"""Serve a web page for chatting about a long text or PDF, with streamed answers and a meter of the context used.

    cd script/inference && python web.py                              # the newest run, at http://127.0.0.1:7860
    python script/inference/web.py --model_name_or_path MODEL --port 8080
    python script/inference/web.py --host 0.0.0.0 --auth USER:PASSWORD     # for everyone who knows the password

Without --auth, anyone who reaches the address may ask. Ctrl-C ends the server and deletes what was uploaded.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import exit_on_user_error, parsed_first
from component.inference.flags import chat_parser


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = chat_parser(__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default 7860)")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="what visitors must enter (default: nothing)")
    hosts = "names by which visitors reach the server, besides localhost, IP addresses, --host and this machine's name"
    parser.add_argument("--allowed_hosts", nargs="+", default=[], metavar="NAME", help=hosts)
    return parser.parse_args()


from component.error import UserError
from component.inference.engine import Engine
from component.inference.flags import check_sampling
from component.inference.load import load_from_flags
from component.inference.web import import_gradio, serve


def user_and_password(text: str | None) -> tuple[str, str] | None:
    if text is None:
        return None
    user, _, password = text.partition(":")
    if not user.strip() or not password:
        raise UserError("--auth: user or password is missing; use USER:PASSWORD")  # the value stays out of logs
    return user.strip(), password


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    if not 1 <= flags.port <= 65535:
        raise UserError(f"--port: {flags.port}; use a number from 1 to 65535")
    auth = user_and_password(flags.auth)
    check_sampling(flags)  # else every question would be refused
    import_gradio()
    engine = Engine(*load_from_flags(flags), flags)
    print(f"chat template: {engine.conversation().template}", file=sys.stderr, flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the folder below goes then too
    with tempfile.TemporaryDirectory(prefix="longqlora-web-", ignore_cleanup_errors=True) as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        serve(engine, flags.host, flags.port, auth=auth, allowed_hosts=flags.allowed_hosts)
        print(f"listening on http://{flags.host}:{flags.port}", file=sys.stderr, flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
