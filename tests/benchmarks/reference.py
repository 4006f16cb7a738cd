"""The reference with an encoder cache: its own decoder pass, given the pooled states that its encoder would have made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mteb.models.model_implementations.kalm_reranker import KaLMRerankerWrapper
from transformers.modeling_outputs import BaseModelOutput

from kalm_integrations import EncodedPassage

BATCH_SIZE = 32
"""The wrapper's default."""


def score_with_states(
    wrapper: KaLMRerankerWrapper, query: str, instruction: str, encodings: Sequence[EncodedPassage]
) -> list[float]:
    """Do what the wrapper's `_predict_batch` does after its encoder, in its batches."""
    scores: list[float] = []
    for start in range(0, len(encodings), BATCH_SIZE):
        scores += _score_batch(wrapper, query, instruction, encodings[start : start + BATCH_SIZE])
    return scores


def _score_batch(
    wrapper: KaLMRerankerWrapper, query: str, instruction: str, encodings: Sequence[EncodedPassage]
) -> list[float]:
    with torch.inference_mode():
        rows = [encoding.states for encoding in encodings]
        states = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(wrapper.device, wrapper.dtype)
        mask = torch.arange(states.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        decoder_batch = wrapper.tokenizer(
            [wrapper._decoder_text(query, instruction)] * len(rows),
            padding=True,
            pad_to_multiple_of=8,
            add_special_tokens=False,
            return_tensors="pt",
        ).to(wrapper.device)
        outputs = wrapper.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=mask.long().to(wrapper.device),
            decoder_input_ids=decoder_batch["input_ids"],
            decoder_attention_mask=decoder_batch["attention_mask"],
            return_dict=True,
        )
        last = decoder_batch["attention_mask"].sum(dim=1) - 1
        logits = outputs.logits[torch.arange(len(rows), device=wrapper.device), last]
        answers = logits[:, [wrapper.yes_token_id, wrapper.no_token_id]].float()
        return torch.softmax(answers, dim=-1)[:, 0].cpu().tolist()
