r"""Gates: one trained number a KV head says how much of its full attention the model needs.

Source: DuoAttention, arXiv:2410.10819, section 2.2, and its published training code.

With gates alpha [L, Hkv] in [0, 1], initially 1, the output of KV head h of layer l (of each of its
query heads, [T, D]) becomes

    alpha[l, h] * full_attention + (1 - alpha[l, h]) * streaming_attention,

and alpha alone is trained to minimise

    mean((H_full[a] - H_gated[a])^2) + reg_weight * sum(|alpha|),

where H [B, T, hidden] are the last hidden states after the final norm and a the positions at which
the tokens of the pass keys' answers are predicted.

Left open by the paper, or differing between the paper and its code, and chosen here:
- the distance is the mean over answer positions and hidden units, as in the code (the paper sums
  over positions);
- the distance is taken where answer tokens are predicted (the code takes the questions' tokens in);
- learned sinks, which the paper's models lack, take part in both attentions as they are;
- learning rate as in the code: up from a tenth over the first fifth of the steps, down to it over
  the last; AdamW without weight decay; alpha is clipped after each step (the code clips before one);
- the samples: see `samples`. Samples of one step are padded at their end, which causal attention
  does not see.

The weights stay frozen, layers keep only their inputs for the backward pass and are computed again
in it, and a step's samples depend on the seed and the step's number alone, so that a run which is
resumed goes on exactly as it would have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_duo.identify.attention import StreamingRule
from vllm_duo.identify.checkpoint import Arrays
from vllm_duo.identify.methods import Job, Progress, Scores
from vllm_duo.identify.model import HookedModel
from vllm_duo.identify.policies import GatedPolicy, LastRowsPolicy, Policy, full_policy
from vllm_duo.identify.samples import to_batch

LOWEST_LR_SHARE = 0.1
BETAS = (0.9, 0.999)


def gate_distance(
    model: HookedModel, ids: Tensor, answers: Tensor, gates: Tensor, rule: StreamingRule
) -> Tensor:
    """Mean squared distance of the last hidden states, gated from full; a scalar with gradients.

    Args:
        model: the hooked model.
        ids: [B, T] int64.
        answers: [B, T] bool: where answer tokens are predicted.
        gates: [L, Hkv] float32.
        rule: what streaming heads keep.
    """
    answers = answers.to(model.device)
    with torch.no_grad():
        wanted = model.hidden(ids, _at_answers(model, answers, full_policy))[answers].float()
    gated = _at_answers(model, answers, GatedPolicy(gates, rule))
    return (model.hidden(ids, gated)[answers].float() - wanted).square().mean()


def _at_answers(model: HookedModel, answers: Tensor, policy: Policy) -> Policy:
    """The policy, in the last layer only from the first answer on."""
    first = int(answers.any(0).int().argmax())
    return LastRowsPolicy(policy, model.info.num_layers - 1, first)


def learning_rate_share(step: int, steps: int) -> float:
    """Share of the highest learning rate at `step`, counted from 0: up, level, down."""
    ramp = max(1, steps // 5)
    return min(
        1.0,
        max((step + 1) / ramp, LOWEST_LR_SHARE),
        max((steps - step) / ramp, LOWEST_LR_SHARE),
    )


@dataclass
class GateState:
    """All that a run has learned so far; arrays of [L, Hkv] float32, and the losses by step."""

    gates: Tensor
    optimizer: torch.optim.AdamW
    distances: list[float]

    @classmethod
    def start(cls, job: Job) -> GateState:
        """Before the first step."""
        info = job.model.info
        gates = torch.zeros(info.num_layers, info.num_kv_heads, device=job.model.device)
        gates[info.chosen_layers] = 1.0  # the others slide whatever their gates say
        gates.requires_grad_()
        optimizer = torch.optim.AdamW([gates], lr=job.settings.lr, betas=BETAS, weight_decay=0.0)
        return cls(gates, optimizer, [])

    @property
    def done(self) -> int:
        """Steps done."""
        return len(self.distances)

    def to_arrays(self) -> Arrays:
        """For `save_checkpoint`."""
        moments: dict[str, Any] = self.optimizer.state.get(self.gates, {})
        return {
            "gates": self.gates.detach().cpu().numpy(),
            "distances": np.array(self.distances, dtype=np.float64),
            **{f"adam_{name}": moments[name].cpu().numpy() for name in moments},
        }

    def restore(self, arrays: Arrays) -> None:
        """Take over what `to_arrays` gave."""
        with torch.no_grad():
            self.gates.copy_(torch.from_numpy(arrays["gates"]))
        self.distances = [float(value) for value in arrays["distances"]]
        moments = {
            name.removeprefix("adam_"): torch.from_numpy(np.array(value)).to(
                "cpu" if name == "adam_step" else self.gates.device
            )
            for name, value in arrays.items()
            if name.startswith("adam_")
        }
        if moments:
            self.optimizer.state[self.gates] = moments


def train_gates(
    job: Job, saved: Arrays | None, save: Callable[[Arrays], None], progress: Progress
) -> Scores:
    """Train the gates, from `saved` on where it is given.

    Args:
        job: model and settings.
        saved: what an earlier call gave to `save`.
        save: called every `checkpoint_every` steps and after the last.
        progress: called after each step.
    """
    settings, makers, rule = job.settings, job.samples(), job.rule
    job.model.checkpoint_layers()
    state = GateState.start(job)
    if saved is not None:
        state.restore(saved)
    while (step := state.done) < settings.steps:
        numbers = range(step * settings.batch_size, (step + 1) * settings.batch_size)
        ids, answers = to_batch([makers.make("identify", number) for number in numbers])
        distance = gate_step(job, state, ids, answers, rule, step)
        state.distances.append(distance)
        if state.done % settings.checkpoint_every == 0 or state.done == settings.steps:
            save(state.to_arrays())
        kept = float(state.gates.detach().mean())
        progress(state.done, settings.steps, f"distance {distance:.4f}, mean gate {kept:.2f}")
    values = state.gates.detach().cpu().double().numpy()
    details = {"last_distance": state.distances[-1], "first_distance": state.distances[0]}
    return Scores(values, details)


def gate_step(
    job: Job, state: GateState, ids: Tensor, answers: Tensor, rule: StreamingRule, step: int
) -> float:
    """One step of the optimiser; returns the distance before it."""
    settings = job.settings
    gated = _at_answers(job.model, answers, GatedPolicy(state.gates, rule))
    with job.model.hook.using(gated):  # layers are computed again in it
        distance = gate_distance(job.model, ids, answers, state.gates, rule)
        loss = distance + settings.reg_weight * state.gates.abs().sum()
        state.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
    for group in state.optimizer.param_groups:
        group["lr"] = settings.lr * learning_rate_share(step, settings.steps)
    state.optimizer.step()
    with torch.no_grad():
        state.gates.clamp_(0.0, 1.0)
    return float(distance.detach())
