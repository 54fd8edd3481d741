"""Compare two plans on the same prompts and seeds: paroattn's way to spend blocks, and the paper's.

    python examples/compare_two_plans.py

The command line does the same for plan files: `paroattn evaluate --plan one.safetensors --plan two.safetensors`.
"""

from __future__ import annotations

from rich.console import Console

import paroattn
from paroattn.evaluation.pairs import Variant, evaluate_variants
from paroattn.evaluation.tables import evaluation_table
from paroattn.integrations.generation import load_model

PAIRS = [("a slow red two over the cat", 1), ("a fast white six over the flower", 2)]


def main() -> None:
    model = load_model("moving-digits", device="cpu", num_frames=2, num_inference_steps=2)
    arguments = [model.call_arguments("a slow green five over the temple")]
    ours = paroattn.calibrate(model.pipe, arguments, density=0.4)
    paper = paroattn.calibrate(model.pipe, arguments, density=0.4, method="paper")

    evaluation = evaluate_variants(model, [Variant("paper", paper), Variant("ours", ours)], PAIRS)
    Console(width=120).print(evaluation_table(evaluation))
    gain, error = evaluation.results[1].gain_over(evaluation.results[0])
    print(f"ours over the paper's: {gain:+.2f} dB, standard error {error:.2f}")


if __name__ == "__main__":
    main()
