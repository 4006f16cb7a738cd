"""The output folder of a run: whose it is, what an interrupted run left in it, and what is deleted when it is done."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kalm_integrations.core.checkpoint.folders import check_target
from kalm_integrations.core.checkpoint.locate import resolve
from kalm_integrations.errors import SettingsError
from kalm_integrations.files import written_beside
from kalm_integrations.training.config import TrainConfig

logger = logging.getLogger(__name__)

RECORD = "config.json"
"""The settings of the run that an output folder belongs to; everything else in the folder is written after it."""

MADE = re.compile(r"start|teacher|phase\d+|model")
"""What a run makes beside its record."""

FINISHED = "model.safetensors"
"""The weights after a phase, in its folder."""

BEST = "best.safetensors"
"""The weights of a phase's best evaluation, in its folder."""

NOT_COMPARED = {
    "output",
    "save_steps",
    "logging_steps",
    "report_to",
    "keep_intermediate",
    "checkpointed_passages",
    *(OF_EXPORT := {"export_dtype", "card"}),
}
"""Settings that do not change what is trained: a run may change them when it goes on."""


@dataclass
class RunFolder:
    """The output folder of a run."""

    config: TrainConfig
    n_processes: int
    _record: dict[str, Any] = field(default_factory=dict)
    """As it lies in the folder; empty if there is none."""

    @property
    def start(self) -> Path:
        """The checkpoint that the run starts from: a copy, or a new one."""
        return self.config.output / "start"

    @property
    def teacher(self) -> Path:
        """The embeddings of a teacher."""
        return self.config.output / "teacher"

    @property
    def model(self) -> Path:
        """The checkpoint that the run makes."""
        return self.config.output / "model"

    def phase(self, index: int) -> Path:
        """The saved steps, the weights and the log of a phase."""
        return self.config.output / f"phase{index}"

    def is_finished(self) -> bool:
        """Return whether the folder holds this run, and it is finished: then nothing is left to do.

        Raises:
            SettingsError: it holds a finished run of other settings.
        """
        self._record = self._read()
        if not (self._record.get("finished") and (self.model / "model.safetensors").is_file()):
            return False
        self._refuse_changes()
        ignored = [name for name in sorted(OF_EXPORT) if self._record.get(name) != self._settings().get(name)]
        without = f"; {' and '.join(ignored)} changed since, without effect" if ignored else ""
        logger.warning(
            "%s is finished, so nothing is trained and its data is not read again%s; another output begins a new run",
            self.config.output,
            without,
        )
        return True

    def check(self) -> None:
        """Check that the folder has room for a new run, or holds one that goes on; before any work.

        A run that has saved no step binds nobody: other settings take its place.

        Raises:
            SettingsError: it holds a run of other settings, or files in a new run's way, or is part of the checkpoint to start
                from.
        """
        output = self.config.output
        if not self._record:
            names = [p.name for p in output.iterdir() if MADE.fullmatch(p.name)] if output.exists() else []
            if names:
                msg = (
                    f"a new run needs an output folder without {', '.join(sorted(names))}, but {output} has them and no "
                    f"{RECORD} that tells of a run; choose another output, or move them away"
                )
                raise SettingsError(msg)
        if self._has_progress():
            self._refuse_changes()
        else:
            check_target(self.start, [] if self.config.model is None else [resolve(self.config.model)])
        check_target(self.model, [self.start])

    def begin(self, hashes: Mapping[str, str]) -> None:
        """Leave the record of a run, or check that one goes on with its data.

        What an earlier start has made without saving a step is removed where settings or data have changed.

        Args:
            hashes: of all data that the result depends on, by name; see `hash_data`.

        Raises:
            SettingsError: the data has changed since the run began.
        """
        goes_on = self._has_progress()
        known = self._record.get("data", {})
        other = sorted(name for name in hashes.keys() | known.keys() if hashes.get(name) != known.get(name))
        if goes_on and other:
            msg = (
                f"a run goes on with the data it began with, but {', '.join(other)} changed since {self.config.output} was "
                "begun; choose another output, or delete that run"
            )
            raise SettingsError(msg)
        if not goes_on:
            if other or self._changed():
                self._discard()
            self._write({"data": dict(hashes), "finished": False})

    def finish(self) -> None:
        """Say that the run is finished, and delete what only an unfinished one needs."""
        self._write({"data": self._record["data"], "finished": True})
        if not self.config.keep_intermediate:
            self._discard()

    def _discard(self) -> None:
        """Delete what the run has made beside its record, its log and its checkpoint."""
        if self.start.is_dir():
            shutil.rmtree(check_target(self.start))
        for path in self.teacher.glob("*.safetensors"):
            path.unlink()
        if self.teacher.is_dir() and not any(self.teacher.iterdir()):
            self.teacher.rmdir()
        for phase in self._phases():
            for name in (FINISHED, BEST):
                (phase / name).unlink(missing_ok=True)
            for path in saved_steps(phase):
                shutil.rmtree(path)

    def _read(self) -> dict[str, Any]:
        """Return the record, or nothing if there is none."""
        path = self.config.output / RECORD
        if not path.is_file():
            return {}
        try:
            record = dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError):
            record = {}
        if "phases" not in record:
            msg = f"{path} must be the record of a run, but is something else; choose another output"
            raise SettingsError(msg)
        return record

    def _refuse_changes(self) -> None:
        changed = self._changed()
        if changed:
            msg = (
                f"a run goes on with the settings it began with, but {self.config.output} holds one with other "
                f"{', '.join(changed)}; choose another output, or delete that run"
            )
            raise SettingsError(msg)

    def _has_progress(self) -> bool:
        """Return whether there is something to go on from."""
        return any((phase / FINISHED).is_file() or newest_complete(phase, warn=False) for phase in self._phases())

    def _phases(self) -> list[Path]:
        return [path for path in self.config.output.glob("phase*") if MADE.fullmatch(path.name)]

    def _changed(self) -> list[str]:
        """Return which settings differ from the recorded ones."""
        ours, theirs = _compared(self._settings()), _compared(self._record)
        return sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))

    def _settings(self) -> dict[str, Any]:
        return {**self.config.model_dump(mode="json", exclude={"output"}), "n_processes": self.n_processes}

    def _write(self, facts: Mapping[str, Any]) -> None:
        self.config.output.mkdir(parents=True, exist_ok=True)
        self._record = {**self._settings(), **facts}
        with written_beside(self.config.output / RECORD) as part:
            part.write_text(json.dumps(self._record, indent=2) + "\n", encoding="utf-8")


def _compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes a run another one; how a step's clusters are split only saves memory."""
    left_out = {*NOT_COMPARED, "n_processes", "data", "finished"}
    compared = {key: value for key, value in settings.items() if key not in left_out}
    phases = []
    for phase in compared.get("phases", ()):
        rest = dict(phase)
        split = [rest.pop(name, 1) for name in ("clusters_per_step", "accumulated_steps")]
        phases.append({**rest, "clusters": split[0] * split[1] * settings.get("n_processes", 1)})
    return {**compared, "phases": phases}


def hash_data(*parts: Iterable[object]) -> str:
    """Return a SHA-256 of everything that a run sees of its data: passages, queries, judgements."""
    digest = hashlib.sha256()
    for part in parts:
        for fact in part:
            digest.update(repr(fact).encode())
    return digest.hexdigest()


def saved_steps(folder: Path) -> list[Path]:
    """Return the folders of a phase's saved steps, the newest last; what is named otherwise is not the run's."""
    numbers = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")}
    found = {path: int(number[1]) for path, number in numbers.items() if number and path.is_dir() and not path.is_symlink()}
    return sorted(found, key=found.__getitem__)


def newest_complete(folder: Path, *, warn: bool = True) -> Path | None:
    """Return the newest saved step whose saving was not cut off; the Trainer writes its own state last."""
    for path in reversed(saved_steps(folder)):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            if warn:
                logger.warning("%s is incomplete and left out", path)
            continue
        return path
    return None
