"""The number that stands for infinity in ComfyUI: other nodes calculate with it, and pictures stay right."""

import pytest

pytestmark = pytest.mark.comfyui

STAND_IN = 8192.0


@pytest.fixture(scope="module")
def found(inside):
    return inside("stand_in_inside.arithmetic")


def test_it_is_one_finite_number_everywhere(found):
    """Below 10000, at which the sliders of other packs end."""
    assert found["sigma_max"] == found["first"] == STAND_IN
    assert found["extended"][0] == STAND_IN
    assert all(after < before for before, after in zip(found["extended"], found["extended"][1:], strict=False))


@pytest.mark.parametrize("case", ["noise added by a node", "unit noise added by a node", "inf", "4518.76"])
def test_infinity_is_known_by_all_its_names(found, case):
    mean, texture, finite = found[case]
    assert finite
    assert mean == pytest.approx(1, abs=1e-5)
    assert texture == pytest.approx(1, abs=1e-5)


def test_steps_between_infinity_and_the_first_finite_sigma(found):
    """ExtendIntermediateSigmas puts some there; a first-order run with more steps, so not the same picture."""
    mean, texture, finite = found["ExtendIntermediateSigmas"]
    assert finite
    assert mean == pytest.approx(1, abs=0.005)
    assert texture == pytest.approx(1, abs=0.05)


def test_samplers_that_read_the_range_of_noise(found):
    mean, texture, finite = found["Brownian"]
    assert finite
    assert mean == pytest.approx(1, abs=0.05)
    assert 0.7 < texture < 1.5


def test_a_picture_is_unsampled_and_sampled_again(inside):
    back = inside("stand_in_inside.unsampling")
    assert back["noise"] == pytest.approx(1, abs=0.1)
    assert back["difference"] < 0.05


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_latent_of_no_numbers_is_refused(inside, value):
    assert "The latent contains NaN or infinity" in inside("stand_in_inside.broken_latent", value=value)


@pytest.mark.parametrize("sampler", ["dpmpp_sde", "dpmpp_2m_sde"])
def test_two_stages_do_not_share_their_fresh_noise(inside, sampler):
    assert inside("stand_in_inside.brownian_stages", sampler=sampler, split=4) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("cfg", [1.0, 1.5])
@pytest.mark.parametrize(
    "sampler",
    ["euler_cfg_pp", "dpmpp_2m_cfg_pp", "res_multistep_cfg_pp", "gradient_estimation_cfg_pp"],
)
def test_cfg_plus_plus_samplers_begin_at_their_own_limit(inside, about, sampler, cfg):
    if sampler not in about["samplers"]:
        pytest.skip(f"ComfyUI {about['version']} has no sampler {sampler}")
    """ComfyUI's finite start itself is off by about 1 level of 255."""
    ours, stock = inside("stand_in_inside.cfg_pp", sampler=sampler, cfg=cfg)
    assert ours == pytest.approx(stock, abs=1.6)


def test_model_sampling_discrete_in_front_is_taken_over_and_behind_is_told(inside):
    found = inside("stand_in_inside.model_sampling_discrete")
    assert found["in front"] < 1e-6
    ((level, sentence),) = found["said behind"]
    assert level == "WARNING"
    assert "has replaced its exact schedule" in sentence
