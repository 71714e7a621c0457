"""One worker process: `python -P evaluation/worker.py spec.json`, started by `workers.WorkerPool`.

Run by path, never imported: this file decides what the process may import before anything else happens.

    spec["job"]                "record" (demonstrations and scenes), "evaluate" (closed loop) or "rollout" (the
                               simulators of a policy in another process)
    spec["trust_remote_code"]  true: `import wallvla` fails here, policies come from their Hub folder alone, as they do
                               for a user; false (default): the installed classes are registered with transformers
"""

import importlib
import importlib.util
import json
import os
import pickle
import signal
import sys
from pathlib import Path
from types import ModuleType


FOLDER = Path(__file__).resolve().parent


def bind_package(name: str, folder: Path) -> ModuleType:
    """Imports the package in `folder` as `name`, whatever is installed or on the path."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def make_worker(spec: dict):
    """The object whose `run(job)` answers the jobs."""
    bind_package("wallvla_evaluation", FOLDER)
    if spec["job"] == "record":
        return importlib.import_module("wallvla_evaluation.demonstrations").Recorder(**spec["recorder"])
    if spec["job"] == "rollout":
        return importlib.import_module("wallvla_evaluation.rollouts").RolloutWorker(spec)
    if spec["job"] != "evaluate":
        raise ValueError(f"spec['job'] must be 'record', 'evaluate' or 'rollout', got {spec['job']!r}.")
    if spec.get("trust_remote_code", False):
        sys.modules["wallvla"] = None
    elif any(policy["kind"] == "hub" for policy in spec["policies"].values()):
        bind_package("wallvla", FOLDER.parent).register_auto_classes()
    return importlib.import_module("wallvla_evaluation.closed_loop").EpisodeRunner(spec)


def main() -> None:
    """Answers one job per line of stdin with one pickle on the original stdout, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches the whole group; the parent stops us
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not end up between the replies
    with open(sys.argv[1]) as spec_file:
        spec = json.load(spec_file)
    worker = make_worker(spec)
    try:
        for line in sys.stdin:
            pickle.dump(worker.run(json.loads(line)), replies, protocol=pickle.HIGHEST_PROTOCOL)
            replies.flush()
    finally:
        worker.close()  # else OpenGL complains at exit, below the error that matters


if __name__ == "__main__":
    main()
