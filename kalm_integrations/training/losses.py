"""The losses of a batch of queries, from the margins of their passages. Pure functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kalm_integrations.training.config import LossConfig


def soft_labels(teacher: torch.Tensor, teacher_weight: float) -> torch.Tensor:
    """Mix each query's gold label with its teacher's distribution over its passages.

    Args:
        teacher: the teacher's margins, NaN where there is none or no passage; the gold passage comes first.
            Shape: (queries, passages).
        teacher_weight: share of the teacher, for queries that have one.

    Returns:
        Rows that sum to 1. Shape: (queries, passages).
    """
    gold = torch.zeros_like(teacher)
    gold[:, 0] = 1
    has_teacher = teacher[:, :1].isfinite()
    distribution = teacher.masked_fill(teacher.isnan(), float("-inf")).where(has_teacher, 0).softmax(1)
    return torch.where(has_teacher, (1 - teacher_weight) * gold + teacher_weight * distribution, gold)


def combined_loss(
    margins: torch.Tensor, is_pair: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor, weights: LossConfig
) -> torch.Tensor:
    """Return the weighted sum of the losses.

    Args:
        margins: logit(yes) - logit(no). Shape: (queries, passages).
        is_pair: False where a query has fewer passages than others. Shape: (queries, passages).
        labels: how relevant each passage is, between 0 and 1, 0 where there is none. Shape: (queries, passages).
        teacher: a teacher's margins, for every pair if `weights.distillation` is above 0. Shape: (queries, passages).
        weights: of the losses.

    Returns:
        A scalar.
    """
    loss = margins.new_zeros(())
    if weights.softmax:
        logs = margins.masked_fill(~is_pair, float("-inf")).log_softmax(1)
        loss = loss - weights.softmax * (labels * logs.masked_fill(~is_pair, 0)).sum(1).mean()
    if weights.nll:
        # The likelihood of yes among the two answers is sigmoid(margin).
        loss = loss + weights.nll * F.binary_cross_entropy_with_logits(margins[is_pair], labels[is_pair])
    if weights.distillation:
        target = teacher[is_pair].sigmoid()
        loss = loss + weights.distillation * F.binary_cross_entropy_with_logits(margins[is_pair], target)
    return loss
