"""PPO on a flow policy, chunk by chunk, in simulators (Qwen-VLA, section 4.2)."""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..modeling_wallvla import PrefixContext, WallVLAForConditionalGeneration
from .distributed import discard_unfinished, last_checkpoint, unfinished_marker
from .flow_policy import Draws, FlowActorCritic, Transitions
from .flow_ppo_config import FlowPPOConfig
from .parameter_groups import freeze, split_by_part
from .ppo import (
    allocate_episodes,
    explained_variance,
    generalized_advantages,
    kl_estimate,
    policy_loss,
    value_loss,
)


# Scenes of rollouts: above those of the quickstart's demonstrations, below those of evaluations
SCENE_SEEDS = (200_000, 1_000_000)
# What a random number is for: first in the key, because a `SeedSequence` ignores zeros at the end
_SCENE, _CHUNK, _MINIBATCHES, _EPOCH = range(1, 5)
OUTCOME_DECAY = 0.5  # of a task's counted outcomes, at each iteration
TRAINER_STATE, OPTIMIZER, VALUE_HEAD = "trainer_state.json", "optimizer.pt", "value_head.safetensors"

logger = logging.getLogger(__name__)


class Rollouts(Protocol):
    """Simulators, as `evaluation.rollouts.RolloutPool` has them."""

    tasks: Sequence[str]
    lost: int

    def play(self, episodes: Sequence[dict], act: Callable[[list[dict]], Sequence[np.ndarray]]) -> Iterator[dict]:
        """Plays episodes; see `RolloutPool.play`."""


@dataclass
class Chunk:
    """One action chunk of an episode: what the policy saw and drew, and what came of it.

    before, after (K, H, D), index (K,): its stochastic steps. step_log_prob (H,): log density at the rollout.
    executed: steps. reward: sum over them. The rest is known at the update.
    """

    sample: dict
    before: Tensor
    after: Tensor
    index: Tensor
    step_log_prob: Tensor
    executed: int = 0
    reward: float = 0.0
    value: float = 0.0
    advantage: float = 0.0


@dataclass
class Minibatch:
    """Chunks as the model gets them, and what the policy of the rollout thought of them in this very batch."""

    chunks: Sequence[Chunk]
    inputs: dict[str, Tensor]
    transitions: Transitions
    scored: Tensor
    context: PrefixContext | None
    log_prob: Tensor
    values: Tensor


class FlowPPOTrainer:
    r"""
    Improves a policy by its own episodes: PPO with GAE, one decision for each action chunk.

    An iteration plays episodes with the flow-SDE policy ([`FlowActorCritic`]), then makes `epochs` passes over their
    chunks. Minibatches are drawn once in an iteration; before the first step the policy of the rollout scores its
    chunks again in these very batches, with the same function and the same kernels. So importance ratios are exactly 1
    before the first step, in any precision, and what rounding differs between rollout and update is logged
    (`rollout_gap`) instead of entering the ratio.

    Everything random follows from (seed, iteration, episode, chunk), so a run that was stopped goes on as if it had
    not been. A checkpoint is a complete repository with the state of the trainer beside it, whole or absent.

    One process, one device. Not `transformers.Trainer`, whose data set is fixed, and not TRL, whose policies are token
    by token.

    Args:
        model: the policy, weights in float32.
        processor: of the model.
        args: options.
        rollouts: simulators, `wallvla.evaluation.rollouts.RolloutPool`.
        embodiment: key of `processor.embodiments`; may be left out if there is only one.
    """

    def __init__(
        self,
        model: WallVLAForConditionalGeneration,
        processor,
        args: FlowPPOConfig,
        rollouts: Rollouts,
        embodiment: str | None = None,
    ):
        self.args, self.processor, self.rollouts = args, processor, rollouts
        self.robot = processor.get_embodiment(embodiment)
        self.embodiment = next(name for name, robot in processor.embodiments.items() if robot is self.robot)
        if args.execute_steps > self.robot.action_horizon:
            raise ValueError(
                f"execute_steps is {args.execute_steps}, but a chunk of {self.embodiment} has "
                f"{self.robot.action_horizon} steps."
            )
        processor.check_model(model.config)
        freeze(model, args.freeze)
        in_prefix = [n for n, p in model.named_parameters() if p.requires_grad and not n.startswith("action_expert.")]
        if args.cache_context and in_prefix:
            raise ValueError(
                f"cache_context keeps encoded prefixes through an update, but {len(in_prefix)} parameters before the "
                f"action expert are trained, such as {in_prefix[0]}: freeze vision and vlm, or leave it out."
            )
        self.policy = FlowActorCritic(model.to(args.device), args)
        # The policy that is saved is the one that was trained
        model.config.num_inference_steps = self.policy.num_steps
        actor = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if any(parameter.dtype != torch.float32 for parameter in actor):
            logger.warning("Weights below float32 lose updates as small as these: load float32 and set bf16.")
        matrices = {"params": [p for p in actor if p.ndim > 1], "weight_decay": args.weight_decay}
        self.optimizer = torch.optim.AdamW(
            [matrices, {"params": [p for p in actor if p.ndim <= 1]}],
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=0.0,
        )
        split_by_part(self.optimizer, model, {})  # tables of domains do not decay
        critic = {"params": list(self.policy.value_head.parameters()), "lr": args.value_learning_rate}
        self.optimizer.add_param_group(critic)
        self.peak_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.iteration = 0
        self.outcomes = dict.fromkeys(rollouts.tasks, (0.0, 0.0))  # decayed successes and episodes
        self._chunks: dict[int, list[Chunk]] = {}  # number of an episode -> its chunks so far

    def _seed(self, purpose: int, *key: int) -> int:
        return int(np.random.SeedSequence([self.args.seed, purpose, *key]).generate_state(1)[0])

    # --- rollout

    def plan(self, iteration: int) -> list[dict]:
        """The episodes of an iteration: `number`, `task` and `seed` (scene) of each, tasks in turns."""
        counts = allocate_episodes(self.args.episodes, self.outcomes)
        tasks = [task for turn in range(max(counts.values())) for task in counts if counts[task] > turn]
        low, high = SCENE_SEEDS
        return [
            {"number": number, "task": task, "seed": low + self._seed(_SCENE, iteration, number) % (high - low)}
            for number, task in enumerate(tasks)
        ]

    def act(self, iteration: int, requests: list[dict]) -> list[np.ndarray]:
        """The actions to execute for each request of `Rollouts.play`; their chunks are kept for the update."""
        config, args = self.policy.model.config, self.args
        cameras = {key.rsplit(".", 1)[-1]: key for key in self.robot.cameras}
        samples = []
        for request in requests:
            seen = request["observation"]
            images = {key: seen["images"][camera] for camera, key in cameras.items()}
            sample = {"images": images, "instruction": request["instruction"], "state": seen["state"]}
            samples.append(sample | {"embodiment": self.embodiment})
        draws = [
            Draws.of_key(
                (config.action_horizon, config.action_dim),
                self.policy.num_steps,
                args.stochastic_steps,
                self._seed(_CHUNK, iteration, request["number"], request["chunk"]),
            )
            for request in requests
        ]
        inputs = self.processor.encode(samples).to(args.device)
        actions, transitions, log_prob = self.policy.sample(inputs, Draws.stack(draws, args.device))
        states = np.stack([sample["state"] for sample in samples])
        decoded = self.processor.decode_actions(actions, state=states, embodiment=self.embodiment)
        for row, request in enumerate(requests):
            chunk = Chunk(
                samples[row],
                transitions.before[row].cpu(),
                transitions.after[row].cpu(),
                transitions.index[row].cpu(),
                log_prob[row].cpu(),
            )
            if request["chunk"] == 0:  # also when its worker was lost and it begins again
                self._chunks[request["number"]] = []
            self._chunks[request["number"]].append(chunk)
        return list(decoded[:, : args.execute_steps])

    def collect(self, iteration: int) -> tuple[list[dict], list[list[Chunk]]]:
        """Plays the episodes of an iteration. Returns them in the order of their numbers, and the chunks of each."""
        plan = self.plan(iteration)
        self._chunks.clear()
        played: dict[int, dict] = {}
        episodes = self.rollouts.play(plan, partial(self.act, iteration))
        for episode in tqdm(
            episodes, total=len(plan), desc="rollout", unit="episode", leave=False, disable=self.args.disable_tqdm
        ):
            assert episode["number"] not in played, f"episode {episode['number']} came twice"
            played[episode["number"]] = episode
        finished = [played[number] for number in sorted(played) if "dropped" not in played[number]]
        for episode in finished:
            results = zip(self._chunks[episode["number"]], episode["rewards"], episode["executed"], strict=True)
            for chunk, reward, executed in results:
                chunk.reward, chunk.executed = reward, executed
        return finished, [self._chunks[episode["number"]] for episode in finished]

    # --- update

    def score(self, chunks: Sequence[Chunk]) -> Minibatch:
        """Chunks as a minibatch, with the log-probabilities and values of the policy as it is."""
        args = self.args
        inputs = dict(self.processor.encode([chunk.sample for chunk in chunks]).to(args.device))
        transitions = Transitions(
            *(
                torch.stack(column).to(args.device)
                for column in zip(*[(chunk.before, chunk.after, chunk.index) for chunk in chunks], strict=True)
            )
        )
        scored = inputs["action_mask"]
        if not args.score_whole_chunk:
            executed = torch.tensor([chunk.executed for chunk in chunks], device=args.device)
            steps = torch.arange(scored.shape[1], device=args.device)
            scored = scored & (steps < executed[:, None])[..., None]
        context = self.policy.encode(inputs) if args.cache_context else None
        # Not under no_grad, where kernels may be others than in the update
        log_prob, values = self.policy(inputs, transitions, scored, context)
        return Minibatch(chunks, inputs, transitions, scored, context, log_prob.detach(), values.detach())

    def estimate(self, trajectories: Sequence[Sequence[Chunk]]) -> None:
        """Fills in the advantages of all chunks from their rewards and values."""
        for chunks in trajectories:
            rewards, values = torch.tensor([[c.reward for c in chunks], [c.value for c in chunks]])
            advantages = generalized_advantages(rewards, values, self.args.gamma, self.args.gae_lambda)
            for chunk, advantage in zip(chunks, advantages.tolist(), strict=True):
                chunk.advantage = advantage

    def update(self, trajectories: Sequence[Sequence[Chunk]], iteration: int) -> dict[str, float]:
        """All epochs on the chunks of an iteration. Returns what there is to log.

        Diagnostics of the ratio and losses are means over the last epoch that ran.
        """
        args = self.args
        chunks = [chunk for trajectory in trajectories for chunk in trajectory]
        order = np.random.default_rng(self._seed(_MINIBATCHES, iteration)).permutation(len(chunks)).tolist()
        batches = [
            self.score([chunks[row] for row in order[start : start + args.batch_size]])
            for start in range(0, len(order), args.batch_size)
        ]
        for batch in batches:
            for chunk, value in zip(batch.chunks, batch.values.tolist(), strict=True):
                chunk.value = value
        self.estimate(trajectories)
        advantages = torch.tensor([chunk.advantage for chunk in chunks])
        mean, std = advantages.mean(), advantages.std(correction=0)
        factor = 0.5 * (1 + math.cos(math.pi * iteration / args.iterations))
        for group, rate in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = rate * (factor if args.lr_scheduler_type == "cosine" else 1)
        values = torch.tensor([chunk.value for chunk in chunks])
        logs = {
            "chunks": len(chunks),
            "explained_variance": explained_variance(values, values + advantages),
            "rollout_gap": float(np.mean([gap for batch in batches for gap in self._gaps(batch)])),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        for epoch in range(args.epochs):
            order = np.random.default_rng(self._seed(_EPOCH, iteration, epoch)).permutation(len(batches)).tolist()
            steps: list[dict[str, float]] = []
            for start in range(0, len(order), args.gradient_accumulation_steps):
                members = [batches[row] for row in order[start : start + args.gradient_accumulation_steps]]
                steps.append(self.step(members, float(mean), float(std)))
                if epoch == start == 0:
                    logs["first_ratio_error"] = max(steps[0]["ratio_max"] - 1, 1 - steps[0]["ratio_min"])
                if steps[-1]["stopped"]:
                    break
            logs |= {name: float(np.mean([step[name] for step in steps])) for name in steps[0]}
            logs["epochs"] = epoch + 1
            if steps[-1]["stopped"]:
                break
        return logs

    def step(self, batches: Sequence[Minibatch], mean: float, std: float) -> dict[str, float]:
        """One optimizer step, which is left out where the policy has moved further than `target_kl`.

        Args:
            batches: minibatches of the step.
            mean, std: of all advantages of the iteration, which are normalised by them.
        """
        args = self.args
        total = sum(len(batch.chunks) for batch in batches)
        logs = dict.fromkeys(("policy_loss", "value_loss", "kl", "clip_fraction"), 0.0)
        ratios = []
        for batch in batches:
            advantages = torch.tensor([chunk.advantage for chunk in batch.chunks], device=args.device)
            returns = advantages + batch.values
            log_prob, values = self.policy(batch.inputs, batch.transitions, batch.scored, batch.context)
            log_ratio = log_prob - batch.log_prob
            losses = {
                "policy_loss": policy_loss(log_ratio, (advantages - mean) / (std + 1e-8), args.clip_range),
                "value_loss": value_loss(values, batch.values, returns, args.value_clip_range),
            }
            loss = (losses["policy_loss"] + args.value_coefficient * losses["value_loss"]).sum() / total
            if not loss.isfinite():
                raise FloatingPointError(
                    f"The loss is not finite in iteration {self.iteration}: lower learning_rate (it is "
                    f"{args.learning_rate}) or set target_kl, and go on from the last checkpoint."
                )
            loss.backward()
            log_ratio = log_ratio.detach()
            ratios.append(log_ratio.exp())
            measured = losses | {"kl": kl_estimate(log_ratio)}
            measured["clip_fraction"] = ((ratios[-1] - 1).abs() > args.clip_range).float()
            for name, value in measured.items():
                logs[name] += value.detach().sum().item() / total
        ratio = torch.cat(ratios)
        logs |= {"ratio_min": ratio.min().item(), "ratio_max": ratio.max().item()}
        logs["stopped"] = float(args.target_kl is not None and logs["kl"] > args.target_kl)
        # Apart, because the critic's gradient is the larger one and would shrink the policy's
        for name, module in (("grad_norm", self.policy.model), ("value_grad_norm", self.policy.value_head)):
            logs[name] = torch.nn.utils.clip_grad_norm_(module.parameters(), args.max_grad_norm).item()
        if not logs["stopped"]:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return logs

    def _gaps(self, batch: Minibatch) -> list[float]:
        """How far the log-probability of each chunk at the rollout is from that in the minibatch."""
        whole = self.args.score_whole_chunk
        sums = [c.step_log_prob[: None if whole else c.executed].sum().item() for c in batch.chunks]
        return [abs(a - b) for a, b in zip(sums, batch.log_prob.tolist(), strict=True)]

    # --- the run

    def train(self) -> Path:
        """Runs the iterations that are left and returns the folder of the trained repository, `output_dir/hub`."""
        args, folder = self.args, Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        discard_unfinished(folder)
        checkpoint = last_checkpoint(folder)
        if checkpoint is not None:
            self.load(Path(checkpoint))
        for name in ("metrics.jsonl", "episodes.jsonl"):
            _keep_iterations(folder / name, self.iteration)
        left = range(self.iteration, args.iterations)
        with tqdm(total=args.iterations, initial=self.iteration, desc="PPO", disable=args.disable_tqdm) as bar:
            for iteration in left:
                logs = self.run_iteration(iteration)
                bar.set_postfix({name: f"{logs[name]:.3g}" for name in ("success", "return", "kl")}, refresh=False)
                bar.update()
        return self._save_repository(folder / "hub")

    def run_iteration(self, iteration: int) -> dict[str, float]:
        """Rollout, update, logs, and a checkpoint when one is due."""
        args, folder, begun, lost = self.args, Path(self.args.output_dir), perf_counter(), self.rollouts.lost
        episodes, trajectories = self.collect(iteration)
        played = perf_counter()
        for task, (solved, tried) in self.outcomes.items():
            own = [episode["success"] for episode in episodes if episode["task"] == task]
            self.outcomes[task] = (OUTCOME_DECAY * solved + sum(own), OUTCOME_DECAY * tried + len(own))
        logs = {
            "iteration": iteration,
            "success": float(np.mean([episode["success"] for episode in episodes])),
            "return": float(np.mean([sum(episode["rewards"]) for episode in episodes])),
            "episodes": len(episodes),
            "lost": self.rollouts.lost - lost,
            "dropped": args.episodes - len(episodes),
        }
        logs |= self.update(trajectories, iteration)
        logs |= {"rollout_seconds": played - begun, "update_seconds": perf_counter() - played}
        names = ("number", "task", "seed", "success", "steps", "rewards")
        lines = [{"iteration": iteration, **{name: episode[name] for name in names}} for episode in episodes]
        _append(folder / "episodes.jsonl", lines)
        _append(folder / "metrics.jsonl", [logs])
        self.iteration = iteration + 1
        if self.iteration % args.save_steps == 0 or self.iteration == args.iterations:
            self.save(folder / f"{PREFIX_CHECKPOINT_DIR}-{self.iteration}")
        return logs

    def save(self, checkpoint: Path) -> None:
        """Writes a checkpoint: a repository, the value head, the optimizer and what the next iteration needs."""
        unfinished_marker(checkpoint).touch()
        self.policy.model.save_pretrained(checkpoint, max_shard_size="1TB")
        self.processor.save_pretrained(checkpoint)
        head = {name: value.contiguous() for name, value in self.policy.value_head.state_dict().items()}
        save_file(head, checkpoint / VALUE_HEAD)
        torch.save(self.optimizer.state_dict(), checkpoint / OPTIMIZER)
        state = {"iteration": self.iteration, "outcomes": self.outcomes, "seed": self.args.seed}
        (checkpoint / TRAINER_STATE).write_text(json.dumps(state) + "\n")
        unfinished_marker(checkpoint).unlink()
        rotate_checkpoints(str(checkpoint.parent), self.args.save_total_limit)

    def load(self, checkpoint: Path) -> None:
        """Goes on from a checkpoint.

        Raises:
            ValueError: it is of a run with another seed or other tasks.
        """
        state = json.loads((checkpoint / TRAINER_STATE).read_text())
        if state["seed"] != self.args.seed or list(state["outcomes"]) != list(self.outcomes):
            raise ValueError(
                f"{checkpoint} is of a run with seed {state['seed']} and tasks {list(state['outcomes'])}, this one "
                f"has seed {self.args.seed} and tasks {list(self.outcomes)}: choose another output_dir."
            )
        load_model(self.policy.model, checkpoint / "model.safetensors", device=self.args.device)
        self.policy.value_head.load_state_dict(load_file(checkpoint / VALUE_HEAD, device=self.args.device))
        optimizer = torch.load(checkpoint / OPTIMIZER, map_location=self.args.device, weights_only=True)
        self.optimizer.load_state_dict(optimizer)
        self.iteration = state["iteration"]
        self.outcomes = {task: tuple(outcome) for task, outcome in state["outcomes"].items()}

    def _save_repository(self, folder: Path) -> Path:
        """Writes model and processor into a folder that appears when it is complete."""
        partial_folder = folder.with_name(f".{folder.name}.partial")
        for path in (partial_folder, folder):
            shutil.rmtree(path, ignore_errors=True)
        self.policy.model.save_pretrained(partial_folder)
        self.processor.save_pretrained(partial_folder)
        partial_folder.rename(folder)
        return folder


def _append(path: Path, lines: Sequence[Mapping]) -> None:
    """Adds JSON lines to a file."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def _keep_iterations(path: Path, iterations: int) -> None:
    """Removes the lines of iterations that will be run again, and one that was cut short."""
    if not path.exists():
        return
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    partial_path = path.with_name(f".{path.name}.partial")
    partial_path.write_text("".join(line for line in whole if json.loads(line)["iteration"] < iterations))
    partial_path.replace(path)
