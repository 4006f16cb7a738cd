"""Exceptions raised by kalm_integrations.

```text
KalmError
├── SettingsError (ValueError)          a setting or an argument breaks a stated rule
├── MissingExtraError (ImportError)     an optional dependency is not installed
├── CheckpointError                     a checkpoint cannot be used
│   ├── CheckpointNotFoundError         no such folder, or the hub cannot be reached
│   └── InvalidCheckpointError          not T5Gemma2, a tensor missing or of the wrong shape
├── EncodingError (ValueError)          a stored encoding cannot be used
│   ├── CorruptEncodingError            not the format, or damaged
│   ├── StaleEncodingError              another checkpoint, setting or text made it
│   └── EncodingTooLargeError           longer than a setting, a store or a reader allows
├── EngineError                         a sound request is not answered
│   ├── QueueFullError                  too much waits already; ask again later
│   ├── DeadlineExceededError (TimeoutError)    the answer did not come in time
│   ├── OutOfMemoryError (MemoryError)  not even one passage fits
│   ├── PassError (RuntimeError)        torch failed
│   └── ServiceError                    a service cannot be reached, or does not answer as one of ours
├── StoreError                          a payload or prefix store cannot be used
├── OutputError (OSError)               the output of bulk work cannot be written any more
├── TrainingError                       a training run cannot go on or be exported
├── PublishError                        the hub does not take a checkpoint, or cannot be reached
└── NonFiniteScoreError (ArithmeticError)   the model produced NaN or infinity
```

On the query path `EncodingError` is never raised for metadata: a bad value is a miss, counted, and the passage is encoded
again. It is raised by `EncodedPassage.from_metadata` and when an `EncodedPassage` of another model is passed to be scored.
"""

from __future__ import annotations


class KalmError(Exception):
    """Base class of every exception that this package raises on purpose."""


class SettingsError(KalmError, ValueError):
    """A setting or an argument breaks a rule that the message states."""


class MissingExtraError(KalmError, ImportError):
    """An optional dependency is missing; the message holds the pip command."""


class CheckpointError(KalmError):
    """A checkpoint cannot be used."""


class CheckpointNotFoundError(CheckpointError):
    """No such folder or hub repository, or the hub cannot be reached."""


class InvalidCheckpointError(CheckpointError):
    """The files are there, but they are not a T5Gemma2 reranker."""


class EncodingError(KalmError, ValueError):
    """A stored passage encoding cannot be used."""


class CorruptEncodingError(EncodingError):
    """The value is not a `kalm1` string, or it was damaged."""


class StaleEncodingError(EncodingError):
    """The value is valid, but another checkpoint, setting or text made it."""


class EncodingTooLargeError(EncodingError):
    """Even the coarsest ratio does not fit into `max_inline_bytes`, or into what a store or a reader takes."""

    def __init__(self, reason: str, *, index: int | None = None) -> None:
        """Say what is too large; `index` is the passage's place in the input, where there are several."""
        super().__init__(reason if index is None else f"passage {index}: {reason}")
        self.reason = reason
        self.index = index


class EngineError(KalmError):
    """A request that breaks no rule is not answered."""


class QueueFullError(EngineError):
    """More would wait for the model than `max_queued_pairs` allows; the same request may be taken later."""


class DeadlineExceededError(EngineError, TimeoutError):
    """The answer did not come within the `timeout` that was given."""


class OutOfMemoryError(EngineError, MemoryError):
    """Not even a batch of one passage fits into memory."""


class PassError(EngineError, RuntimeError):
    """Torch failed in the middle of a batch; the cause says why."""


class ServiceError(EngineError):
    """A service that reranks cannot be reached, is not ready, or sent something else than an answer."""


class StoreError(KalmError):
    """A payload or prefix store cannot be opened, read or written; on the query path it is logged and counted instead."""


class OutputError(KalmError, OSError):
    """The output of bulk work cannot be written any more; what was written is kept."""


class TrainingError(KalmError):
    """A training run cannot go on, or weights cannot be exported: they or the loss are not finite."""


class PublishError(KalmError):
    """The hub does not take a checkpoint, or cannot be reached; the message says what to do about it."""


class NonFiniteScoreError(KalmError, ArithmeticError):
    """The model produced NaN or infinite states or logits, which are never stored or turned into a score."""
