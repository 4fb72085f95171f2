"""Plot results of script/evaluate/evaluate.py: perplexity by window length and by position in the window.

    python script/evaluate/plot_perplexity.py comparison.json --output perplexity.png
    python script/evaluate/plot_perplexity.py base.json ours.json --names base LongQLoRA --output perplexity.png

Takes any number of result files, each of one model or several (--compare). The right panel shows the longest length
that all models share; without results by position (--position_buckets 0) there is no right panel.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import exit_on_user_error, new_parser, parsed_first


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files that evaluate.py wrote")
    parser.add_argument("--names", nargs="+", help="new names of the models, in the order of the files")
    parser.add_argument(
        "--output", type=Path, default=Path("perplexity.png"), help="PNG file (default perplexity.png)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser.parse_args()


import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from component.error import UserError
from component.evaluate.figure import draw_lengths, draw_positions, finish, longest_shared
from component.storage.claim import claimed
from component.storage.result import save_figure

# the palette of Okabe and Ito, which is safe for color-blind readers
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vPX"


def read_models(files: list[Path], names: list[str] | None) -> list[dict[str, Any]]:
    """The models of all result files, each with its name.

    Raises:
        UserError: a file that is not a result, too few or too many names, or results of different protocols.
    """
    models: list[dict[str, Any]] = []
    for file in files:
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            found = result.get("models", [result])
            models += [{"name": model.get("name") or file.stem, **_checked(model)} for model in found]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{file}: not a result of evaluate.py ({reason}); use its --output_json") from error
    if names and len(names) != len(models):
        raise UserError(f"--names: {len(names)} for {len(models)} models; name each")
    for model, name in zip(models, names or [], strict=False):
        model["name"] = name
    protocols = sorted({model["protocol"] for model in models})
    if len(protocols) > 1:
        raise UserError(f"results of the protocols {', '.join(protocols)} cannot be compared; measure with one")
    return models


def _checked(model: dict[str, Any]) -> dict[str, Any]:
    rows = sorted(model["results"], key=lambda row: row["seq_len"])
    for row in rows:
        row["perplexity"], row["windows"]
    return {"protocol": model["protocol"], "data_path": model["data_path"], "rows": rows}


def draw(models: list[dict[str, Any]], file: Path) -> None:
    length = longest_shared(models)
    panels = 2 if length else 1
    figure, axes = plt.subplots(
        1, panels, figsize=(5.6 * panels, 4.5), layout="constrained", squeeze=False, sharey=True
    )
    for place, model in enumerate(models):
        style = {"color": COLORS[place % len(COLORS)], "marker": MARKERS[place % len(MARKERS)], "markersize": 5}
        draw_lengths(axes[0, 0], model, style)
        if length:
            draw_positions(axes[0, 1], model, length, style)
    for panel in axes[0]:
        finish(panel)
    lengths = sorted({row["seq_len"] for model in models for row in model["rows"]})
    axes[0, 0].set_xscale("log", base=2)
    axes[0, 0].set_xticks(lengths, [str(length) for length in lengths])
    axes[0, 0].minorticks_off()
    axes[0, 0].set(title="by window length", xlabel="tokens per window", ylabel="perplexity")
    if length:
        axes[0, 1].set(title=f"by position in windows of {length} tokens", xlabel="position in the window")
        axes[0, 1].set_xlim(0, length)
        axes[0, 1].set_xticks([length * quarter // 4 for quarter in range(5)])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=min(len(models), 4), frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # names may contain dollar signs
    data = ", ".join(sorted({Path(model["data_path"]).name for model in models}))
    figure.suptitle(f"Perplexity on {data}, protocol {models[0]['protocol']}", fontsize=11, parse_math=False)
    save_figure(figure, file)
    plt.close(figure)


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    with claimed({"--output": [flags.output]}, {"results": flags.results}, overwrite=flags.overwrite):
        models = read_models(flags.results, flags.names)
        draw(models, flags.output)
    print(f"perplexity of {len(models)} models -> {flags.output}")


if __name__ == "__main__":
    main()
