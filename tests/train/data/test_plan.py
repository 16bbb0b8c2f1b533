"""What a step draws: shapes, alignment, independence, and refusals."""

import itertools

import pytest
import torch
from small_config import configured

from loftup import LoftUpError
from loftup.train.config import BackboneConfig, TrainConfig
from loftup.train.data.generators import seeded
from loftup.train.data.plan import Cells, View, check_geometry, draw_view, make_plan


def config(**settings):
    return configured(TrainConfig(), **settings)


def plans(made, count=200, patch_size=16):
    check_geometry(made, patch_size)
    return [make_plan(made, patch_size, step) for step in range(count)]


class TestSeeded:
    def test_the_whole_key_decides(self):
        keys = [(0, "a", 1), (0, "a", 2), (1, "a", 1), (0, "b", 1), (0, "a", 1, 0), (0, "a", 11)]
        drawn = [int(torch.randint(2**40, (), generator=seeded(*key))) for key in keys]
        assert len(set(drawn)) == len(keys)
        assert drawn[0] == int(torch.randint(2**40, (), generator=seeded(0, "a", 1)))

    def test_is_the_same_on_every_machine_and_day(self):
        assert torch.randint(1000, (4,), generator=seeded(0, "epoch", 0)).tolist() == [306, 342, 256, 76]


class TestPlan:
    def test_sizes_and_ratios_are_all_drawn_and_go_together(self):
        made = plans(config(data__sizes=[224, 336], data__ratios=[0.5, 1.0, 2.0]))
        found = {(plan.size, plan.output) for plan in made}
        assert found == {(s, round(s * r)) for s, r in itertools.product((224, 336), (0.5, 1.0, 2.0))}
        assert all(plan.window is None and plan.crops == () and plan.region is None for plan in made)

    def test_backbones_are_drawn_by_their_shares(self):
        made = config(backbones=[BackboneConfig(share=share) for share in (3.0, 1.0, 0.5)])
        drawn = [make_plan(made, [16, 16, 16], step).backbone for step in range(600)]
        assert [round(drawn.count(number) / 600 * 4.5, 1) for number in range(3)] == pytest.approx([3, 1, 0.5], abs=0.3)
        alike = config(backbones=[BackboneConfig(share=2.0)] * 3)
        plain = config(backbones=[BackboneConfig()] * 3)
        assert [make_plan(alike, [16] * 3, step) for step in range(9)] == [
            make_plan(plain, [16] * 3, step) for step in range(9)
        ]

    @pytest.mark.parametrize(("window", "side"), [(48, 48), (50, 48), (57, 64), (1, 16), (217, 224)])
    def test_windows_are_whole_cells_everywhere(self, window, side):
        made = plans(config(window=window))
        if side == 224:
            assert all(plan.window is None for plan in made)
            return
        for plan in made:
            top, left, bottom, right = plan.window
            assert bottom - top == right - left == side
            assert top % 16 == left % 16 == 0
            assert top >= 0
            assert left >= 0
            assert max(bottom, right) <= 224
        for edge in (0, 1):
            assert {plan.window[edge] for plan in made} == set(range(0, 224 - side + 1, 16))

    def test_windows_of_other_ratios(self):
        for plan in plans(config(window=50, data__ratios=[0.5, 2.0])):
            cell = plan.output // 14
            assert cell in (8, 32)
            side = plan.window[2] - plan.window[0]
            assert side == {8: 48, 32: 64}[cell]
            assert plan.window[0] % cell == plan.window[1] % cell == 0

    def test_crops_have_the_sizes_of_their_zooms(self):
        made = plans(config(objective__self_distillation__weight=1.0, objective__self_distillation__crops=3))
        sides = set()
        for plan in made:
            assert len(plan.crops) == 3
            for top, left, bottom, right in plan.crops:
                assert bottom - top == right - left
                assert 0 <= top < bottom <= 224
                assert 0 <= left < right <= 224
                sides.add(bottom - top)
        assert min(sides) == 56
        assert max(sides) in (111, 112)
        assert len(sides) > 40

    def test_the_enlarged_whole(self):
        made = plans(config(objective__high_resolution__weight=1.0, window=48))
        assert {plan.factor for plan in made} == {2, 3, 4}
        assert all(plan.region == (0, 0, 14 * plan.factor, 14 * plan.factor) for plan in made)

    @pytest.mark.parametrize("window", [32, 48, 96, 160])
    def test_the_enlarged_surroundings_hold_the_window_or_lie_in_it(self, window):
        made = plans(
            config(objective__high_resolution__weight=1.0, objective__high_resolution__crop=True, window=window)
        )
        for plan in made:
            top, left, bottom, right = plan.region
            assert bottom - top == right - left == 14
            assert min(top, left) >= 0
            assert max(bottom, right) <= 14 * plan.factor
            for low, high, first, last in ((0, 2, top, bottom), (1, 3, left, right)):
                seen = [edge * plan.factor // 16 for edge in (plan.window[low], plan.window[high])]
                inner, outer = sorted([(first, last), tuple(seen)], key=lambda pair: pair[1] - pair[0])
                assert outer[0] <= inner[0] <= inner[1] <= outer[1]

    def test_the_enlarged_part_without_a_window_is_anywhere(self):
        options = {"objective__high_resolution__weight": 1.0, "objective__high_resolution__crop": True}
        made = plans(config(objective__high_resolution__factors=[4], **options), 600)
        assert {plan.region[0] for plan in made} == {*range(0, 42, 4), 42}
        assert {plan.region[1] for plan in made} == {*range(0, 42, 4), 42}
        assert all(plan.region[2] - plan.region[0] == plan.region[3] - plan.region[1] == 14 for plan in made)

    @pytest.mark.parametrize("factor", [1, 2, 3, 4])
    def test_the_enlarged_part_always_shows_whole_cells_of_the_window(self, factor):
        for cells, window in itertools.product(range(2 * factor - 1, 2 * factor + 3), (None, 4, 8, 12, 20)):
            made = config(
                data__sizes=[4 * cells],
                window=window,
                objective__high_resolution__weight=1.0,
                objective__high_resolution__crop=True,
                objective__high_resolution__factors=[factor],
            )
            for plan in plans(made, 40, 4):
                window_cells = [edge // 4 for edge in plan.window or (0, 0, 4 * cells, 4 * cells)]
                for low, high in ((0, 2), (1, 3)):
                    first = max(window_cells[low], -(-plan.region[low] // factor))
                    last = min(window_cells[high], plan.region[high] // factor)
                    assert first < last

    def test_a_term_does_not_change_what_others_draw(self):
        alone = plans(config(window=48, data__sizes=[224, 336]), 20)
        options = {"objective__high_resolution__weight": 1.0, "objective__self_distillation__weight": 1.0}
        both = plans(config(window=48, data__sizes=[224, 336], **options), 20)
        assert [(p.size, p.window) for p in alone] == [(p.size, p.window) for p in both]

    def test_the_seed_decides(self):
        assert plans(config(window=48), 20) == plans(config(window=48), 20)
        assert plans(config(window=48), 20) != plans(config(window=48, seed=1), 20)


class TestFinerCells:
    """Grids of shifted views: several cells along a patch's side."""

    @pytest.mark.parametrize(("grid", "stride"), [(Cells(16, 2), 8), (Cells(14, 2), 7), (Cells(16, 4), 4)])
    def test_are_planned_as_those_of_a_finer_stride(self, grid, stride):
        options = {"objective__high_resolution__weight": 1.0, "objective__high_resolution__crop": True}
        made = config(window=48, data__sizes=[224, 336], **options)
        assert plans(made, patch_size=grid) == plans(made, patch_size=stride)

    def test_of_a_stride_that_is_not_whole(self):
        grid = Cells(14, 3)
        assert (grid.along(224), str(grid.stride)) == (48, "14/3")
        made = config(window=50, data__sizes=[168], data__ratios=[3 / 7])  # 36 cells of 2 pixels
        for plan in plans(made, patch_size=grid):
            assert (plan.output, plan.window[2] - plan.window[0]) == (72, 50)
            assert plan.window[0] % 2 == plan.window[1] % 2 == 0
        with pytest.raises(LoftUpError, match="for a feature cell of 14/3; whole .*take whole multiples of 3/14"):
            check_geometry(config(window=50), grid)

    def test_sizes_are_multiples_of_the_patch(self):
        with pytest.raises(LoftUpError, match="data.sizes holds 231; expected multiples of .* 14, such as 224 or 238"):
            check_geometry(config(data__sizes=[231]), Cells(14, 2))
        check_geometry(config(data__sizes=[448]), [Cells(14, 2), 14, Cells(32, 2)])
        crop = {"objective__high_resolution__weight": 1.0, "objective__high_resolution__crop": True}
        with pytest.raises(LoftUpError, match=r"holds 4, .* the 6 x 6 feature cells .* data.sizes of at least 64, or"):
            check_geometry(config(data__sizes=[48], **crop), Cells(16, 2))


class TestView:
    def test_regions(self):
        view = View(top=10.0, left=20.0, side=100.0, mirrored=False)
        assert view.region((0, 0, 224, 224), 224) == (10, 20, 110, 120)
        assert view.region((0, 25, 50, 100), 200) == (10, 32.5, 35, 70)

    def test_regions_of_a_mirrored_view(self):
        view = View(top=10.0, left=20.0, side=100.0, mirrored=True)
        assert view.region((0, 0, 224, 224), 224) == (10, 20, 110, 120)
        assert view.region((0, 25, 50, 100), 200) == (10, 70, 35, 107.5)

    @pytest.mark.parametrize("size", [(300, 200), (200, 300), (64, 64)])
    def test_views_lie_in_the_picture(self, size):
        made = config(data__scale=[0.5, 1.0])
        views = [draw_view(made, *size, seeded("view", index)) for index in range(300)]
        short = min(size)
        for view in views:
            assert 0.5 * short <= view.side <= short
            assert 0 <= view.top <= size[0] - view.side
            assert 0 <= view.left <= size[1] - view.side
        assert 0.4 < sum(view.mirrored for view in views) / 300 < 0.6
        assert min(view.side for view in views) < 0.52 * short
        assert max(view.side for view in views) > 0.98 * short

    def test_never_or_always_mirrored(self):
        never, always = config(data__flip=0.0), config(data__flip=1.0)
        assert not any(draw_view(never, 50, 60, seeded(i)).mirrored for i in range(50))
        assert all(draw_view(always, 50, 60, seeded(i)).mirrored for i in range(50))


class TestGeometry:
    @pytest.mark.parametrize("sizes", [[518], [448, 336, 224], [14]])
    def test_sizes_of_whole_patches_are_taken(self, sizes):
        check_geometry(config(data__sizes=sizes), 14)

    @pytest.mark.parametrize(
        ("settings", "text"),
        [
            ({"data__sizes": [224, 500]}, "data.sizes holds 500; expected multiples .* 14, such as 490 or 504"),
            ({"data__sizes": [7]}, "data.sizes holds 7; expected multiples .* 14, such as 14$"),
            (
                {"data__ratios": [0.25], "window": 48},
                "data.ratios holds 0.25, which at 224 gives 3.5 output pixels for a .* of 14; whole .* for window:",
            ),
            (
                {
                    "data__ratios": [1.0, 0.25],
                    "objective__high_resolution__weight": 1,
                    "objective__multi_view__weight": 1,
                },
                "for objective.high_resolution and objective.multi_view: take whole multiples of 1/14",
            ),
            ({"data__ratios": [1 / 28]}, "makes the output coarser than the features"),
            (
                {"data__ratios": [1 / 7], "objective__high_resolution__weight": 1},
                "factors holds 4, a target finer than the output, which has 2 pixels for a feature cell",
            ),
            (
                {"data__ratios": [1.0, 3.0], "objective__self_distillation__weight": 1},
                "data.ratios holds 3 and .*zoom begins at 2: .* zoom must be at least the ratio",
            ),
            (
                {
                    "data__sizes": [224, 84],
                    "objective__high_resolution__weight": 1,
                    "objective__high_resolution__crop": True,
                },
                "factors holds 4, .* part of 84 pixels .* 6 x 6 feature .* at most 3, data.sizes of at least 98, or",
            ),
            (
                {
                    "data__sizes": [28],
                    "objective__self_distillation__weight": 1,
                    "objective__self_distillation__zoom": [2.0, 60.0],
                },
                "zoom ends at 60, which leaves less than a pixel of an output of 28; take less than 56",
            ),
        ],
    )
    def test_refuses(self, settings, text):
        with pytest.raises(LoftUpError, match=text):
            check_geometry(config(**settings), 14)

    def test_outputs_without_whole_cells_are_taken_whole(self):
        made = config(data__ratios=[0.25], objective__mask_bicubic__weight=1.0)
        assert {plan.output for plan in plans(made, patch_size=14)} == {56}
