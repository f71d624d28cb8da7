"""python scripts/experiments/gradient_variance.py: the noise of the ternary gradient, by sequence length.

The inputs are random tokens x (N, d), projections W_q, W_k and a random gradient of the output. The ternary gradient
estimates the straight-through gradient, which has no random draws. ``noise`` is the root of the mean squared deviation
of many draws from their mean. ``bias`` is the distance of that mean from the straight-through gradient, minus the noise
that is left in the mean. Both are divided by the norm of the straight-through gradient. They are given for every
query's gradient ("query") and for that of W_q ("weights"), which sums over queries. ``sharpness`` multiplies the
scores. Writes ``runs.csv``, ``README.md`` and ``noise.png`` into ``model_cards/evidence/gradient_variance``.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from hf_binaryformer.kernels import hamming_attention, pack_sign_bits
from variants import SimulatedSigns

EVIDENCE = Path(__file__).parents[2] / "model_cards" / "evidence" / "gradient_variance"
HEAD_DIM, VALUE_DIM = 64, 16
RULES = {
    "blocks of 64": "the largest of each 64 entries (the package)",
    "row-maximum": "the largest of a row",
    "clipped-mean": "three times the mean of a row, clipped",
}


def gradients(
    x: Tensor, projections: Tensor, value: Tensor, cotangent: Tensor, sharpness: float, rule: str
) -> list[Tensor]:
    """Gradients of the queries (N, d) and of W_q (d, d) by a rule, or "ste"."""
    weights = [w.clone().requires_grad_() for w in projections]
    query, key = ((x @ w)[None, None] for w in weights)
    query.retain_grad()
    scale = sharpness / HEAD_DIM**0.5
    if rule in ("ste", "blocks of 64"):
        ones = value.new_ones((1, 1, len(x)))
        query_bits, key_bits = (pack_sign_bits(t) for t in (query, key))
        output = hamming_attention(
            query_bits,
            key_bits,
            ones,
            ones,
            value[None, None],
            head_dim=HEAD_DIM,
            scale=scale,
            query=query,
            key=key,
            bit_gradient="ste" if rule == "ste" else "ternary",
        )
    else:
        output = SimulatedSigns.apply(query, key, value[None, None], torch.full((1, 1, 1), scale), rule)
    output.backward(cotangent[None, None])
    return [query.grad[0, 0], weights[0].grad]


def measure(length: int, sharpness: float, rule: str, draws: int) -> dict[str, float]:
    """Noise and bias of a rule at a length; the same inputs for every rule."""
    torch.manual_seed(length)
    x, projections = torch.randn(length, HEAD_DIM), torch.randn(2, HEAD_DIM, HEAD_DIM) / HEAD_DIM**0.5
    inputs = (x, projections, torch.randn(length, VALUE_DIM), torch.randn(length, VALUE_DIM), sharpness)
    exact = gradients(*inputs, "ste")
    drawn = [gradients(*inputs, rule) for _ in range(draws)]
    figures = {}
    for name, truth, samples in zip(("query", "weights"), exact, zip(*drawn, strict=True), strict=True):
        stacked = torch.stack(samples)
        variance, deviation = stacked.var(0).sum(), (stacked.mean(0) - truth).square().sum()
        figures[f"{name} noise"] = (variance.sqrt() / truth.norm()).item()
        figures[f"{name} bias"] = ((deviation - variance / draws).clamp_min(0).sqrt() / truth.norm()).item()
    return figures


def main(
    lengths: Annotated[list[int] | None, typer.Option(help="Tokens N.")] = None,
    sharpnesses: Annotated[list[float] | None, typer.Option(help="Factors of the scores.")] = None,
    draws: Annotated[int, typer.Option(min=2)] = 32,
    evidence: Annotated[Path, typer.Option(help="Folder to write.")] = EVIDENCE,
) -> None:
    """Measure, write and draw."""
    from matplotlib.figure import Figure

    lengths, sharpnesses = lengths or [64, 128, 256, 512, 1024, 2048, 4096], sharpnesses or [1.0, 3.0]
    rows = [
        {"N": length, "sharpness": sharpness, "scale": rule, **measure(length, sharpness, rule, draws)}
        for sharpness in sharpnesses
        for rule in RULES
        for length in lengths
    ]
    evidence.mkdir(parents=True, exist_ok=True)
    with (evidence / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    lines = [
        "# Noise of the ternary gradient against the sequence length",
        "",
        f"Random tokens, d = {HEAD_DIM}, d_v = {VALUE_DIM}, {draws} draws; root mean squares over the norm of the "
        "straight-through gradient. Noise is what single draws are off their mean, bias what that mean is off the "
        "straight-through gradient, scores the factor of the attention's logits. The scale of the ternary numbers is",
        "",
        *(
            f"- *{name}*: {meaning}" + (";" if number < len(RULES) - 1 else ".")
            for number, (name, meaning) in enumerate(RULES.items())
        ),
        "",
        "| N | scores | scale | query noise | query bias | W_q noise | W_q bias |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    figures = ("query noise", "query bias", "weights noise", "weights bias")
    for row in rows:
        cells = " | ".join(f"{row[name]:.2f}" for name in figures)
        lines.append(f"| {row['N']} | {row['sharpness']:g} times | {row['scale']} | {cells} |")
    lines += ["", "```", "python scripts/experiments/gradient_variance.py", "```", ""]
    (evidence / "README.md").write_text("\n".join(lines))
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("query noise", "weights noise"), strict=True):
        for sharpness, style in zip(sharpnesses, ("-", "--", ":"), strict=False):
            for number, rule in enumerate(RULES):
                values = [r[name] for r in rows if (r["sharpness"], r["scale"]) == (sharpness, rule)]
                axes.loglog(lengths, values, style, color=f"C{number}", label=f"{rule}, {sharpness:g} times the scores")
        axes.set_xlabel("tokens N")
        axes.set_title(name.replace("weights", "W_q"))
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(evidence / "noise.png", dpi=120)
    typer.echo(f"wrote {evidence}")


if __name__ == "__main__":
    typer.run(main)
