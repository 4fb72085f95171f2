"""Will the Trainer accept its settings? What it would say after loading is said before, with the key."""

import pytest
from transformers import TrainingArguments

from component.error import UserError
from component.train.rehearsal import explained_settings, rehearse


def arguments(tmp_path, **changes) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path / "run"), report_to="none", use_cpu=True, **changes)


ACCEPTED = [
    {},
    {"optim": "paged_adamw_32bit"},
    {"optim": "paged_adamw_8bit", "lr_scheduler_type": "cosine"},
    {"optim": "adamw_torch", "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6},
    {"optim": "adafactor", "lr_scheduler_type": "inverse_sqrt"},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}},
    {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 10}},
    {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 5},
    {"label_smoothing_factor": 0.1},
    {"save_strategy": "best", "metric_for_best_model": "loss"},
]


@pytest.mark.parametrize("settings", ACCEPTED, ids=str)
def test_settings_that_work_change_nothing(tmp_path, settings):
    given = arguments(tmp_path, **settings)
    before = given.to_dict()
    rehearse(given)
    assert given.to_dict() == before


REFUSED = {
    "schedule without its length": (
        {"lr_scheduler_type": "warmup_stable_decay"},
        "^lr_scheduler_type: warmup_stable_decay; .*num_decay_steps",
    ),
    "schedule without its floor": (
        {"lr_scheduler_type": "cosine_with_min_lr"},
        "^lr_scheduler_type: cosine_with_min_lr; .*min_lr",
    ),
    "option of another schedule": (
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"min_lr": 1e-5}},
        "^lr_scheduler_type: cosine, lr_scheduler_kwargs: {'min_lr': 1e-05}; .*min_lr",
    ),
    "option of another type": (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": "low"}},
        "lr_scheduler_kwargs: {'min_lr': 'low'}; ",
    ),
    "schedule_free": ({"optim": "schedule_free_adamw"}, "^optim: schedule_free_adamw; .*pip install schedulefree"),
    "lomo": ({"optim": "lomo"}, "^optim: lomo; .*lomo"),
    "torchao": ({"optim": "adamw_torch_8bit"}, "^optim: adamw_torch_8bit; .*torchao"),
    "galore": ({"optim": "galore_adamw", "optim_target_modules": ["q_proj"]}, "^optim: galore_adamw; .*galore"),
    "beta": ({"optim": "adamw_torch", "adam_beta1": 2.0}, "^optim: adamw_torch; .*beta"),
    "option that is ignored": (
        {"optim": "adamw_torch", "optim_args": "betas=0.5"},
        "^optim_args: betas=0.5 has no effect on optim: adamw_torch; leave it out",
    ),
    "layers of GaLore": (
        {"optim": "adamw_torch", "optim_target_modules": ["q_proj"]},
        r"^optim_target_modules: \['q_proj'\] has no effect on optim: adamw_torch; leave it out",
    ),
    "betas of Adam": (
        {"optim": "adafactor", "adam_beta2": 0.9},
        "^adam_beta2: 0.9 has no effect on optim: adafactor; leave it out",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_k13_what_the_trainer_refuses_late(tmp_path, name):
    settings, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        rehearse(arguments(tmp_path, **settings))


def test_an_exception_without_a_key_passes(tmp_path):
    given = arguments(tmp_path, neftune_noise_alpha=5.0)
    with pytest.raises(RuntimeError, match=r"^shapes"), explained_settings(given):
        raise RuntimeError("shapes")
    with (
        pytest.raises(UserError, match=r"^neftune_noise_alpha: 5\.0; `neftune_noise_alpha` needs"),
        explained_settings(given),
    ):
        raise ValueError("`neftune_noise_alpha` needs an embedding")
    with pytest.raises(ValueError, match="label_names"), explained_settings(given):
        raise ValueError("label_names")  # it was not set
