"""The reranker as a trainable module: the runtime's own encoder and decoder, under autograd."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint as recompute_backward

from kalm_integrations.core.checkpoint.opened import Checkpoint
from kalm_integrations.core.checkpoint.t5gemma2 import SIDE_PREFIXES, stack_weights
from kalm_integrations.core.model.decoder import answer_logits, prefill, project_passages
from kalm_integrations.core.model.encoder import encode
from kalm_integrations.core.model.layers import EmbeddingWeights, StackConfig, StackWeights
from kalm_integrations.core.model.pooling import pool_states
from kalm_integrations.errors import MissingExtraError, SettingsError
from kalm_integrations.training.config import LoraConfig, LossConfig
from kalm_integrations.training.losses import combined_loss, soft_labels

ADAPTER = "default"
"""What peft calls the one adapter of a model."""


class TrainableReranker(nn.Module):
    """A reranker whose parameters carry the checkpoint's own names, kept in float32."""

    def __init__(
        self,
        folder: Path,
        answer_ids: tuple[int, ...],
        lora: LoraConfig | None = None,
        checkpointed_passages: int | None = None,
    ) -> None:
        """Load the text part of a checkpoint.

        Args:
            folder: of the checkpoint.
            answer_ids: the tokens of yes and no.
            lora: train low-rank updates instead of all weights.
            checkpointed_passages: how many passages' activations are kept at a time; None: all.

        Raises:
            CheckpointError: the checkpoint cannot be used.
            MissingExtraError: peft is needed and not installed.
            SettingsError: no matrix has a name that `lora` targets.
        """
        super().__init__()
        self.answer_ids = list(answer_ids)
        self.losses = LossConfig(softmax=1.0)
        self.teacher_weight = 0.0
        self._checkpointed_passages = checkpointed_passages
        opened = Checkpoint.open(folder)
        self.encoder_config = opened.encoder_config
        self.decoder_config = opened.decoder_config
        self._names = opened.text_names()
        for name, tensor in opened.tensors(self._names):
            _register(self, name, tensor.float())
        # No text holds an image, so its row would get no gradient.
        end_of_image = next(name for name in self._names if name.endswith("eoi_embedding"))
        self.get_parameter(end_of_image).requires_grad_(False)
        if lora is not None:
            _add_lora(self, lora)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the tensors by their names in the checkpoint, low-rank updates added."""
        tensors: dict[str, torch.Tensor] = {}
        for name in self._names:
            path, _, leaf = name.rpartition(".")
            module = self.get_submodule(path)
            tensors[name] = _merged(module) if hasattr(module, "base_layer") else getattr(module, leaf)
        return tensors

    def forward(
        self,
        passages: torch.Tensor,
        n_tokens: torch.Tensor,
        prefix: torch.Tensor,
        queries: torch.Tensor,
        last: torch.Tensor,
        candidates: torch.Tensor,
        teacher: torch.Tensor,
        compression_ratios: tuple[int, ...],
    ) -> dict[str, torch.Tensor]:
        """Score every query against its candidates and return the loss, summed over the ratios.

        Args:
            passages: token ids, right-padded. Shape: (n_passages, length).
            n_tokens: real tokens of each passage. Shape: (n_passages,).
            prefix: what all prompts begin with. Shape: (prefix length,).
            queries: the rest of each prompt, right-padded. Shape: (n_queries, length).
            last: index of each prompt's last real token in `queries`. Shape: (n_queries,).
            candidates: positions of each query's passages, the gold one first, -1 where it has fewer than others.
                Shape: (n_queries, n_candidates).
            teacher: a teacher's margins of the candidates, NaN without one. Shape: (n_queries, n_candidates).
            compression_ratios: of this step.

        Returns:
            loss, and margins (n_ratios, n_queries, n_candidates), 0 where there is no candidate.
        """
        is_pair = candidates >= 0
        margins = self.score(passages, n_tokens, prefix, queries, last, candidates, compression_ratios)
        labels = soft_labels(teacher, self.teacher_weight)
        losses = [combined_loss(each, is_pair, labels, teacher, self.losses) for each in margins]
        return {"loss": torch.stack(losses).sum(), "margins": margins.detach()}

    def score(
        self,
        passages: torch.Tensor,
        n_tokens: torch.Tensor,
        prefix: torch.Tensor,
        queries: torch.Tensor,
        last: torch.Tensor,
        candidates: torch.Tensor,
        compression_ratios: tuple[int, ...],
    ) -> torch.Tensor:
        """Return the margins of every query's candidates, 0 where there is none: (n_ratios, n_queries, n_candidates).

        See `forward` for the arguments.
        """
        is_pair = candidates >= 0
        pair_queries, pair_columns = is_pair.nonzero(as_tuple=True)
        pair_passages = candidates[is_pair]
        tensors = self.weights()
        margins = passages.new_zeros((len(compression_ratios), *candidates.shape), dtype=torch.float32)
        step = self._checkpointed_passages or len(passages)
        for start in range(0, len(passages), step):
            here = ((pair_passages >= start) & (pair_passages < start + step)).nonzero()[:, 0]
            rows = pair_queries[here]
            arguments = (
                tensors,
                passages[start : start + step],
                n_tokens[start : start + step],
                prefix,
                queries[rows],
                last[rows],
                pair_passages[here] - start,
                compression_ratios,
            )
            if step < len(passages) and torch.is_grad_enabled():
                values = recompute_backward(self._margins, *arguments, use_reentrant=False)
            else:
                values = self._margins(*arguments)
            margins = margins.index_put(
                (torch.arange(len(values), device=rows.device)[:, None], rows, pair_columns[here]), values
            )
        return margins

    def _margins(
        self,
        tensors: Mapping[str, torch.Tensor],
        passages: torch.Tensor,
        n_tokens: torch.Tensor,
        prefix: torch.Tensor,
        queries: torch.Tensor,
        last: torch.Tensor,
        rows: torch.Tensor,
        compression_ratios: tuple[int, ...],
    ) -> torch.Tensor:
        """Return the margins of pairs, (n_ratios, n_pairs); `queries`, `last` and `rows` (of `passages`) are by pair."""
        config = self.decoder_config
        embedding = EmbeddingWeights(*(tensors[name] for name in self._names[:2]))
        encoder = _stack(tensors, "encoder", self.encoder_config)
        decoder = _stack(tensors, "decoder", config)
        head = embedding.tokens[self.answer_ids]
        lengths = n_tokens.tolist()
        is_token = torch.arange(passages.shape[1], device=passages.device) < n_tokens[:, None]
        all_states = encode(passages[is_token], lengths, embedding, encoder, self.encoder_config)
        all_states = pad_sequence(all_states.split(lengths), batch_first=True)
        margins = []
        for ratio in compression_ratios:
            states = pool_states(all_states, n_tokens, ratio)
            cache = project_passages(states, (n_tokens + ratio - 1) // ratio, decoder, config)
            if len(prefix):
                cache = prefill(cache, prefix[None], embedding, decoder, config)
            logits = answer_logits(cache.select(rows), queries, last, embedding, decoder, head, config)
            margins.append(logits[:, 0] - logits[:, 1])
        return torch.stack(margins)


def _stack(tensors: Mapping[str, torch.Tensor], side: str, config: StackConfig) -> StackWeights:
    prefix = next(p for p in SIDE_PREFIXES[side] if p + "norm.weight" in tensors)
    return stack_weights(lambda name: tensors[prefix + name], config)


def _register(root: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Register a parameter under its dotted name; matrices of layers become linear modules, which peft can extend."""
    *path, leaf = name.split(".")
    for depth, part in enumerate(path):
        if part not in dict(root.named_children()):
            is_linear = depth == len(path) - 1 and leaf == "weight" and tensor.ndim == 2 and "layers" in path
            root.add_module(part, nn.Linear(1, 1, bias=False, device="meta") if is_linear else nn.Module())
        root = root.get_submodule(part)
    if isinstance(root, nn.Linear):
        root.out_features, root.in_features = tensor.shape
    root.register_parameter(leaf, nn.Parameter(tensor))


def _add_lora(model: nn.Module, config: LoraConfig) -> None:
    """Freeze a model and put low-rank updates beside its matrices."""
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError as error:
        msg = 'LoRA needs peft; install it with: pip install "kalm-integrations[train]"'
        raise MissingExtraError(msg) from error
    peft_config = PeftConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets))
    try:
        inject_adapter_in_model(peft_config, model, adapter_name=ADAPTER)
    except ValueError as error:
        names = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
        msg = f"lora targets must be among {', '.join(names)}, but got {', '.join(config.targets)}"
        raise SettingsError(msg) from error


def _merged(layer: Any) -> torch.Tensor:
    # Not peft's own forward pass, which does not know this package's: the update is added to the matrix, as in the export.
    weight: torch.Tensor = layer.base_layer.weight + layer.get_delta_weight(ADAPTER)
    return weight
