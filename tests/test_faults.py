"""Faults that were found by attacking the library; each of these failed before it was mended."""
import warnings

import pytest
import torch
from iddpm_nb.data import Batches, Images
from iddpm_nb.importance import LossSecondMomentSampler, UniformSampler
from iddpm_nb.train import start_training
from iddpm_nb.training.checkpoint import checkpoints, resume, save_checkpoint, whole
from iddpm_nb.training.log import read_metrics


def training():
    data = Images(torch.zeros(8, 1, 4, 4, dtype=torch.uint8))
    return start_training(torch.nn.Linear(2, 2), Batches(data, 4), UniformSampler(10))


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(tmp_path):
    run = training()
    for step in (4, 6):
        run.step = step
        save_checkpoint(tmp_path, run, {}, keep=2)
    (tmp_path / "0000006" / "state.pt").write_bytes(b"cut")
    run = training()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert resume(tmp_path, run).name == "0000004" and run.step == 4
    run.step = 5
    assert save_checkpoint(tmp_path, run, {}, keep=1).is_dir()
    assert ([p.name for p in checkpoints(tmp_path)] == ["0000005"]
            and whole(checkpoints(tmp_path)[0]))


def test_the_logged_loss_is_the_weighted_one():
    losses, weights = torch.tensor([1.0, 9.0]), torch.tensor([2.0, 0.5])
    m = {"losses": losses, "weights": weights, "t": torch.tensor([0, 1]), "T": 4, "step": 1,
         "grad_norm": torch.tensor(1.0)}
    assert read_metrics([m])["loss"] == pytest.approx(3.25)


def test_a_loss_that_is_no_number_leaves_the_sampler_usable():
    sampler = LossSecondMomentSampler(3, history=2)
    sampler.update(torch.arange(3).repeat(2), torch.tensor([1.0, 2, 3, 1, 2, 3]))
    for bad in (float("nan"), float("inf")):
        sampler.update(torch.tensor([1], dtype=torch.int32), torch.tensor([bad]))
        p = sampler.probs()
        assert p.isfinite().all() and abs(p.sum() - 1) < 1e-12 and p[2] > 1.5 * p[0]
        sampler.sample(4)


def test_other_images_are_refused_on_resume():
    state = training().batches.state_dict()
    with pytest.raises(ValueError, match="not the images"):
        Batches(Images(torch.ones(8, 1, 4, 4, dtype=torch.uint8)), 4).load_state_dict(state)
