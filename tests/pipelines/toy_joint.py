"""A joint distribution small enough to list every state of it: the oracle for samplers and bounds.

Tokens are flat and in C order of (K, d, h, w); everything is computed by enumeration, nothing by the code under test.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch


class ToyJoint:
    """Tokens of a shape (K, d, h, w) with V values each, and the probability of every combination.

    Args:
        shape: of one sample's tokens.
        values: V; the mask token is V.
        dependent: False makes the tokens independent of one another.
    """

    def __init__(self, shape: tuple[int, int, int, int], values: int, dependent: bool = True, seed: int = 0) -> None:
        self.shape, self.values, self.count = shape, values, math.prod(shape)
        rng = np.random.default_rng(seed)
        self.states = np.array(list(itertools.product(range(values), repeat=self.count)))
        if dependent:
            self.p = rng.dirichlet(np.full(len(self.states), 0.3))
        else:
            marginals = rng.dirichlet(np.ones(values), size=self.count)
            self.p = np.prod([marginals[i][self.states[:, i]] for i in range(self.count)], axis=0)
        self.entropy = -float((self.p[self.p > 0] * np.log2(self.p[self.p > 0])).sum())

    def conditionals(self, known: dict[int, int]) -> np.ndarray:
        """(tokens, V): the distribution of each token given some of them."""
        fits = np.ones(len(self.states), dtype=bool)
        for token, value in known.items():
            fits &= self.states[:, token] == value
        weight = np.where(fits, self.p, 0)
        table = np.stack(
            [[weight[self.states[:, i] == v].sum() for v in range(self.values)] for i in range(self.count)]
        )
        return table / max(weight.sum(), 1e-300)

    def denoiser(self, sample: torch.Tensor) -> torch.Tensor:
        """Exact logits (B, K, V, d, h, w) for samples (B, K, d, h, w) with masked tokens."""
        rows, inverse = np.unique(sample.flatten(1).numpy(), axis=0, return_inverse=True)
        tables = []
        for row in rows:
            tables.append(self.conditionals({i: int(v) for i, v in enumerate(row) if v != self.values}))
        with np.errstate(divide="ignore"):
            logits = torch.from_numpy(np.log(np.stack(tables)))[torch.from_numpy(inverse.reshape(-1))]
        return logits.view(-1, *self.shape, self.values).movedim(-1, 2)

    def law(self, groups: list[list[int]]) -> np.ndarray:
        """Probability of every state when the tokens of a group are drawn independently given the groups before it."""
        total = np.zeros(len(self.states))
        for n, state in enumerate(self.states):
            if self.p[n] == 0 and len(groups) == self.count:
                continue
            probability, known = 1.0, {}
            for group in groups:
                table = self.conditionals(known)
                probability *= math.prod(table[i, state[i]] for i in group)
                if probability == 0:
                    break
                known |= {i: int(state[i]) for i in group}
            total[n] = probability
        return total

    def counts(self, samples: torch.Tensor) -> np.ndarray:
        """How often each state occurs among samples (B, K, d, h, w)."""
        digits = samples.flatten(1).numpy()
        index = (digits * self.values ** np.arange(self.count)[::-1]).sum(1)
        return np.bincount(index, minlength=len(self.states))


def goodness_of_fit(counts: np.ndarray, law: np.ndarray) -> float:
    """p-value of Pearson's chi-square test; cells with fewer than five expected are put together."""
    from scipy.stats import chisquare

    assert counts[law == 0].sum() == 0, "impossible states were drawn"
    expected = law * counts.sum()
    rare = expected < 5
    observed, expected = np.append(counts[~rare], counts[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    if keep.sum() == 1:
        return 1.0
    return float(chisquare(observed[keep], expected[keep] * (observed[keep].sum() / expected[keep].sum())).pvalue)
