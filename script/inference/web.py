"""Serve a web page for chatting about a long text or PDF, with streamed answers and a meter of the context used.

    cd script/inference && python web.py                              # the newest run, at http://127.0.0.1:7860
    python script/inference/web.py --model_name_or_path MODEL --port 8080
    python script/inference/web.py --host 0.0.0.0                     # for everyone who can reach this machine

There is no password: anyone who reaches the address may ask. Ctrl-C ends the server.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import exit_on_user_error
from component.error import UserError
from component.inference.engine import Engine
from component.inference.flags import generation_parser, load_from_flags
from component.inference.web import import_gradio, serve


@exit_on_user_error
def main() -> None:
    parser = generation_parser(__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default 7860)")
    flags = parser.parse_args()
    if not 1 <= flags.port <= 65535:
        raise UserError(f"--port: {flags.port}; use a number from 1 to 65535")
    import_gradio()
    serve(Engine(*load_from_flags(flags), flags), flags.host, flags.port)
    print(f"listening on http://{flags.host}:{flags.port}", file=sys.stderr, flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
