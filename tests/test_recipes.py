"""Learning rates of Phase B against closed forms and nanochat's own optimizer."""
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat_cl import recipes
from nanochat_cl.command import UserError
from nanochat_cl.recipes import Recipe


def optimizer_like_nanochat():
    """Two groups with nanochat's keys; begin() and set_step() look at nothing else."""
    groups = [dict(kind="adamw", params=[torch.nn.Parameter(torch.zeros(2))], lr=0.1, initial_lr=0.4, weight_decay=0.01),
              dict(kind="muon", params=[torch.nn.Parameter(torch.zeros(2, 2))], lr=0.001, initial_lr=0.02, momentum=0.90, weight_decay=0.3)]
    return torch.optim.Optimizer(groups, {})


def test_peak_rates_follow_the_root_of_the_batch_ratio_and_the_multiplier_in_every_group():
    optimizer = optimizer_like_nanochat()
    recipes.begin(optimizer, Recipe(lr_mult=0.5, weight_decay=0.07), batch_a=8192, batch_b=2048)
    assert [g["initial_lr"] for g in optimizer.param_groups] == pytest.approx([0.4 * 0.25, 0.02 * 0.25])
    assert optimizer.param_groups[1]["momentum"] == 0.95 and optimizer.param_groups[1]["weight_decay"] == 0.07
    assert optimizer.param_groups[0]["weight_decay"] == 0.01, "the AdamW decay is nanochat's constant"
    recipes.set_step(optimizer, 0, 100, Recipe(warmup_steps=4))
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1 / 4, 0.005 / 4])


def test_rates_computed_from_flags_equal_those_that_base_train_hands_over():
    # base_train at its own reference batch uses the flags as they are; at a sixteenth of it, a quarter of them (spec 18.3)
    flags = dict(unembedding_lr=0.008, embedding_lr=0.3, matrix_lr=0.02, scalar_lr=0.5, depth=20)
    assert recipes.phase_a_lrs(flags, 2**19) == {k: v for k, v in flags.items() if k != "depth"}
    assert recipes.phase_a_lrs(flags, 2**15) == pytest.approx({k: v / 4 for k, v in flags.items() if k != "depth"})


@given(st.sampled_from(sorted(recipes.SCHEDULES)), st.integers(0, 50), st.integers(1, 200))
def test_the_multiplier_warms_up_then_never_rises_and_stays_positive(schedule, warmup, steps):
    recipe = Recipe(lr_schedule=schedule, warmup_steps=warmup)
    values = [recipes.multiplier(s, steps, recipe) for s in range(steps)]
    assert all(0 < v <= 1 for v in values)
    ramp, rest = values[:warmup], values[warmup:]
    assert ramp == sorted(ramp) and rest == sorted(rest, reverse=True)
    if rest:
        assert rest[0] == 1.0


def test_wsd_is_constant_and_then_falls_linearly_over_its_last_part():
    recipe = Recipe(lr_schedule="wsd", cooldown_frac=0.25, warmup_steps=20)
    values = [recipes.multiplier(s, 100, recipe) for s in range(100)]
    assert values[20:81] == [1.0] * 61 and values[81:] == pytest.approx([(100 - s) / 20 for s in range(81, 100)])
    assert [recipes.multiplier(s, 10, Recipe(lr_schedule="wsd", cooldown_frac=0.0)) for s in range(10)] == [1.0] * 10


def test_reset_lr0_holds_the_weights_during_the_warm_up_and_then_begins_at_the_peak():
    recipe = Recipe(optimizer="reset-lr0", warmup_steps=3)
    assert [recipes.multiplier(s, 5, recipe) for s in range(5)] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(lr_schedule="wsd", warmup_steps=5, replay=0.05), Recipe(plasticity="budget:0.25+frozen-shared:0.1")])
def test_a_recipe_is_read_from_its_name(recipe):
    assert recipes.read(recipe.name) == recipe


@pytest.mark.parametrize("bad", ["speed=1", "replay=much", "replay", "replay=2", ""])
def test_a_label_that_is_no_recipe_is_refused_in_one_line(bad):
    with pytest.raises(UserError) as error:
        recipes.read(bad)
    assert "\n" not in str(error.value)


def test_an_arms_own_options_win_and_its_learning_rate_is_a_factor():
    own = recipes.of_arm(Recipe(lr_mult=0.3, replay=0.01, warmup_steps=7), {"lr_mult": 0.1, "replay": 0.25})
    assert own == Recipe(lr_mult=0.03, replay=0.25, warmup_steps=7) and own.name == "lr_mult=0.03,warmup_steps=7,replay=0.25"
    assert recipes.of_arm(Recipe(lr_mult=0.3), {}) == Recipe(lr_mult=0.3)


def test_schedules_at_their_midpoint():
    # half of cosine and of linear is one half; three quarters are (1 - 1/sqrt 2)/2 and one quarter
    for schedule, half, late in (("constant", 1, 1), ("cosine", 0.5, (1 - math.sqrt(0.5)) / 2), ("linear", 0.5, 0.25)):
        recipe = Recipe(lr_schedule=schedule, warmup_steps=20)
        assert recipes.multiplier(60, 100, recipe) == pytest.approx(half)
        assert recipes.multiplier(80, 100, recipe) == pytest.approx(late)


def test_a_recipe_is_named_by_what_differs_from_the_default():
    assert Recipe().name == "default"
    assert Recipe(lr_mult=0.1, optimizer="reset").name == "lr_mult=0.1,optimizer=reset"


@pytest.mark.parametrize("bad", [dict(lr_mult=-1.0), dict(lr_mult=float("nan")), dict(replay=1.5), dict(lr_schedule="step"), dict(warmup_steps=-1), dict(cooldown_frac=1.1),
                                 dict(optimizer="reset-lr0")])
def test_impossible_recipes_are_refused(bad):
    with pytest.raises(UserError):
        Recipe(**bad)


@pytest.mark.parametrize("options", [dict(release="none"), dict(newcomers="passages"), dict(cooldown_frac=0.9), dict(plasticity="budget:0.5+routers:0.1")])
def test_what_is_nothing_to_dense_is_taken_out_of_its_recipe(options):
    assert recipes.of_dense(Recipe(replay=0.05, **options)) == Recipe(replay=0.05)
    assert recipes.of_dense(Recipe(lr_schedule="wsd", cooldown_frac=0.9)).cooldown_frac == 0.9
