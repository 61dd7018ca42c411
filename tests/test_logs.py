"""What a run logs, what stops it, and what it costs in reads of the device."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.tiny import dpo_keys, sft_keys, tiny_llava, tiny_relook
from helpers.variants import variants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from relook import load_model
from relook.errors import RecipeError, RelookError
from relook.forward.collate import BatchStats, Collator, Item
from relook.forward.policy import Policy
from relook.model.load import TENSORS_FILE
from relook.recipe import build_recipe
from relook.train import run
from relook.train.callbacks import SanityCheckCallback
from relook.train.metrics import Meter, StepCosts, linear_flops
from relook.train.run import encode_samples, read_samples, train

pytestmark = pytest.mark.usefixtures("no_trunk_cache")
HEAD: dict[str, Any] = {"tune_lm_head": True, "optim": "sgd", "max_grad_norm": 0.0}


def log_of(out: Path) -> list[dict[str, float]]:
    log: list[dict[str, float]] = json.loads((out / "run.json").read_text())["log"]
    return log


# --- useful operations


def test_operations_by_hand() -> None:
    assert linear_flops(100, trained=False, flows=False) == 200  # forward
    assert linear_flops(100, trained=True, flows=False) == 400  # and the weights' gradient
    assert linear_flops(100, trained=False, flows=True) == 400  # and the input's
    assert linear_flops(100, trained=True, flows=True) == 600
    work = BatchStats(pairs=1, tokens=7, last_mlp=6, features=5, projected=5, encoded=4, states=3, targets=2, live=True)
    costs = StepCosts(1, 10, 100, 1000, 10**4, 10**5, 10**6)
    assert costs.flops(work) == 4 + 50 + 700 + 6000 + 50_000 + 300_000 + 2_000_000
    cached = BatchStats(
        pairs=1, tokens=7, last_mlp=6, features=5, projected=5, encoded=4, states=3, targets=2, live=False
    )
    assert costs.flops(cached) == 50_000 + 300_000 + 2_000_000


def full(model: Any) -> Any:
    model.model.language_model.requires_grad_(True)
    model.lm_head.requires_grad_(True)
    model.model.multi_modal_projector.requires_grad_(True)
    return model


def projector(model: Any) -> Any:
    model.model.multi_modal_projector.requires_grad_(True)
    return model


def head(model: Any) -> Any:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def lora(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=4, target_modules=r".*language_model.*_proj"))


def post_decoder(model: Any) -> Any:
    model = tiny_relook(depth=2)
    model.requires_grad_(False)
    model.model.post_decoder.requires_grad_(True)
    return model


def weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize("regime", variants([full, projector, head, lora, post_decoder], {full, lora, post_decoder}))
def test_operations_are_what_torch_counts(
    regime: Callable[[Any], Any], base: Path, world: Path, tmp_path: Path
) -> None:
    """Of one tree, which is a row without padding; attention's scores are products of another kind."""
    recipe = build_recipe(dpo_keys(base, world, tmp_path, tune_lm_head=True))
    loaded = load_model(base)
    examples, _ = encode_samples(recipe, loaded, *read_samples(recipe))
    policy = Policy(regime(tiny_llava().requires_grad_(False)))
    costs = StepCosts.of(policy)
    inputs = Collator(policy, loaded.images, 3)([Item(examples[14], weight=torch.ones(1))])
    work = inputs["work"]
    assert (work.pairs, work.tokens, work.features) == (1, len(examples[14].tree), 36)

    counter = FlopCounterMode(display=False)
    with counter:
        policy(inputs["batch"]).mean().backward()
    matrices = {torch.ops.aten.mm, torch.ops.aten.addmm}
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if op in matrices)
    # The tower's class token takes part: 37 positions where there are 36 features.
    class_token = 2 * weights(policy.core.model.vision_tower)
    # relook takes layers one after the other, so it counts gradients of the inputs of the first k_proj and v_proj.
    first = policy.core.model.language_model.layers[0].self_attn
    parallel = (
        sum(weights(p) - p.lora_B.default.weight.numel() for p in (first.k_proj, first.v_proj)) if regime is lora else 0
    )
    assert costs.flops(work) == counted - class_token + 2 * work.tokens * parallel


# --- fields


def test_speeds_are_logged(base: Path, world: Path, tmp_path: Path) -> None:
    keys = {"tune_post_decoder": True, "max_steps": 4, "logging_steps": 2}
    for name, keys_of in (("dpo", dpo_keys), ("sft", sft_keys)):
        steps = [e for e in log_of(train(build_recipe(keys_of(base, world, tmp_path / name, **keys)))) if "loss" in e]
        assert len(steps) == 2
        for entry in steps:
            assert entry["pairs_per_second"] > 0
            assert entry["tokens_per_second"] > 40 * entry["pairs_per_second"] if name == "dpo" else True
            assert 0 < entry["tflops"] < 10
            assert "peak_memory_gib" not in entry  # a CPU's is not known


def test_a_line_is_the_mean_of_its_steps(base: Path, world: Path, tmp_path: Path) -> None:
    keys = {**HEAD, "learning_rate": 1.0, "max_steps": 5}
    single = log_of(train(build_recipe(dpo_keys(base, world, tmp_path / "1", **keys))))
    double = log_of(train(build_recipe(dpo_keys(base, world, tmp_path / "2", **keys, logging_steps=2))))
    for field in ("loss", "rewards/margins", "policy_logps/chosen", "nll"):
        ones, twos = ([entry[field] for entry in log if field in entry] for log in (single, double))
        # The last step has a line, too, though it does not fill one.
        assert twos == pytest.approx([(ones[0] + ones[1]) / 2, (ones[2] + ones[3]) / 2, ones[4]], abs=1e-5)


def test_the_meter_reads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many fields and steps a line has, their values leave the device in one copy."""
    reads: list[int] = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(tensor.numel()) or tolist(tensor))
    for name in ("item", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a read of its own"))
    meter, work = Meter(StepCosts(*[1] * 7)), BatchStats(1, 2, 3, 4, 4, 5, 6, 7, live=True)
    meter.start()
    for step in range(10):
        meter.add({"loss": torch.tensor(float(step)), "nll": torch.tensor(1.0)}, work, step)
    means = meter.read()
    assert reads == [2 + 4]
    assert (means["loss"], means["nll"]) == (4.5, 1.0)
    assert meter.read() == {}


# --- stops


def test_a_loss_that_is_no_number_is_found_at_the_next_line(base: Path, world: Path, tmp_path: Path) -> None:
    """The weights overflow in step 1, the second loss shows it, the line after step 3 says so."""
    keys = {**HEAD, "learning_rate": 1e38, "beta": 100.0, "logging_steps": 3}
    with pytest.raises(RelookError, match=r"The loss is (nan|-?inf) at step 2\."):
        train(build_recipe(dpo_keys(base, world, tmp_path / "run", **keys)))
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_last_step_that_overflows_is_not_saved(base: Path, world: Path, tmp_path: Path) -> None:
    """Its loss was sound: only the weights tell."""
    keys = {**HEAD, "learning_rate": 1e38, "beta": 1e5, "max_steps": 1}
    with pytest.raises(RelookError, match=r"1 trained tensors hold NaN or inf after step 1\."):
        train(build_recipe(dpo_keys(base, world, tmp_path / "run", **keys)))
    assert not (tmp_path / "run" / "run.json").exists()
    assert not (tmp_path / "run" / TENSORS_FILE).exists()


def test_no_checkpoint_of_broken_weights_replaces_a_good_one(
    base: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from relook.train import trainer

    training_step = trainer.RelookTrainer.training_step

    def broken(self: Any, *arguments: Any, **more: Any) -> Any:
        loss = training_step(self, *arguments, **more)
        if self.state.global_step == 1:
            self.model.core.lm_head.weight.grad[0, 0] = torch.nan
        return loss

    monkeypatch.setattr(trainer.RelookTrainer, "training_step", broken)
    keys = {**HEAD, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "logging_steps": 50}
    with pytest.raises(RelookError, match=r"NaN or inf after step 2\..*last checkpoint is kept"):
        train(build_recipe(dpo_keys(base, world, tmp_path / "run", **keys)))
    [checkpoint] = (tmp_path / "run" / "checkpoints").iterdir()
    assert checkpoint.name == "checkpoint-1"
    assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / TENSORS_FILE).values())


def test_a_learning_rate_of_zero_is_refused(base: Path, world: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="every learning rate is 0"):
        train(build_recipe(dpo_keys(base, world, tmp_path / "run", tune_lm_head=True, learning_rate=0.0)))


@pytest.mark.parametrize("made", [dpo_keys, sft_keys])
def test_a_warm_up_longer_than_the_run_is_no_training(
    made: Callable[..., dict[str, Any]], base: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before the model is loaded."""
    keys = {"tune_lm_head": True, "warmup_steps": 5, "max_steps": 1}
    monkeypatch.setattr(run, "load_for_training", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(
        RecipeError, match=r"No step would have a learning rate above 0: .* 1 step for \d+ .*warm-up from 0 takes 5"
    ):
        train(build_recipe(made(base, world, tmp_path / "run", **keys)))
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("off", "low", "message"),
    [
        (0.02, False, r"differ by 0\.02 nats a token.*Please report this with what `relook doctor`"),
        pytest.param(0.7, True, r"differ by 0\.7.* nats a token", marks=pytest.mark.slow),
        (math.nan, False, r"log-probs of the reference are NaN or inf.*broken weights"),
    ],
)
def test_a_policy_that_is_not_its_reference_stops_the_run(
    off: float, low: bool, message: str, base: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where one of the two passes goes through a wrong mask; in a lower precision only what is no rounding."""
    right = run.reference_log_probs
    wrong = lambda *given: [log_probs + off for log_probs in right(*given)]  # noqa: E731
    monkeypatch.setattr(run, "reference_log_probs", wrong)
    keys = {"lora_enable": True, "lora_r": 2, "bf16": low, "lora_dropout": 0.5}
    with pytest.raises(RelookError, match=message):
        train(build_recipe(dpo_keys(base, world, tmp_path / "run", **keys)))


@pytest.mark.parametrize("place", [0, 1])
def test_the_process_that_is_furthest_off_is_named(place: int) -> None:
    """By its own numbers another process would have nothing to say, or another sum."""
    rows = [[1.0, 1.0, 1e-6], [1.0, 1.0, 3.0]]

    class Two:
        def gather(self, mine: Tensor) -> Tensor:
            assert mine.shape == (1, 3)
            return torch.tensor(rows[place:] + rows[:place])

    first = SanityCheckCallback(Two(), exact=True, trunk_pass="compiled", compares=True)
    with pytest.raises(RelookError, match=r"differ by 3 nats a token.*Set trunk_pass dense"):
        first._check_equals_reference(torch.zeros(4), torch.zeros(4))


def test_a_warm_up_that_starts_at_zero_is_no_alarm(base: Path, world: Path, tmp_path: Path) -> None:
    keys = {"tune_lm_head": True, "warmup_steps": 2, "max_steps": 3, "lora_enable": True, "lora_dropout": 0.3}
    log = log_of(train(build_recipe(dpo_keys(base, world, tmp_path / "run", **keys))))
    assert next(entry["learning_rate"] for entry in log if "loss" in entry) == 0.0


@pytest.mark.parametrize(
    ("more", "steps"),
    [
        pytest.param({}, 6, marks=pytest.mark.slow),
        ({"gradient_accumulation_steps": 4}, 2),
        ({"num_train_epochs": 1.5}, 9),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 5}, 4),
        ({"eval_fraction": 0.5}, 3),
        pytest.param({"max_steps": 2}, 2, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_steps_are_counted_as_the_trainer_does(
    more: dict[str, Any], steps: int, base: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 pairs, four a batch."""
    counted: list[int] = []
    steps_of = run.steps_of
    monkeypatch.setattr(run, "steps_of", lambda *arguments: counted.append(steps_of(*arguments)) or counted[-1])
    log = log_of(train(build_recipe(dpo_keys(base, world, tmp_path / "run", **HEAD, **more))))
    assert counted[-1] == steps == max(entry["step"] for entry in log)


def test_sft_names_no_reference(base: Path, world: Path, tmp_path: Path) -> None:
    keys = sft_keys(base, world, tmp_path / "run", tune_lm_head=True, learning_rate=1e-30, max_steps=1)
    with pytest.raises(RelookError, match=r"^The model\'s log-probs are those before training, after step 1"):
        train(build_recipe(keys))


def test_steps_that_bf16_rounds_away_add_up(
    base: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They move the float32 tensors; where not even those move, nothing is learned."""
    keys = {**HEAD, "bf16": True, "max_steps": 2}
    out = train(build_recipe(dpo_keys(base, world, tmp_path / "run", **{**keys, "learning_rate": 1e-8})))
    assert "quantised weights round them away" in capsys.readouterr().err
    head = load_file(out / "trained.safetensors")["lm_head.weight"]
    assert 0 < (head - load_model(base, dtype="bfloat16").model.lm_head.weight.float()).abs().max() < 1e-6
    with pytest.raises(RelookError, match="nothing is learned"):
        train(build_recipe(dpo_keys(base, world, tmp_path / "none", **{**keys, "learning_rate": 1e-30})))


def test_a_step_that_changes_nothing_stops_the_run(base: Path, world: Path, tmp_path: Path) -> None:
    """Too small for float32, which a learning rate of 1e-30 is."""
    keys = {**HEAD, "learning_rate": 1e-30}
    with pytest.raises(RelookError, match=r"equal after step 1.*learning rate 1e-30.*Likely causes.*bf16"):
        train(build_recipe(dpo_keys(base, world, tmp_path / "run", **keys)))
    # Nothing is finished there: the same folder takes another rate.
    again = train(build_recipe(dpo_keys(base, world, tmp_path / "run", **{**keys, "learning_rate": 1e-2})))
    assert yaml.safe_load((again / "recipe.yaml").read_text())["learning_rate"] == 1e-2
    assert (again / "run.json").exists()


def test_what_trains_beside_the_output_stops_the_run(
    base: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A post decoder whose output is not used learns nothing, however large its steps."""
    from relook.forward import policy

    prediction_states = policy.prediction_states

    def bypassed(post_decoder: Any, trunk: Any) -> Any:
        return prediction_states(None, trunk) + 0 * prediction_states(post_decoder, trunk)

    monkeypatch.setattr(policy, "prediction_states", bypassed)
    keys = {"tune_post_decoder": True, "warmup_steps": 1, "learning_rate": 0.1}
    with pytest.raises(RelookError, match=r"equal after step 2.*depends on no tensor that trains"):
        train(build_recipe(dpo_keys(base, world, tmp_path / "run", **keys)))


def test_in_a_lower_precision_a_warm_up_may_take_its_time(base: Path, world: Path, tmp_path: Path) -> None:
    """The first steps are rounded away in bfloat16, so nothing is decided before the rate is at its height."""
    keys = {**HEAD, "bf16": True, "warmup_steps": 3}
    train(build_recipe(dpo_keys(base, world, tmp_path / "fine", **keys, learning_rate=1.0)))
    with pytest.raises(RelookError, match=r"equal after step 4.*learning rate 1e-30"):
        train(build_recipe(dpo_keys(base, world, tmp_path / "nothing", **keys, learning_rate=1e-30)))
