"""The names that stay: other people's code calls them, so what a call says today it may say tomorrow."""
import importlib
import inspect
import subprocess
import sys

import pytest
from conftest import clean_env

import iddpm_nb

# module -> function(parameters), as they were promised; `=` marks one with a default. More may follow behind.
PROMISED = """
forward        Schedule.from_betas(beta, t_model=)  linear_betas(T)  at(table, t, like)
forward        q_mean_var(s, x0, t)  q_sample(s, x0, t, eps)
schedule       cosine_alpha_bar(u, s=)  betas_from_alpha_bar(alpha_bar, T, max_beta=)
schedule       cosine_betas(T)  make_schedule(name, T, rescale_t=)
posterior      posterior_mean(s, x0, xt, t)  posterior_logvar(s, t, like)
posterior      x0_from_eps(s, xt, t, eps)  eps_from_x0(s, xt, t, x0)  ideal_eps(s, data, xt, t)
variance       ideal_out(s, data, xt, t)  fixed_logvar(s, t, like, kind)  learned_logvar(s, u, t)
variance       p_gaussian(s, out, xt, t, clip_x0=, variance=)
losses         normal_kl(mean1, logvar1, mean2, logvar2)  discretized_gaussian_nll(x, mean, logvar)
losses         vlb_term(s, out, x0, xt, t, clip_x0=, variance=)  prior_term(s, x0)
losses         l_simple(out, eps)  l_vlb(s, out, x0, xt, t)  l_hybrid(s, out, x0, xt, t, eps, lam=)
importance     UniformSampler(T)  LossSecondMomentSampler(T, history=, uniform_prob=)
unet           UNet(in_channels, out_channels, channels, mult, num_res_blocks, attn_resolutions, image_size)
sampling       space_timesteps(T, spec)  respace(s, keep)
sampling       ddpm_step(s, out, xt, t, noise, clip_x0=, variance=)
sampling       ddim_step(s, out, xt, t, noise, eta=, clip_x0=)  sample(net, s, shape, steps=)
likelihood     bits_per_dim(net, s, x0, clip_x0=, variance=)
interop        load_openai(path, preset=)
running.model  load(path)  Model.sample(self, n=, steps=)  Model.bits_per_dim(self, images)
"""
# parameters that are given by name, wherever they stand
NAMED = {"unet.UNet": "num_heads dropout num_classes scale_shift",
         "sampling.sample": "method eta generator cond progress variance",
         "likelihood.bits_per_dim": "num_t generator cond progress"}
TOP = ("load load_openai to_openai to_diffusers sample bits_per_dim UNet Schedule make_schedule "
       "train_run Config").split()
SAMPLER = {"probs": (), "sample": ("batch", "generator", "device"), "update": ("t", "losses"),
           "state_dict": (), "load_state_dict": ("state",)}


def promised():
    "module, path of the name in it, parameters."
    for line in PROMISED.strip().splitlines():
        module, _, rest = line.partition(" ")
        for call in rest.strip().split("  "):
            name, _, parameters = call.strip().rstrip(")").partition("(")
            yield module, name, parameters.split(", ") if parameters else []


def found(module, name):
    thing = importlib.import_module(f"iddpm_nb.{module}")
    for part in name.split("."): thing = getattr(thing, part)
    return thing


def check_signature(f, parameters):
    "The parameters come first, in this order, and those with a default keep one."
    has = list(inspect.signature(f).parameters.values())
    assert [p.name for p in has[:len(parameters)]] == [p.rstrip("=") for p in parameters], has
    for asked, p in zip(parameters, has):
        assert asked.endswith("=") == (p.default is not p.empty), f"{p.name} of {has}"
        assert p.kind is p.POSITIONAL_OR_KEYWORD
    for p in has[len(parameters):]:
        assert p.default is not p.empty or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL), p


@pytest.mark.parametrize("module, name, parameters", list(promised()), ids=str)
def test_names_and_signatures(module, name, parameters):
    check_signature(found(module, name), parameters)


@pytest.mark.parametrize("place", NAMED)
def test_what_is_given_by_name(place):
    has = inspect.signature(found(*place.rsplit(".", 1))).parameters
    for name in NAMED[place].split(): assert has[name].default is not inspect.Parameter.empty


@pytest.mark.parametrize("broken", [
    "def f(s, x0, t): pass", "def f(s, x0, t, noise): pass", "def f(x0, s, t, eps): pass",
    "def f(s, x0, t, eps=0): pass", "def f(s, x0, t, eps, more): pass",
    "def f(s, x0, t, *, eps): pass"])
def test_a_broken_promise_is_noticed(broken):
    exec(broken, made := {})
    with pytest.raises(AssertionError): check_signature(made["f"], ["s", "x0", "t", "eps"])


def test_more_may_follow():
    check_signature(lambda s, x0, t, eps, more=1, **rest: None, ["s", "x0", "t", "eps"])


@pytest.mark.parametrize("kind", ["UniformSampler", "LossSecondMomentSampler"])
def test_samplers(kind):
    for name, parameters in SAMPLER.items():
        has = list(inspect.signature(getattr(found("importance", kind), name)).parameters)
        assert tuple(has[1:len(parameters) + 1]) == parameters, (name, has)


def test_the_top_level():
    for name in TOP: assert callable(getattr(iddpm_nb, name)) and name in iddpm_nb.__all__
    assert iddpm_nb.interop.load_openai is iddpm_nb.load_openai
    with pytest.raises(AttributeError, match="nothing"): iddpm_nb.nothing
    with pytest.raises(AttributeError, match="nothing"): iddpm_nb.interop.nothing


@pytest.mark.parametrize("line, without", [
    ("import iddpm_nb", "torch"), ("import iddpm_nb.interop", "torch"),
    ("from iddpm_nb import load, load_openai", "diffusers"),
    ("import iddpm_nb.running.run, iddpm_nb.cli.sample", "diffusers")])
def test_what_is_not_asked_for_is_not_imported(line, without):
    asked = f"{line}; import sys; print({without!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True,
                          env=clean_env(PYTHONPATH=":".join(sys.path)), check=True)
    assert done.stdout.strip() == "False"
