"""python scripts/experiments/train_probed.py --recipe R --tokens T --output O

Runs the training of train_sampler.py and measures attention during it. Every time the log is written, figures are
computed on a fixed batch, in float32 at any precision of the training. Two of them are means over blocks: ``gradient``
(norm of the loss's gradient with respect to the projections of queries and keys; with ternary numbers that of their
mean, the straight-through gradient) and ``entropy`` (of the rows of attention, in nats). ``bit_entropy`` is the mean over
channels of queries and keys of the entropy of their signs, in bits: 1 if a bit splits the tokens of a sample in halves, 0 if
it is the same for all. The others are ``weight`` (largest absolute token weight w_q or w_k, 1 without token weights) and
``logit`` (largest absolute score). At the end
``probe.json`` holds the first and the last of these figures. It also holds how well the network agrees, on that batch,
with a simulation in which attention multiplies signs in floating point.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from hf_binaryformer.modeling.attention import BinaryAttention, attention_modules
from hf_binaryformer.modeling.vq_transformer import BinaryVQTransformer3DModel, elbo_loss
from hf_binaryformer.pipelines.absorbing_scheduler import AbsorbingScheduler
from hf_binaryformer.training.loop import Task
from hf_binaryformer.training.options import Overrides, Resume
from hf_binaryformer.training.recipes import VQ_RECIPES, load_recipe
from hf_binaryformer.training.sampler import load_tokens, train


def sides(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, H, N, d) as attention uses them: balanced, if it does that."""
    query, key, _ = attention.project(x)
    return attention.balance(query)[0], attention.balance(key)[0]


def bit_entropy(attention: Any, x: Tensor) -> float:
    """Entropy in bits of the sign of a channel over the tokens of a sample, mean over samples, heads and channels."""
    share = torch.cat([(side >= 0).float().mean(2) for side in sides(attention, x)])
    entropy = torch.special.entr(share) + torch.special.entr(1 - share)
    return float(entropy.mean()) / math.log(2)


def scores(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """All scores (B, H, N, N) before the softmax, and all token weights, in floating point."""
    one = torch.ones((), device=x.device)
    kind = attention.config.attention_type
    if kind == "uniform":
        return x.new_zeros(x.shape[0], attention.num_heads, x.shape[1], x.shape[1]), one
    query, key = sides(attention, x)
    if kind == "softmax":
        return attention.scale_heads(attention.scale * query @ key.mT), one
    if kind == "hamming_bernoulli":
        raise typer.BadParameter("hamming_bernoulli draws its signs: it has no scores to look at")
    signs = [torch.where(t >= 0, 1.0, -1.0) for t in (query, key)]
    product = attention.scale_heads(attention.scale * signs[0] @ signs[1].mT)
    if kind in ("sign", "sign_stopgrad"):
        return product, one
    weights = attention.query_theta(query), attention.key_theta(key)
    return product * weights[0][..., None] * weights[1][..., None, :], torch.cat(weights)


def simulated(attention: Any, x: Tensor, **unused: Any) -> Tensor:
    """The output of attention, with signs multiplied as floating-point numbers and all scores held at one time."""
    score, _ = scores(attention, x)
    out = score.softmax(-1) @ attention.project(x)[2]
    return attention.proj(out.transpose(1, 2).flatten(2))


class Probe:
    """Figures of attention on a fixed batch of tokens, half of them masked.

    It is made before ``run`` prepares the network.
    """

    def __init__(self, model: BinaryVQTransformer3DModel, scheduler: AbsorbingScheduler, tokens: Tensor) -> None:
        self._trained, self._total = model, scheduler.config.num_train_timesteps
        self._twin = copy.deepcopy(model)  # a copy that is never cast to another number format
        for module in attention_modules(self._twin):
            if module.config.bit_gradient == "ternary":
                module.config.bit_gradient = "ste"
        self._truth = tokens.long()
        self._times = torch.full((len(tokens),), self._total // 2)
        generator = torch.Generator().manual_seed(0)
        self._noisy, self._masked = scheduler.add_noise(self._truth, self._times, generator)

    def __call__(self) -> dict[str, float]:
        """Figures of the current network; neither the network nor its gradients change."""
        model, inputs = self._copy().train(), []
        modules = [module for module in attention_modules(model) if isinstance(module, BinaryAttention)]
        hooks = [m.register_forward_hook(lambda m, x, _: inputs.append((m, x[0].detach()))) for m in modules]
        truth, noisy, masked, times = (
            t.to(model.device) for t in (self._truth, self._noisy, self._masked, self._times)
        )
        loss = elbo_loss(model(noisy).logits, truth, masked, times, self._total, "elbo")
        for hook in hooks:
            hook.remove()
        learning = [m for m in modules if m.query_key_dim]
        gradients = torch.autograd.grad(loss, [m.qkv.weight for m in learning]) if learning else ()
        norms = [g[: 2 * m.query_key_dim].norm().item() for m, g in zip(learning, gradients, strict=True)]
        entropies, bits, weights, logits = [], [], [], []
        with torch.no_grad():
            for module, x in inputs:
                score, weight = scores(module, x)
                log = score.log_softmax(-1)
                entropies.append(-(log.exp() * log).sum(-1).mean().item())
                bits.append(bit_entropy(module, x) if module.query_key_dim else 0.0)
                weights.append(weight.abs().max().item())
                logits.append(score.abs().max().item())
        return {
            "gradient": sum(norms) / max(len(norms), 1),
            "entropy": sum(entropies) / len(entropies),
            "bit_entropy": sum(bits) / len(bits),
            "weight": max(weights),
            "logit": max(logits),
        }

    @torch.no_grad()
    def agreement(self) -> dict[str, float]:
        """Largest difference of logits between the compiled kernel and the simulation, and the share of equal tokens."""
        model, simulation = self._copy().eval(), copy.deepcopy(self._twin).eval()
        for module in attention_modules(simulation):
            setattr(module, "forward", partial(simulated, module))  # noqa: B010 - to a type checker a method is no variable
        found, wanted = (network(self._noisy.to(model.device)).logits for network in (model, simulation))
        same = (found.argmax(2) == wanted.argmax(2)).float().mean().item()
        return {"logit_difference": (found - wanted).abs().max().item(), "same_tokens": same}

    def _copy(self) -> BinaryVQTransformer3DModel:
        """The twin with the weights of the trained network."""
        self._twin.load_state_dict(self._trained.state_dict())
        return self._twin.to(self._trained.device)


def main(
    recipe: Annotated[str, typer.Option(help="As for train_sampler.py.")],
    tokens: Annotated[Path, typer.Option(help="Folder written by encode_tokens.py.")],
    output: Annotated[Path, typer.Option(help="Where checkpoints, log and probe.json go.")],
    resume: Resume = False,
    probed: Annotated[int, typer.Option(min=1, help="Samples of the fixed batch.")] = 16,
    overrides: Overrides = None,
) -> None:
    """Train and measure."""
    settings: dict[str, Any] = load_recipe(recipe, overrides or [], VQ_RECIPES, "sampler")
    probes: list[tuple[Probe, dict[str, float]]] = []

    def watch(task: Task, scheduler: AbsorbingScheduler) -> Task:
        probe = Probe(task.model, scheduler, load_tokens(tokens, "validation", task.model)[:probed])
        probes.append((probe, probe()))
        return replace(task, measures=probe)

    if train(settings, tokens, output, resume=resume, change=watch):
        probe, before = probes[0]
        figures = {"start": before, "end": probe(), **probe.agreement()}
        (output / "probe.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
