"""What `wallvla serve` does: loads checkpoints, opens recordings, serves until it is told to stop."""

import asyncio
import json
import logging
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from .policy import ServedPolicy, load_policy
from .recording import Recorder
from .safety import SafetyLimits
from .server import PolicyServer, ServerOptions


logger = logging.getLogger(__name__)


def serve_checkpoints(options: Namespace, make_writer: Callable) -> None:
    """Serves the checkpoints of `options.path` until SIGINT or SIGTERM; recordings become datasets at the end.

    Args:
        options: the options of `wallvla serve`.
        make_writer: see `Recorder`.

    Raises:
        ValueError, OSError: an option or a file that cannot be used.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("websockets.server").setLevel(logging.WARNING)
    token = None if options.token_file is None else Path(options.token_file).read_text(encoding="utf-8").strip()
    server_options = ServerOptions(
        host=options.host,
        port=options.port,
        token=token,
        certificate=options.certificate,
        private_key=options.private_key,
        max_connections=options.max_connections,
        max_batch=options.max_batch,
        warm_up_batches=None if options.warm_up_batches is None else tuple(options.warm_up_batches),
        warm_up_image=tuple(options.warm_up_image),
        batch_window_s=options.batch_window_ms / 1000,
    )
    limits = None if options.safety is None else SafetyLimits.from_file(options.safety)
    keys = None if options.client_keys is None else json.loads(Path(options.client_keys).read_text(encoding="utf-8"))
    policies: dict[str, ServedPolicy] = {}
    for item in options.path:
        name, path = name_and_path(item)
        if name in policies:
            raise ValueError(f"Found two models called {name!r}. Name them apart: NAME={path}.")
        policies[name] = load_policy(
            path,
            options.embodiment,
            options.device,
            options.dtype,
            options.trust_remote_code,
            options.num_inference_steps,
            options.seed,
            keys,
            options.instruction,
            limits,
            options.engine,
            options.fp8,
        )
    recorders = {}
    if options.record is not None:
        recorders = {
            name: Recorder(
                Path(options.record) / name,
                options.record_fps or round(policy.robot.control_frequency),
                policy.embodiment,
                make_writer,
            )
            for name, policy in policies.items()
        }
    _log_datasets(recorders)  # of a server that was killed
    try:
        asyncio.run(PolicyServer(policies, server_options, recorders).run())
    finally:
        _log_datasets(recorders)


def name_and_path(item: str) -> tuple[str, str]:
    """("wall", "runs/a") of "wall=runs/a"; without a name, the last part of the path: ("a", "runs/a")."""
    name, separator, path = item.partition("=")
    if separator:
        return name, path
    return Path(item).resolve().name if Path(item).is_dir() else item.rsplit("/", 1)[-1], item


def _log_datasets(recorders: dict[str, Recorder]) -> None:
    for recorder in recorders.values():
        for dataset in recorder.finish():
            logger.info("wrote %s", dataset)
