"""Valid flags of the downstream programs, to which a test adds one invalid flag."""

from pathlib import Path


def refuses(run_program, program: str, words: list[str], parts: list[str], base: Path, folder: Path) -> None:
    """Valid flags followed by `words` give status 1 and a message with each of `parts`."""
    (folder / "texts.jsonl").write_text('{"text": "a"}\n')
    given = {"base": base, "work": folder / "work", "output_json": folder / "found.json"}
    more = {
        "passkey": {"figure": folder / "f.png"},
        "instructions": {"source": folder / "texts.jsonl"},
        "examples": {"source": folder / "texts.jsonl", "extended": base}
        | {f"{kind}_figure": folder / f"{kind}.png" for kind in ("long", "short")},
    }
    given = {f"--{name}": value for name, value in (given | more[program]).items()}
    given |= dict.fromkeys(words[:1])
    flags = [word for name, value in given.items() if value is not None for word in (name, value)]
    outcome = run_program(f"script/experiment/downstream/{program}.py", *flags, *words)
    assert outcome.status == 1, outcome.err
    assert all(part in outcome.err for part in parts), outcome.err
