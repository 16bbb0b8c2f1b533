"""The teacher is one: a copy that moves by the average alone; norms keep to their mode."""

import copy

import pytest
import torch
import torch.nn.functional as F
from material import randomised
from small_objective import CHANNELS, backbone, batch, close, config, cut, full_batch, normalised, objective
from torch import nn

from loftup import LoftUp, LoftUpConfig
from loftup.train.objective.distances import affinity_loss
from loftup.train.objective.mask_bicubic import mask_refine
from loftup.train.objective.objective import Objective


class TestTeacher:
    def made(self, tmp_path, model=None, **settings):
        student = randomised(LoftUpConfig(CHANNELS))
        student.save_pretrained(tmp_path)
        made = config("self_distillation", **settings)
        made.model.pretrained = str(tmp_path)
        made.objective.self_distillation.decay = 0.75
        made.objective.self_distillation.every = 3
        return Objective(made, LoftUp.from_pretrained(made.model.pretrained), model or backbone())

    def test_begins_as_the_pretrained_student(self, tmp_path):
        term = self.made(tmp_path)
        saved = LoftUp.from_pretrained(tmp_path).state_dict()
        teacher = term.teacher.state_dict()
        assert teacher.keys() == saved.keys()
        for name, value in teacher.items():
            assert value.equal(saved[name])
            assert value.data_ptr() != term.up.state_dict()[name].data_ptr()

    def test_moves_by_the_moving_average_alone(self, tmp_path):
        term = self.made(tmp_path)
        optimizer = torch.optim.AdamW([p for p in term.parameters() if p.requires_grad], 1e-2)
        expected = {name: value.clone() for name, value in term.teacher.state_dict().items()}
        for step in range(7):
            before = {name: value.clone() for name, value in term.up.state_dict().items()}
            optimizer.zero_grad()
            term(full_batch())[0].backward()
            optimizer.step()
            assert not term.up.state_dict()["upsampler.final_conv.0.weight"].equal(
                before["upsampler.final_conv.0.weight"]
            )
            for name, value in term.teacher.state_dict().items():
                assert value.equal(expected[name]), (step, name)
            term.after_step(step)
            if step in (2, 5):
                for name, value in term.up.state_dict().items():
                    if value.is_floating_point():
                        expected[name] = 0.75 * expected[name] + 0.25 * value
                    else:
                        expected[name] = value.clone()
                for name, value in term.teacher.state_dict().items():
                    torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
                expected = {name: value.clone() for name, value in term.teacher.state_dict().items()}
        moved = term.teacher.state_dict()["upsampler.final_conv.0.weight"]
        assert not moved.equal(LoftUp.from_pretrained(tmp_path).state_dict()["upsampler.final_conv.0.weight"])

    def test_what_the_teacher_says_changes_when_it_moves(self, tmp_path):
        term, data = self.made(tmp_path), full_batch()
        with torch.no_grad():
            before = term(data)[0]
            for parameter in term.up.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
            moved_student = term(data)[0]
            term.after_step(2)
            moved_both = term(data)[0]
        assert before != moved_student
        assert moved_student != moved_both

    def test_gets_no_gradient(self, tmp_path):
        term = self.made(tmp_path)
        assert not any(p.requires_grad for p in term.teacher.parameters())
        term(full_batch())[0].backward()
        assert all(p.grad is None for p in term.teacher.parameters())
        assert all(p.grad is not None for p in term.up.upsampler.parameters())

    def test_stays_in_evaluation_mode(self, tmp_path):
        term = self.made(tmp_path, model__batch_norm="batch")
        for mode in (True, False, True):
            term.train(mode)
            assert not any(module.training for module in term.teacher.modules())
            assert all(module.training == mode for module in term.up.modules())
        before = copy.deepcopy(term.teacher.state_dict())
        term(full_batch())
        assert all(value.equal(before[name]) for name, value in term.teacher.state_dict().items())

    def test_running_statistics_move_with_the_weights(self, tmp_path):
        term = self.made(tmp_path, model__batch_norm="batch")
        name, count = "upsampler.first_conv.2.running_mean", "upsampler.first_conv.2.num_batches_tracked"
        start = term.teacher.state_dict()[name].clone()
        term(full_batch())
        assert not term.up.state_dict()[name].equal(start)
        assert term.teacher.state_dict()[name].equal(start)
        term.after_step(2)
        expected = 0.75 * start + 0.25 * term.up.state_dict()[name]
        torch.testing.assert_close(term.teacher.state_dict()[name], expected)
        assert term.teacher.state_dict()[count] == term.up.state_dict()[count]

    def test_is_kept_and_restored_by_the_state_dict(self, tmp_path):
        term = self.made(tmp_path)
        with torch.no_grad():
            term.up.upsampler.final_conv[0].bias.add_(1)
        term.after_step(2)
        again = self.made(tmp_path, term.backbones[0])
        again.load_state_dict(term.state_dict())
        for name, value in term.state_dict().items():
            assert again.state_dict()[name].equal(value)
        data = full_batch()
        assert again(data)[0] == term(data)[0]

    def test_is_there_only_for_self_distillation(self):
        term = objective(config("mask_bicubic"))
        assert term.teacher is None
        assert term.downsampler is None
        term.after_step(9)


class TestNorms:
    def norms(self, term):
        return [m for m in term.up.modules() if isinstance(m, nn.BatchNorm2d)]

    def test_frozen(self):
        term = objective(config("mask_bicubic"))
        assert term.up.training
        assert not any(norm.training for norm in self.norms(term))
        before = [norm.running_mean.clone() for norm in self.norms(term)]
        term.eval().train()
        term(batch())
        assert all(norm.running_mean.equal(mean) for norm, mean in zip(self.norms(term), before, strict=True))

    @pytest.mark.parametrize("on", [("mask_bicubic", "self_distillation"), ("self_distillation",)])
    def test_batch_statistics_are_taken_once_and_of_whole_pictures(self, on):
        term, data = objective(config(*on, model__batch_norm="batch")), full_batch()
        other = copy.deepcopy(term.up)
        loss, _ = term(data)
        with torch.no_grad():
            dense = other.upsampler(normalised(term, data.image), data.guidance)
        for norm, expected in zip(
            self.norms(term), [m for m in other.modules() if isinstance(m, nn.BatchNorm2d)], strict=True
        ):
            assert norm.num_batches_tracked == 1
            torch.testing.assert_close(norm.running_mean, expected.running_mean)
        if on == ("self_distillation",):
            crop = data.crops[0]
            with torch.no_grad():
                target = term.teacher.upsampler(normalised(term, crop.image), crop.image)
                target = F.adaptive_avg_pool2d(mask_refine(target, crop.masks), (10, 10))
            close(loss, affinity_loss(cut(dense, crop.box)[..., 1:-1, 1:-1], target[..., 1:-1, 1:-1]))
