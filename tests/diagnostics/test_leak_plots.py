"""The figures draw what was measured, and every word of them can be read."""

import dataclasses
import functools
import importlib
import itertools
import math
import multiprocessing
import sys

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from ztsnr.diagnostics import GaussianCanvas
from ztsnr.diagnostics.expected import expected_slope
from ztsnr.diagnostics.latent_stats import LatentMeanRecorder, LatentStatistics
from ztsnr.diagnostics.leak import exact_flow, mean_leak
from ztsnr.diagnostics.leak_figure import leak_figure
from ztsnr.diagnostics.run_figure import run_figure
from ztsnr.diagnostics.sheets import guidance_sheet, start_sheet
from ztsnr.figures.png import to_image
from ztsnr.figures.strip import Strip
from ztsnr.figures.themes import THEMES
from ztsnr.samplers import NoiseSchedule, from_denoised, sample, step_schedule
from ztsnr.samplers.prediction import to_denoised

SIDE, MEAN, TAU = 16, -2.4, 0.3
CANVAS = GaussianCanvas(MEAN, TAU, 0.6)
ZERO_SNR, PLAIN = NoiseSchedule.sdxl(), NoiseSchedule.sdxl(zero_terminal_snr=False)
STRIP = Strip(
    np.random.default_rng(0).integers(0, 256, (8, 20, 16, 3), dtype=np.uint8),
    [math.inf, 4518.76, 57.87, 11.6, 5.4, 0.1917, 0.0292, 0.0],
)


def network(kind):
    """The canvas as networks know it: by the table of their own training, or not beyond t = 900 of it."""
    trained = PLAIN if kind == "plain" else ZERO_SNR

    def denoise(x, sigma):
        believed = trained.sigma(ZERO_SNR.timestep(sigma))
        if kind == "starved":
            believed = min(believed, trained.sigma(900.0))
        return to_denoised(from_denoised(CANVAS(x, believed), x, believed), x, sigma)

    return denoise


def runner(denoise, steps=6, start=None):
    sigmas = step_schedule(ZERO_SNR, steps, latent_size=(SIDE, SIDE), guidance=1.0)
    if start is not None:
        times = ZERO_SNR.timestep(start) * (1 - torch.arange(float(steps)) / steps)
        sigmas = torch.cat([ZERO_SNR.sigma(times), torch.zeros(1)])

    def run(noise):
        recorder = LatentMeanRecorder()
        return sample(denoise, noise, sigmas, callback=recorder), recorder.read()

    return run


@functools.cache
def report(kind="good", channels=4, seeds=4, checkpoint=True, sampler=True, reference=True, start=None, guidance=None):
    """With the name of a guidance, brightness is as if guided by canvases of another mean and of another spread."""
    denoise = network(kind)
    others = (GaussianCanvas(MEAN + 0.4, TAU, 0.6), GaussianCanvas(MEAN - 0.1, 1.3 * TAU, 0.6))
    flows = [exact_flow(other, ZERO_SNR, (SIDE, SIDE), steps=10) for other in others] if guidance else [None, None]
    return mean_leak(
        denoise if checkpoint else None,
        runner(denoise, start=start) if sampler else None,
        (channels, SIDE, SIDE),
        schedule=ZERO_SNR,
        reference=exact_flow(denoise, ZERO_SNR, (SIDE, SIDE), steps=10) if reference else None,
        start_sigma=start or math.inf,
        seeds=range(seeds),
        to_rgb=(lambda x: 0.5 + x[:, :3] / 4.8) if channels >= 3 else None,
        brightness_through="by a line",
        unguided=flows[0],
        exposure_true=flows[1],
        guidance_name=guidance or "",
    )


@functools.cache
def run(samples=5, channels=4, kind="good"):
    noise = torch.randn(samples, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    latents, statistics = runner(network(kind), steps=16)(noise)
    return statistics, latents.mean((2, 3)).numpy()


def panel(figure, title):
    return next(axes for axes in figure.axes if axes.get_title(loc="left").startswith(title))


def checkpoint_panel(figure):
    return next(axes for axes in figure.axes if axes.get_xlabel() == "timestep")


def measured(axes):
    """Lines with markers, in the order in which they were drawn."""
    return [line for line in axes.lines if line.get_marker() not in ("None", None) and len(line.get_xdata()) > 1]


def expected(axes):
    return [line for line in axes.lines if line.get_marker() in ("None", None) and len(line.get_xdata()) > 90]


def words(figure):
    return " ".join(" ".join(text.get_text().split()) for text in figure.findobj(Text))


# ----------------------------------------------------------------------------------------------------------------------
# The checkpoint


def test_the_points_are_the_measured_slopes_with_their_intervals():
    answer = report(kind="starved", channels=1).checkpoint
    bars = checkpoint_panel(leak_figure(report(kind="starved", channels=1))).containers[0]
    np.testing.assert_allclose(bars.lines[0].get_xdata(), answer.timesteps)
    np.testing.assert_allclose(bars.lines[0].get_ydata(), [level[0].value for level in answer.slopes])
    low, high = np.array([segment[:, 1] for segment in bars.lines[2][0].get_segments()]).T
    np.testing.assert_allclose(low, [level[0].low for level in answer.slopes])
    np.testing.assert_allclose(high, [level[0].high for level in answer.slopes])


def test_of_several_channels_the_last_point_over_the_peak_is_the_share_of_the_verdict():
    made = report(kind="starved")
    # channels that follow by different amounts, one of them the other way round
    factors = np.array([1.0, 0.2, -0.5, 0.0])
    probes = [dataclasses.replace(p, denoised_mean=p.denoised_mean * factors) for p in made.network_probes]
    slopes = checkpoint_panel(leak_figure(dataclasses.replace(made, network_probes=probes))).containers[0].lines[0]
    y = slopes.get_ydata()
    by_channel = np.mean([p.slopes for p in probes], axis=0)
    weights = np.abs(by_channel[y.argmax()])
    assert y[-1] == pytest.approx(np.average(by_channel[-1] * np.sign(factors), weights=weights))
    assert leak_share(made) == pytest.approx(made.checkpoint.share.value)


def leak_share(made):
    y = checkpoint_panel(leak_figure(made)).containers[0].lines[0].get_ydata()
    return y[-1] / y.max()


@pytest.mark.parametrize(("kind", "schedule"), [("good", ZERO_SNR), ("plain", PLAIN)])
def test_the_curve_of_the_right_table_goes_through_the_points(kind, schedule):
    axes = checkpoint_panel(leak_figure(report(kind=kind)))
    points = axes.containers[0].lines[0]
    curves = dict(zip(["zero SNR", "plain"], expected(axes), strict=True))
    own, other = (curves["zero SNR"], curves["plain"])[:: 1 if kind == "good" else -1]
    at_points = np.interp(points.get_xdata(), own.get_xdata(), own.get_ydata())
    np.testing.assert_allclose(at_points, points.get_ydata(), atol=0.03 * points.get_ydata().max())
    assert abs(other.get_ydata()[-1] - points.get_ydata()[-1]) > 0.5 * points.get_ydata().max()
    assert curves["zero SNR"].get_ydata()[-1] == 0
    for t, slope in zip(own.get_xdata()[::50], own.get_ydata()[::50], strict=True):
        assert slope == pytest.approx(expected_slope(schedule.sigma(t), TAU**2 * SIDE**2), rel=0.1)


def test_another_table_than_stable_diffusions_has_no_curves():
    made = report()
    answer = dataclasses.replace(made.checkpoint, sigmas=[0.5 * sigma for sigma in made.checkpoint.sigmas])
    axes = checkpoint_panel(leak_figure(dataclasses.replace(made, checkpoint=answer)))
    assert expected(axes) == []
    assert len(axes.containers[0].lines[0].get_xdata()) == len(made.checkpoint.timesteps)


# ----------------------------------------------------------------------------------------------------------------------
# The sampler


def test_the_lines_are_the_mean_predictions_of_either_sign_and_end_at_the_picture():
    made = report()
    figure = leak_figure(made)
    for channel in range(4):
        for line, sign in zip(measured(panel(figure, f"channel {channel + 1}")), (1, -1), strict=True):
            of_sign = [
                [*probe.denoised_mean[:, i, channel], probe.picture_mean[i, channel]]
                for probe in made.sampler_probes
                for i in (0, 1)
                if sign * probe.noise_mean[i, channel] > 0
            ]
            assert len(of_sign) == len(made.sampler_probes)
            np.testing.assert_allclose(line.get_ydata(), np.mean(of_sign, axis=0))
            assert (np.diff(line.get_xdata()) > 0).all()


@pytest.mark.parametrize("start", [None, 14.6])
def test_the_expected_curves_are_those_of_the_canvas(start):
    axes = panel(leak_figure(report(start=start)), "channel 1")
    upper, lower = (line.get_ydata() for line in expected(axes))
    assert upper[0] == pytest.approx(MEAN, abs=1e-3)  # at infinity the mean of all pictures
    assert upper[-1] == pytest.approx(MEAN + TAU, abs=0.02)  # one standard deviation up
    assert lower[-1] == pytest.approx(MEAN - TAU, abs=0.02)
    up, down = measured(axes)
    off = [np.interp(line.get_xdata(), expected(axes)[0].get_xdata(), curve) - line.get_ydata()
           for line, curve in ((up, upper), (down, lower))]  # fmt: skip
    assert (np.abs(off).max() < 0.02) == (start is None)


def test_the_band_is_as_wide_as_the_intervals():
    made = report(seeds=2, channels=3, reference=False)
    fit = made.sampler.channels[1]
    figure = leak_figure(made)
    upper, lower = (band.get_paths()[0].get_extents() for band in panel(figure, "channel 2").collections[:2])
    noise = np.abs(made.sampler_probes[0].noise_mean[0, 1])
    assert upper.y1 == pytest.approx(fit.intercept.high + noise * fit.slope.high)
    assert lower.y0 == pytest.approx(fit.intercept.low - noise * fit.slope.high)
    assert "this sampler itself" in words(figure)
    assert "mean of the exact flow" in words(leak_figure(report()))


def test_an_adaptive_solver_has_a_line_for_every_seed():
    made = report()
    probes = [dataclasses.replace(p, sigmas=p.sigmas / (1 + p.seed)) for p in made.sampler_probes]
    lines = measured(panel(leak_figure(dataclasses.replace(made, sampler_probes=probes)), "channel 1"))
    assert len(lines) == 2 * len(probes)
    assert {line.get_ydata()[-1] for line in lines} == {v for p in probes for v in p.picture_mean[:, 0]}


def test_of_many_channels_those_with_the_largest_slopes_are_drawn():
    made = report(channels=16)
    gains = np.array([1, 9, 1, 1, 8, 1, 1, 7, 1, 1, 1, -10, 1, 1, 1, 1.0])
    fits = [
        dataclasses.replace(fit, reference_slope=dataclasses.replace(fit.reference_slope, value=gain))
        for fit, gain in zip(made.sampler.channels, gains, strict=True)
    ]
    figure = leak_figure(dataclasses.replace(made, sampler=dataclasses.replace(made.sampler, channels=fits)))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert [t for t in titles if t.startswith("channel")] == ["channel 2", "channel 5", "channel 8", "channel 12"]
    assert "4 of 16 channels" in words(figure)
    assert panel(figure, "Picture on noise, channel 12")


def test_the_scatter_has_every_picture_and_both_lines():
    made = report(start=14.6)
    figure = leak_figure(made)
    axes = panel(figure, "Picture on noise")
    channel = int(axes.get_title(loc="left").split("channel ")[1].split(",")[0]) - 1
    fit = made.sampler.channels[channel]
    points = {tuple(p) for line in measured(axes) for p in line.get_xydata()}
    assert points == {tuple(p) for q in made.sampler_probes
                      for p in zip(q.noise_mean[:, channel], q.picture_mean[:, channel], strict=True)}  # fmt: skip
    own, exact = [line for line in axes.lines if line not in measured(axes)]
    for line, slope in ((own, fit.slope), (exact, fit.reference_slope)):
        assert np.diff(line.get_ydata())[0] / np.diff(line.get_xdata())[0] == pytest.approx(slope.value)
    for text in (f"this sampler: {fit.slope}", f"exact flow: {fit.reference_slope}", f"R² {fit.r_squared:.2f}",
                 f"{made.sampler.pull} levels of 255"):  # fmt: skip
        assert text in words(figure)


def test_the_strip_shows_the_pictures_with_their_sigmas():
    figure = leak_figure(report(checkpoint=False), strip=STRIP)
    images = [image for axes in figure.axes for image in axes.images]
    for image, picture in zip(images, STRIP.pictures, strict=True):
        np.testing.assert_array_equal(image.get_array(), picture)
    labels = [label.get_text() for axes in figure.axes if axes.images for label in axes.get_xticklabels()]
    assert labels == ["∞", "4.52e+03", "57.9", "11.6", "5.4", "0.192", "0.0292", "picture"]


# ----------------------------------------------------------------------------------------------------------------------
# One run


def test_the_lines_of_a_run_are_its_samples():
    statistics, picture = run()
    figure = run_figure(statistics, picture)
    for channel in range(4):
        for i, line in enumerate(measured(panel(figure, f"channel {channel + 1}"))):
            drawn = [*statistics.denoised_mean[:, i, channel], picture[i, channel]]
            np.testing.assert_array_equal(line.get_ydata(), drawn)
    without = measured(panel(run_figure(statistics), "channel 1"))
    assert [len(line.get_xdata()) for line in without] == [len(statistics.sigmas)] * 5


def test_the_fit_of_a_run_is_the_canvas_own():
    statistics, picture = run()
    figure = run_figure(statistics, picture)
    axes = panel(figure, "Picture on noise")
    channel = int(axes.get_title(loc="left").split("channel ")[1].split(":")[0]) - 1
    line = next(line for line in axes.lines if line not in measured(axes))
    slope = np.diff(line.get_ydata())[0] / np.diff(line.get_xdata())[0]
    assert slope == pytest.approx(np.polyfit(statistics.noise_mean[:, channel], picture[:, channel], 1)[0], rel=1e-5)
    assert slope == pytest.approx(TAU * SIDE, rel=0.02)
    assert f"slope {slope:.3f}"[:9] in words(figure)
    curves = expected(panel(figure, "channel 1"))
    ends = MEAN + TAU * SIDE * np.array([statistics.noise_mean[:, 0].min(), statistics.noise_mean[:, 0].max()])
    np.testing.assert_allclose([curve.get_ydata()[-1] for curve in curves], ends, atol=0.02)


def test_a_picture_that_goes_against_the_noise_has_its_curve_go_there():
    statistics, picture = run()
    against = changed(statistics, denoised_mean=2 * MEAN - statistics.denoised_mean)
    axes = panel(run_figure(against, 2 * MEAN - picture), "channel 1")
    lines = measured(axes)
    for curve, i in zip(expected(axes), (statistics.noise_mean[:, 0].argmin(), statistics.noise_mean[:, 0].argmax()),
                        strict=True):  # fmt: skip
        at_points = np.interp(lines[i].get_xdata(), curve.get_xdata(), curve.get_ydata())
        np.testing.assert_allclose(at_points, lines[i].get_ydata(), atol=0.03)


@pytest.mark.parametrize(("kind", "inside"), [("good", True), ("starved", False)])
def test_one_sample_stays_within_the_open_band_unless_its_last_timestep_is_untrained(kind, inside):
    axes = panel(run_figure(*run(samples=1, kind=kind)), "channel 1")
    (line,), band = measured(axes), axes.collections[0].get_paths()[0].vertices
    middle = len(band) // 2
    order = np.argsort(band[1:middle, 0])
    (low_x, low), (high_x, high) = band[1:middle][order].T, band[middle + 1 : -1][::-1].T
    x, y = line.get_xdata()[:-1], line.get_ydata()[:-1]
    low, high = np.interp(x, low_x, low), np.interp(x, high_x, high)
    low, high = np.minimum(low, high), np.maximum(low, high)
    assert ((y >= low - 0.02 * np.ptp(y)) & (y <= high + 0.02 * np.ptp(y))).all() == inside


def changed(statistics, **values):
    return dataclasses.replace(statistics, **values)


def test_without_a_fit_the_panel_says_why():
    statistics, picture = run()
    same = np.repeat(statistics.noise_mean[:1], 5, axis=0)
    for drawn, reason in [
        (run_figure(changed(statistics, noise_mean=same), picture), "began with the same mean of the noise"),
        (run_figure(changed(statistics, noise_mean=None, noise_std=None), picture), "began with is not known"),
        (run_figure(statistics, None), "the finished picture is not known"),
        (run_figure(*run(samples=2)), "needs 3 samples"),
    ]:
        assert reason in words(drawn)
        assert not any("Picture on noise" in axes.get_title(loc="left") for axes in drawn.axes)
    assert "No slope" not in words(run_figure(statistics, picture))


def test_of_a_large_batch_eight_samples_are_drawn_and_all_are_fitted():
    statistics, picture = run(samples=11)
    figure = run_figure(statistics, picture)
    assert len(measured(panel(figure, "channel 1"))) == 8
    assert "the first 8 of 11" in words(figure)
    assert sum(len(line.get_xdata()) for line in panel(figure, "Picture on noise").lines) == 11 + 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_left_out_and_said(value):
    statistics, picture = run()
    denoised, picture = statistics.denoised_mean.copy(), picture.copy()
    denoised[3:, 1, 2] = picture[1, 2] = value
    figure = run_figure(changed(statistics, denoised_mean=denoised), picture)
    image = to_image(figure)
    assert image.shape[1] == 900
    title = panel(figure, "channel 3").get_title(loc="left")
    assert title == f"channel 3: not finite from {statistics.sigmas[3]:.3g}"
    assert panel(figure, "channel 2").get_title(loc="left") == "channel 2"
    lines = measured(panel(figure, "channel 3"))
    assert np.isfinite(lines[1].get_ydata()).tolist() == [True] * 3 + [False] * (len(denoised) - 2)
    np.testing.assert_array_equal(lines[1].get_ydata()[:3], denoised[:3, 1, 2])
    assert "began at step 4 of 16" in words(figure)
    only_last = picture.copy()
    only_last[0, 0] = value
    title = panel(run_figure(statistics, only_last), "channel 1").get_title(loc="left")
    assert title == "channel 1: not finite from picture"


def test_nothing_finite_still_is_a_figure():
    statistics, picture = run()
    nothing = {f.name: np.full_like(getattr(statistics, f.name), np.nan) for f in dataclasses.fields(LatentStatistics)
               if f.name not in ("sigmas", "canvas")}  # fmt: skip
    figure = run_figure(changed(statistics, **nothing), np.full_like(picture, np.nan))
    assert to_image(figure).shape[1] == 900
    assert "not finite from ∞" in words(figure)


@pytest.mark.parametrize("start", [None, 0.2])
def test_one_step_is_enough(start):
    recorder = LatentMeanRecorder()
    noise = torch.randn(3, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    sigma = start or math.inf
    recorder.begin(noise)
    recorder.record(sigma, noise, CANVAS(noise, sigma))
    figure = run_figure(recorder.read(), CANVAS.exact(noise).mean((2, 3)).numpy())
    assert len(measured(panel(figure, "channel 1"))[0].get_xdata()) == 2
    assert_readable(figure)


# ----------------------------------------------------------------------------------------------------------------------
# The sheet of starts


def sheet(seeds=3, brightness=None, prompt="solid black background"):
    starts = ["exact infinity\nthis package", "20000", "4518", "136", "56", "14.6"]
    brightness = np.zeros((6, seeds)) if brightness is None else brightness
    pictures = np.random.default_rng(1).integers(0, 256, (6, seeds, 8, 8, 3), dtype=np.uint8)
    return start_sheet(pictures, starts, brightness, prompt, range(seeds)), pictures


def test_the_sheet_has_every_picture_with_its_brightness_and_departures_in_red():
    brightness = np.full((6, 3), 12.0)
    brightness[5] = [127.4, 13.1, math.nan]
    brightness[4, 0] = 12.9
    figure, pictures = sheet(brightness=brightness)
    for axes, picture in zip(figure.axes, pictures.reshape(-1, 8, 8, 3), strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), picture)
    red = {text.get_text() for text in figure.texts if text.get_color() == "#b3261e"}
    assert red == {"127.4", "13.1", "nan"}
    assert {"12.0", "12.9", "seed 2", "14.6"} <= {text.get_text() for text in figure.texts}


@pytest.mark.parametrize("seeds", [1, 2, 8])
@pytest.mark.parametrize("prompt", ["", "black", "a very long prompt, masterpiece, best quality, " * 6])
def test_the_words_of_the_sheet_stay_within_it(seeds, prompt):
    figure, _ = sheet(seeds, prompt=prompt)
    to_image(figure)
    for text in figure.texts:
        assert within(text.get_window_extent(), figure.bbox), text


# ----------------------------------------------------------------------------------------------------------------------
# Guidance


def test_every_noise_has_its_point_under_each_guidance():
    made = report(channels=3, guidance="CFG 5")
    axes = panel(leak_figure(made), "brightness, with guidance")
    diagonal, *points = axes.lines
    np.testing.assert_allclose(diagonal.get_xdata(), diagonal.get_ydata())
    alone = np.ravel(made.guidance.unguided)
    for line, shift in zip(points, made.guidance.shifts, strict=True):
        np.testing.assert_allclose(line.get_xdata(), alone)
        np.testing.assert_allclose(line.get_ydata(), alone + np.ravel(shift.changes))
    cfg = np.concatenate([probe.brightness for probe in made.reference_probes])
    np.testing.assert_allclose(points[0].get_ydata(), cfg)
    assert all(low <= value <= high for low, high in [axes.get_ylim()] for value in cfg)


def test_pictures_of_one_brightness_can_be_read():
    made = report(channels=3, guidance="CFG 5")
    same = dataclasses.replace(
        made.guidance,
        unguided=np.zeros((4, 2)).tolist(),
        shifts=[dataclasses.replace(shift, changes=np.zeros((4, 2)).tolist()) for shift in made.guidance.shifts],
    )
    assert_readable(leak_figure(dataclasses.replace(made, guidance=same)))


def sheet_of_guidance(seeds=3, prompt="solid black background"):
    pictures = np.random.default_rng(1).integers(0, 256, (3, seeds, 8, 8, 3), dtype=np.uint8)
    brightness = np.array([[100.0], [61.8], [255.0]]) + np.arange(seeds)
    names = ["no guidance", "CFG 5", "exposure-true guidance"]
    return guidance_sheet(pictures, names, brightness, prompt, range(seeds)), pictures


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("prompt", ["", "a very long prompt, masterpiece, best quality, " * 6])
def test_the_sheet_of_guidance_says_how_far_it_moved_each_picture(seeds, prompt):
    figure, pictures = sheet_of_guidance(seeds, prompt)
    for axes, picture in zip(figure.axes, pictures.reshape(-1, 8, 8, 3), strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), picture)
    assert {"100.0", "61.8 (-38.2)", "255.0 (+155.0)"} <= {text.get_text() for text in figure.texts}
    to_image(figure)
    for text in figure.texts:
        assert within(text.get_window_extent(), figure.bbox), text
    for a, b in itertools.combinations(figure.texts, 2):
        assert not overlap(a.get_window_extent(), b.get_window_extent()), (a, b)


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def texts_of(figure):
    """(text, axes) of all that is written; ticks beyond the ends of an axis are not."""
    for axes in figure.axes:
        found = [*axes.texts, axes.title, axes._left_title, axes._right_title]
        if axes.get_legend():
            found += axes.get_legend().get_texts()
        if axes.axison:
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                found.append(axis.label)
                found += [label for at, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
                          if low - 1e-9 <= at <= high + 1e-9]  # fmt: skip
        yield from ((text, axes) for text in found if text.get_visible() and text.get_text().strip())


def within(box, outer):
    return box.x0 >= outer.x0 and box.x1 <= outer.x1 and box.y0 >= outer.y0 and box.y1 <= outer.y1


def overlap(a, b):
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 0.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 0.5


def contrast(a, b):
    """WCAG 2's ratio of two colours' luminances."""

    def luminance(color):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
        return np.dot([0.2126, 0.7152, 0.0722], linear)

    high, low = sorted([luminance(a), luminance(b)], reverse=True)
    return (high + 0.05) / (low + 0.05)


def assert_readable(figure):
    """All words within the figure, none upon another or upon a neighbour's plot, large and dark or light enough."""
    to_image(figure)
    written = [(text, axes, text.get_window_extent()) for text, axes in texts_of(figure)]
    assert len(written) > 3
    for text, axes, box in written:
        assert within(box, figure.bbox), text
        assert text.get_fontsize() * figure.dpi / 72 * 400 / figure.bbox.width >= 8, text  # pixels, 400 wide
        assert contrast(text.get_color(), figure.get_facecolor()) >= 4.5, text
        for other in figure.axes:
            if other is not axes and other.axison:
                assert not overlap(box, other.bbox), (text, other)
    for (a, _, box), (b, _, other) in itertools.combinations(written, 2):
        assert not overlap(box, other), (a, b)
    legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    for legend in legends:
        own = set(legend.get_texts())
        assert within(legend.get_window_extent(), figure.bbox)
        for text, _, box in written:
            assert text in own or not overlap(box, legend.get_window_extent()), text


@pytest.mark.parametrize(("theme", "strip"), [("light", None), ("dark", STRIP)], ids=["light", "dark-strip"])
@pytest.mark.parametrize(
    "made",
    [
        {},
        {"kind": "starved", "channels": 1, "seeds": 2},
        {"kind": "plain", "channels": 3, "sampler": False},
        {"channels": 3, "seeds": 2, "reference": False},
        {"channels": 16, "start": 14.6},
        {"channels": 2, "checkpoint": False, "start": 4518.0},
        {"channels": 3, "guidance": "CFG 5"},
        {"channels": 3, "guidance": "CFG 12.5 with guidance nodes", "seeds": 2},
        {"channels": 1, "guidance": "CFG 5"},
    ],
    ids=str,
)
def test_every_word_of_a_report_can_be_read(made, theme, strip):
    figure = leak_figure(report(**made), theme=theme, strip=strip)
    assert_readable(figure)
    assert figure.bbox.width == 900


def test_long_verdicts_and_large_numbers_can_be_read():
    made = report(kind="starved", start=14.6)
    long = "zero-SNR model, but the sampler's steps are too coarse for the brightness of such a prompt, whose many " * 2
    answer = dataclasses.replace(made.checkpoint, sentence=f"{long}: " + "x0 at t = T follows the noise mean, " * 6)
    huge = [dataclasses.replace(p, picture_mean=-1.2345e7 * p.picture_mean) for p in made.sampler_probes]
    figure = leak_figure(dataclasses.replace(made, checkpoint=answer, sampler_probes=huge), strip=STRIP)
    assert_readable(figure)
    assert long[1:] in words(figure)


@pytest.mark.parametrize(("samples", "theme"), [(1, "dark"), (5, "light")])
@pytest.mark.parametrize("channels", [1, 3, 4, 16])
def test_every_word_of_a_run_can_be_read(channels, samples, theme):
    statistics, picture = run(samples, channels)
    assert_readable(run_figure(statistics, picture, theme=theme, strip=STRIP))
    broken = statistics.denoised_mean.copy()
    broken[2:] = np.nan
    assert_readable(run_figure(changed(statistics, denoised_mean=broken), picture, theme=theme))


def test_noise_levels_can_be_read_from_the_widest_range():
    statistics, picture = run()
    wide = np.array([math.inf, *np.geomspace(20000, 0.0292, len(statistics.sigmas) - 1)])
    figure = run_figure(changed(statistics, sigmas=wide), picture)
    assert_readable(figure)
    labels = [label.get_text() for label in panel(figure, "channel 1").get_xticklabels()]
    assert {"∞", "picture"} < set(labels)
    assert len(labels) >= 4


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_lines_stand_out_from_the_paper_and_from_each_other(theme):
    assert all(contrast(color, theme.paper) >= 3 for color in theme.lines)
    assert len(set(theme.lines)) == len(theme.lines)
    assert all(contrast(color, theme.paper) >= 4.5 for color in (theme.ink, theme.faint, theme.alarm))


def test_signs_differ_by_more_than_colour():
    plus, minus = measured(panel(leak_figure(report()), "channel 1"))
    assert plus.get_marker() != minus.get_marker()
    assert plus.get_linestyle() != minus.get_linestyle()


def test_drawing_leaves_pyplot_and_settings_alone():
    before = dict(matplotlib.rcParams)
    figure = leak_figure(report(checkpoint=False), theme="dark")
    image = to_image(figure)
    assert image.dtype == np.uint8
    assert image.shape == (round(figure.bbox.height), 900, 3)
    np.testing.assert_array_equal(image[0, 0], [0x35] * 3)
    assert np.unique(image.reshape(-1, 3), axis=0).shape[0] > 50
    assert dict(matplotlib.rcParams) == before
    process = multiprocessing.get_context("fork").Process(target=import_anew)  # what it forgets is there again here
    process.start()
    process.join()
    assert process.exitcode == 0


def import_anew():
    for name in [name for name in sys.modules if name.partition(".")[0] == "ztsnr" or name == "matplotlib.pyplot"]:
        del sys.modules[name]
    for name in ("leak_figure", "run_figure", "sheets"):
        importlib.import_module(f"ztsnr.diagnostics.{name}")
    assert "matplotlib.pyplot" not in sys.modules


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


def test_bad_input_is_one_sentence():
    statistics, picture = run()
    for draw in (lambda: leak_figure(report(), theme="solarized"), lambda: run_figure(statistics, theme="solarized")):
        with pytest.raises(ValueError, match=r"^theme must be one of light, dark, not 'solarized'$"):
            draw()
    with pytest.raises(ValueError, match=r"picture_mean must have the run's shape \(5, 4\), not \(4, 5\)"):
        run_figure(statistics, picture.T)
    none = {f.name: getattr(statistics, f.name)[:0] for f in dataclasses.fields(statistics)
            if f.name.split("_")[0] in ("sigmas", "state", "denoised")}  # fmt: skip
    with pytest.raises(ValueError, match="no step"):
        run_figure(changed(statistics, **none), picture)
    for pictures, sigmas in [
        (STRIP.pictures, [1.0]),
        (STRIP.pictures / 255, STRIP.sigmas),
        (STRIP.pictures[..., :2], STRIP.sigmas),
        (STRIP.pictures[:0], []),
    ]:
        with pytest.raises(ValueError, match="a strip needs pictures"):
            Strip(pictures, sigmas)
    for starts, seeds in [(["1"], [0, 1]), (["1", "2"], [0]), ([], [])]:
        with pytest.raises(ValueError, match="starts and"):
            start_sheet(np.zeros((2, 2, 4, 4, 3), np.uint8), starts, np.zeros((2, 2)), "", seeds)
