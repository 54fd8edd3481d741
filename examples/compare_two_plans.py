"""Compare two plans on the same prompts and seeds: paroattn's and the paper's.

    python examples/compare_two_plans.py

The command line does the same for plan files: `paroattn evaluate --plan one.safetensors --plan two.safetensors`.
"""

from __future__ import annotations

from paroattn_lab.quality.pairs import Variant, evaluate_variants
from paroattn_lab.report.tables import evaluation_table
from rich.console import Console

import paroattn
from paroattn.cli.models import load_model

PAIRS = [("a slow red two over the cat", 1), ("a fast white six over the flower", 2)]


def main() -> None:
    model = load_model("moving-digits", device="cpu", height=64, width=64, num_frames=4, num_inference_steps=2)
    arguments = [model.call_arguments("a slow green five over the temple")]
    plans = {
        "paper": paroattn.calibrate_paper(model.pipe, arguments, density=0.5),
        "paroattn": paroattn.calibrate(model.pipe, arguments, density=0.5),
    }
    evaluation = evaluate_variants(model, [Variant.of(plan, name, 0.5) for name, plan in plans.items()], PAIRS)
    Console(width=120).print(evaluation_table(evaluation))
    gain, error = evaluation.results[1].gain_over(evaluation.results[0])
    print(f"paroattn over the paper's: {gain:+.2f} dB, standard error {error:.2f}")


if __name__ == "__main__":
    main()
