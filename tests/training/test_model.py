"""What is trained is the runtime's own code: margins, losses and gradients; and where a new model starts."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tools.training_data import ARCHITECTURE, PASSAGES, ROWS, make_batch, trainable

from kalm_integrations import KalmReranker
from kalm_integrations.errors import SettingsError
from kalm_integrations.training.config import LoraConfig, LossConfig
from kalm_integrations.training.losses import combined_loss, soft_labels


@pytest.mark.parametrize("checkpointed", [None, 2])
@pytest.mark.parametrize("which", ["fresh", "tiny_checkpoint"])
def test_training_margins_are_those_of_the_reranker(request, which, checkpointed):
    """What the loss is computed from is what `rank` returns: over prompts with one prefix, instructions, padding, ratios."""
    folder = request.getfixturevalue(which)
    ratios = (1, 4, 32)
    model = trainable(folder, checkpointed_passages=checkpointed)
    margins = model(**make_batch(folder, ROWS, ratios))["margins"]
    for ratio, of_ratio in zip(ratios, margins, strict=True):
        reranker = KalmReranker.from_pretrained(folder, compression_ratio=ratio, storage_codec="fp32")
        for (query, instruction, candidates), row in zip(ROWS, of_ratio, strict=True):
            ranked = reranker.rank(query, [PASSAGES[i] for i in candidates], instruction=instruction)
            expected = [p.margin for p in sorted(ranked, key=lambda passage: passage.index)]
            torch.testing.assert_close(row[: len(candidates)], torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_the_loss_of_a_set_of_ratios_is_the_sum_over_them(fresh):
    model = trainable(fresh)
    ratios = (2, 8, 32)
    apart = [model(**make_batch(fresh, ROWS, (ratio,)))["loss"].item() for ratio in ratios]
    together = model(**make_batch(fresh, ROWS, ratios))["loss"].item()
    assert together == pytest.approx(sum(apart), rel=1e-5)


def test_gradient_checkpointing_changes_no_gradient(tiny_checkpoint):
    gradients = []
    for checkpointed in (None, 1, 3):
        model = trainable(tiny_checkpoint, checkpointed_passages=checkpointed)
        model(**make_batch(tiny_checkpoint, ROWS, (1, 4)))["loss"].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_mirror_turns_a_query_token_from_itself_to_the_passage(fresh):
    """In the first decoder layer a token's query meets the key of its own kind in a passage far better than its own."""
    weights = load_file(fresh / "model.safetensors")
    sign = 1 + weights["model.encoder.norm.weight"]
    query = weights["model.decoder.layers.0.self_attn.q_proj.weight"][: ARCHITECTURE.head_width]
    key = weights["model.decoder.layers.0.self_attn.k_proj.weight"]
    states = torch.randn(500, ARCHITECTURE.hidden_width, generator=torch.Generator().manual_seed(0))
    to_itself = ((states @ query.T) * (states @ key.T)).sum(1)
    to_passage = ((states @ query.T) * ((states * sign) @ key.T)).sum(1)
    assert set(sign.tolist()) == {1.0, -1.0}
    assert to_passage.mean() > 10 * to_itself.mean().abs()


# --- losses

NAN = float("nan")
MARGINS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, 0.0]])
IS_PAIR = torch.tensor([[True, True, True], [True, True, False]])
NO_TEACHER = torch.full((2, 3), NAN)


def loss_of(teacher: torch.Tensor = NO_TEACHER, teacher_weight: float = 0.0, **weights: float) -> float:
    labels = soft_labels(teacher, teacher_weight)
    return float(combined_loss(MARGINS, IS_PAIR, labels, teacher, LossConfig(**weights)))


def test_softmax_is_over_a_query_s_own_passages():
    of_first = -MARGINS[0].log_softmax(0)[0]
    of_second = -MARGINS[1, :2].log_softmax(0)[0]
    assert loss_of(softmax=1) == pytest.approx(float((of_first + of_second) / 2))
    assert loss_of(softmax=3) == pytest.approx(3 * loss_of(softmax=1))


def test_nll_is_that_of_yes_for_the_gold_passage_and_of_no_for_the_others():
    yes, no = -MARGINS[:, 0].sigmoid().log(), -(-MARGINS[:, 1:]).sigmoid().log()
    assert loss_of(nll=1) == pytest.approx(float((yes.sum() + no[0].sum() + no[1, 0]) / 5))


def test_distillation_is_least_where_the_margins_are_the_teacher_s():
    own = torch.where(IS_PAIR, MARGINS, NAN)
    entropy = torch.distributions.Bernoulli(logits=MARGINS[IS_PAIR]).entropy().mean()
    assert loss_of(own, distillation=1) == pytest.approx(float(entropy))
    assert loss_of(own + 1, distillation=1) != pytest.approx(float(entropy))


def test_a_teacher_has_its_share_of_the_labels_of_queries_that_it_knows():
    teacher = torch.tensor([[1.0, 3.0, NAN], [NAN, NAN, NAN]])
    labels = soft_labels(teacher, 0.4)
    softmax = torch.tensor([1.0, 3.0]).softmax(0)
    torch.testing.assert_close(labels[0], torch.tensor([0.6 + 0.4 * softmax[0], 0.4 * softmax[1], 0.0]))
    assert labels[1].tolist() == [1, 0, 0]


def test_lora_targets_that_are_not_there_are_named(tiny_checkpoint):
    with pytest.raises(SettingsError, match=r"lora targets must be among down_proj, .*, v_proj, but got query"):
        trainable(tiny_checkpoint, lora=LoraConfig(targets=("query",)))
