"""Whether the hub answers, and what it has of a repository: asked with little patience, and without fetching."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from fnmatch import fnmatchcase

from kalm_integrations.core.checkpoint.locate import FILES, Repository

SECONDS = 5.0
"""Until a question is given up; also where a name server or a proxy keeps silent."""


@dataclass(frozen=True)
class Answer:
    """What the hub says."""

    endpoint: str
    problem: str = ""
    """Why it does not answer, or what it refuses; nothing if all is well."""
    is_reached: bool = True
    n_bytes: int = 0
    """Of the files that a fetch would bring."""


def ask(repository: Repository | None) -> Answer:
    """Ask the hub what it has of a repository, or whether it is there at all.

    Args:
        repository: None asks nothing about any.
    """
    from huggingface_hub import HfApi, constants, get_session
    from huggingface_hub.errors import HfHubHTTPError

    def reach() -> Answer:
        try:
            if repository is None:
                get_session().head(constants.ENDPOINT, timeout=SECONDS)
                return Answer(constants.ENDPOINT)
            hub_id, revision = repository
            info = HfApi().model_info(hub_id, revision=revision, timeout=SECONDS, files_metadata=True)
        except HfHubHTTPError as error:
            return Answer(constants.ENDPOINT, f"{type(error).__name__}: {error}".split("\n", 1)[0])
        except Exception as error:  # the client's own classes differ between its versions
            return Answer(constants.ENDPOINT, f"{type(error).__name__}: {error}".split("\n", 1)[0], is_reached=False)
        files = [file for file in info.siblings or [] if any(fnmatchcase(file.rfilename, pattern) for pattern in FILES)]
        return Answer(constants.ENDPOINT, n_bytes=sum(file.size or 0 for file in files))

    answers: list[Answer] = []
    # The look-up of a name has no time-out of its own; a thread that waits for it ends with the process.
    thread = threading.Thread(target=lambda: answers.append(reach()), daemon=True)
    thread.start()
    thread.join(SECONDS)
    late = Answer(constants.ENDPOINT, f"no answer within {SECONDS:g} seconds", is_reached=False)
    return answers[0] if answers else late
