"""Training runs that the tests start as processes of their own: on several ranks, or to be killed.

    python tests/ranks.py SCENARIO FOLDER '{"option": value}'

One process per rank; RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say which. `start` and `run` do that.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path


TESTS = Path(__file__).resolve().parent


def start(ranks: int, scenario: str, folder: Path, **options) -> list[subprocess.Popen]:
    """Starts a scenario on that many gloo ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(TESTS / "ranks.py"), scenario, str(folder), json.dumps(options)]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    if options.get("fsdp"):
        common |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_STATE_DICT_TYPE": options["fsdp"],
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        }
    processes = []
    for rank in range(ranks):
        environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    return processes


def run(ranks: int, scenario: str, folder: Path, **options) -> None:
    """Runs a scenario to its end; a rank that fails or hangs is an error with its output."""
    processes = start(ranks, scenario, folder, **options)
    try:
        for process in processes:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output[-4000:]
    finally:
        for process in processes:
            process.kill()


def load_wallvla() -> None:
    """As tests/conftest.py: this checkout, whatever is installed."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    spec = importlib.util.spec_from_file_location("conftest", TESTS / "conftest.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def mixture(kind: str, length: int = 4096):
    """Samples of both kinds: "mixed", "separate" (odd draws multimodal, even ones actions) or with text alone."""
    from test_trainer import Samples

    from wallvla.data.mixture import CoTrainingMixture

    if kind == "mixed":
        return CoTrainingMixture(Samples("action"), Samples("multimodal"), multimodal_fraction=0.25, length=length)

    class Separate:
        """Draw 2k is an action, draw 2k + 1 a question; every third question comes without its picture."""

        def __len__(self) -> int:
            return length

        def __getitem__(self, index: int) -> dict:
            sample = Samples("action" if index % 2 == 0 else "multimodal")[index]
            if index % 6 == 5:
                sample["images"] = []
            return sample

    return Separate()


def trainer(
    folder: Path, data: str = "mixed", fsdp: str | None = None, seed: int = 0, kind: str | None = None, **options
):
    """A trainer on the CPU of the quickstart's model, or of a tiny one of another kind; `fsdp` is how FSDP2 saves."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from test_trainer import STATISTICS

    from wallvla.data.collator import Collator
    from wallvla.quickstart import EMBODIMENT, QuickstartConfig, build_model, build_processor, embodiment
    from wallvla.trainers.co_training_config import CoTrainingConfig
    from wallvla.trainers.co_training_trainer import CoTrainingTrainer

    defaults = {
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "report_to": [],
        "logging_steps": 1,
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "seed": seed,
    }
    args = CoTrainingConfig(output_dir=str(folder), **defaults | options)
    if fsdp:
        assert args.world_size > 1
        # accelerate offers FSDP2 on accelerators only; torch has it on the CPU as well
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    config = QuickstartConfig(image_size=32)
    robot = embodiment(config, STATISTICS)
    if kind is None:
        processor = build_processor(config, robot)
        torch.manual_seed(0)
        model = build_model(processor)
    else:
        from tiny import tiny_parts_of

        # Ranks would draw their dropout apart
        expert = {"dropout": 0.0} if kind == "soft_prompt" else {}
        model, processor = tiny_parts_of(kind, "qwen2_5_vl", {EMBODIMENT: robot}, action_expert=expert)
    return CoTrainingTrainer(
        model=model,
        args=args,
        data_collator=Collator(processor),
        train_dataset=mixture(data),
        processing_class=processor,
    )


def stop_dead(runner, folder: Path, moment: str, at: int) -> None:
    """Makes the run stand still, in the middle of the optimizer step after `at` steps ("step") or of writing the
    checkpoint of step `at` ("checkpoint"), until it is killed; the file `reached` tells that it is there."""
    import time

    def stand_still() -> None:
        (folder / "reached").touch()
        while True:
            time.sleep(1)

    if moment == "step":
        inner_step = runner.training_step

        def training_step(*args, **kwargs):
            loss = inner_step(*args, **kwargs)
            if runner.state.global_step == at:
                stand_still()
            return loss

        runner.training_step = training_step
    else:
        inner_save = runner._save_rng_state

        def save_rng_state(output_dir: str) -> None:
            if runner.state.global_step == at:
                optimizer = Path(output_dir) / "optimizer.pt"
                optimizer.write_bytes(optimizer.read_bytes()[:1000])  # as if the disk had got no more
                stand_still()
            inner_save(output_dir)

        runner._save_rng_state = save_rng_state


def whole_weights(model) -> dict:
    """All parameters as ordinary tensors, gathered where they are sharded."""
    from torch.distributed.tensor import DTensor

    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in model.named_parameters()}


def train(folder: Path, resume: bool = False, out: str = "result", stop: list | None = None, **options) -> None:
    """Trains, goes on from the last checkpoint if asked, and writes losses and weights."""
    import torch

    from wallvla.trainers.distributed import last_checkpoint
    from wallvla.trainers.fine_tuning import resume_mixture

    runner = trainer(folder, **options)
    checkpoint = last_checkpoint(folder) if resume else None
    if resume:
        assert checkpoint is not None
        resume_mixture(runner.train_dataset, checkpoint, runner.args.draws_per_step)
    if stop:
        stop_dead(runner, folder, *stop)
    runner.train(resume_from_checkpoint=checkpoint)
    weights = whole_weights(runner.model)
    runner.save_model(str(folder / "final"))
    if runner.args.should_save:
        losses = [
            {k: v for k, v in log.items() if "loss" in k or k in ("step", "grad_norm")}
            for log in runner.state.log_history
        ]
        torch.save({"losses": losses[:-1], "weights": weights, "from": checkpoint}, folder / f"{out}.pt")


def layers(folder: Path) -> None:
    """Loss and gradients of the tiny model, sharded layer by layer with `fully_shard`."""
    import torch
    import torch.distributed as dist
    from tiny import SHARDING_CASES, loss_and_gradients, tiny_model
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    results = []
    for labels, checkpointing in SHARDING_CASES:
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        language, vision = model.vlm.model.language_model.layers, model.vlm.model.visual.blocks
        for module in [*language, *vision, *model.action_expert.layers, model]:
            fully_shard(module)
        loss, gradients = loss_and_gradients(model, labels)
        results.append((loss, {name: gradient.full_tensor() for name, gradient in gradients.items()}))
    if dist.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


def main() -> None:
    load_wallvla()
    scenario, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    {"train": train, "layers": layers}[scenario](folder, **options)


if __name__ == "__main__":
    main()
