"""The names that stay: other people's code calls them, so a call of today works tomorrow."""
import importlib
import inspect
import re
import subprocess
import sys
from configparser import ConfigParser

import pytest
from conftest import ROOT, clean_env

import iddpm_nb

# module: functions as they were promised; `=...` is some default. More parameters may follow.
PROMISED = {
    "forward": """Schedule.from_betas(beta, t_model=None)  Schedule.to(self, device)
        linear_betas(T)  at(table, t, like)  q_mean_var(s, x0, t)  q_sample(s, x0, t, eps)""",
    "schedule": """cosine_alpha_bar(u, s=0.008)  betas_from_alpha_bar(alpha_bar, T, max_beta=0.999)
        cosine_betas(T)  make_schedule(name, T, rescale_t=True)""",
    "posterior": """posterior_mean(s, x0, xt, t)  posterior_logvar(s, t, like)
        x0_from_eps(s, xt, t, eps)  eps_from_x0(s, xt, t, x0)  ideal_eps(s, data, xt, t)""",
    "variance": """ideal_out(s, data, xt, t)  fixed_logvar(s, t, like, kind)
        learned_logvar(s, u, t)  p_gaussian(s, out, xt, t, clip_x0=False, variance="learned")""",
    "losses": """normal_kl(mean1, logvar1, mean2, logvar2)
        discretized_gaussian_nll(x, mean, logvar)  prior_term(s, x0)
        vlb_term(s, out, x0, xt, t, clip_x0=False, variance="learned")
        l_simple(out, eps)  l_vlb(s, out, x0, xt, t, variance="learned")
        l_hybrid(s, out, x0, xt, t, eps, lam=0.001)""",
    "importance": """UniformSampler(T)
        LossSecondMomentSampler(T, history=10, uniform_prob=0.001)""",
    "unet": """UNet(in_channels, out_channels, channels, mult, num_res_blocks, attn_resolutions,
        image_size, num_heads=4, dropout=0.0, num_classes=None, scale_shift=True, groups=32)
        UNet.forward(self, x, t, y=None)""",
    "sampling": """space_timesteps(T, spec)  respace(s, keep)
        ddpm_step(s, out, xt, t, noise, clip_x0=True, variance="learned")
        ddim_step(s, out, xt, t, noise, eta=0.0, clip_x0=True)
        sample(net, s, shape, steps=None, method="ddpm", eta=0.0, generator=None, cond=None,
        progress=True)""",
    "likelihood": """bits_per_dim(net, s, x0, clip_x0=True, variance="learned",
        num_t=None, generator=None, cond=None, chunk=256, progress=False)""",
    "interop": """load_openai(path, preset=None, device="cpu")""",
    "running.model": """load(path, weights="", device="cpu", preset=None)
        Model.sample(self, n=64, steps=50, seed=0)
        Model.bits_per_dim(self, images, num_t=None, seed=0, cond=None, chunk=None)""",
}
SAMPLERS = "UniformSampler", "LossSecondMomentSampler"     # each has these
SAMPLER = """probs(self)  sample(self, batch, generator=None, device=None)
             update(self, t, losses)  state_dict(self)  load_state_dict(self, state)"""
PARTS = {  # what is read from a value, in this order
    "forward:Schedule": "beta alpha alpha_bar alpha_bar_prev beta_tilde t_model",
    "variance:Gaussian": "mean logvar x0_hat",
    "likelihood:Bits": "total terms prior decoder",
    "running.model:Model": "net schedule config"}
TOP = ("load load_openai to_openai to_diffusers sample bits_per_dim UNet Schedule make_schedule "
       "train_run Config").split()
COMMANDS = "iddpm_train iddpm_sample iddpm_eval iddpm_convert iddpm_tables iddpm_workbook".split()


def functions(text):
    "name and parameters of each promise."
    return re.findall(r"([\w.]+)\(([^)]*)\)", text)


def everything():
    "module:name, parameters."
    for module, text in PROMISED.items():
        for name, parameters in functions(text):
            yield f"{module}:{name}", parameters
    for name, parameters in functions(SAMPLER):
        for kind in SAMPLERS:
            yield f"importance:{kind}.{name}", parameters


def found(place):
    "What stands in a module: module:name."
    module, _, path = place.partition(":")
    thing = importlib.import_module(f"iddpm_nb.{module}")
    for part in path.split("."):
        thing = getattr(thing, part)
    return thing


def promise(parameters):
    exec(f"def f({parameters}): pass", made := {})
    return inspect.signature(made["f"])


def calls(want):
    "Each way to call it: so many by place and the others by name, with all optional ones or none."
    names = list(want.parameters)
    need = [n for n, p in want.parameters.items() if p.default is p.empty]
    for k in range(len(names) + 1):
        yield names[:k], {n: n for n in names[k:]}
        yield names[:k], {n: n for n in names[k:] if n in need}


def check_signature(f, parameters):
    "Every call that was promised arrives, each value at its name, and the defaults are the same."
    want, has = promise(parameters), inspect.signature(f)
    for places, named in calls(want):
        arrived = has.bind(*places, **named).arguments
        assert arrived == dict(zip(places, places)) | named, f"{f}: {has}"
    for name, p in want.parameters.items():
        if p.default in (p.empty, ...): continue
        assert repr(has.parameters[name].default) == repr(p.default), f"{name} of {f}: {has}"


@pytest.mark.parametrize("place, parameters", list(everything()), ids=lambda x: x.split("(")[0])
def test_names_and_signatures(place, parameters):
    check_signature(found(place), parameters)


def test_the_table_is_read_whole():
    places = [place for place, _ in everything()]
    assert len(places) == len(set(places)) == 50, len(places)
    promises = sum(text.count("(") for text in PROMISED.values())
    assert promises + 2 * SAMPLER.count("(") == len(places)


@pytest.mark.parametrize("broken", [
    "s, x0, t, clip=True", "s, x0, t, noise, clip=True", "x0, s, t, eps, clip=True",
    "s, x0, t, eps", "s, x0, t, eps, clip=False", "s, x0, t, eps, clip=1", "s, x0, t, eps, clip",
    "s, x0, t, eps, more, clip=True", "s, x0, t, eps, clip=True, *, more",
    "s, x0, t, eps, more=1, clip=True", "s, x0, t, *, eps, clip=True",
    "s, x0, t, eps, *, clip=True", "s, x0, t, eps, /, clip=True",
    "s, x0, t, eps, **clip", "s, x0, t, *eps, clip=True"])
def test_a_broken_promise_is_noticed(broken):
    exec(f"def f({broken}): pass", made := {})
    with pytest.raises((AssertionError, TypeError)):
        check_signature(made["f"], "s, x0, t, eps, clip=True")


def test_more_may_follow():
    def f(s, x0, t, eps=0, clip=True, more=1, **rest): pass
    check_signature(f, "s, x0, t, eps, clip=True")
    check_signature(lambda n=64, steps=50: None, "n, steps=...")
    with pytest.raises(TypeError):
        check_signature(lambda n, steps: None, "n, steps=...")


@pytest.mark.parametrize("place", PARTS)
def test_parts_of_values(place):
    "Named tuples are unpacked, so there the order counts; more may follow."
    names, kind = PARTS[place].split(), found(place)
    has = list(getattr(kind, "_fields", None) or kind.__dataclass_fields__)
    assert has[:len(names)] == names


def test_the_top_level():
    for name in TOP:
        assert callable(getattr(iddpm_nb, name)) and name in iddpm_nb.__all__
    for name in iddpm_nb.__all__:
        assert callable(getattr(iddpm_nb, name))
    for name in iddpm_nb.interop.__all__:
        assert callable(getattr(iddpm_nb.interop, name))
    assert iddpm_nb.interop.load_openai is iddpm_nb.load_openai
    homes = {"load": "running.model", "sample": "sampling", "UNet": "unet", "Schedule": "forward",
             "bits_per_dim": "likelihood", "make_schedule": "schedule"}
    for name, home in homes.items():
        assert getattr(iddpm_nb, name) is found(f"{home}:{name}")


@pytest.mark.parametrize("module", ["iddpm_nb", "iddpm_nb.interop"])
def test_a_wrong_name_is_refused(module):
    with pytest.raises(AttributeError, match=f"{module}.*nothing"):
        importlib.import_module(module).nothing
    with pytest.raises(ImportError, match="nothing"):
        exec(f"from {module} import nothing")


@pytest.mark.parametrize("line, other, there", [
    ("import iddpm_nb", "torch", False), ("import iddpm_nb.interop", "torch", False),
    ("from iddpm_nb import load, load_openai, to_openai", "diffusers", False),
    ("import iddpm_nb.interop.openai", "diffusers", False),
    ("from iddpm_nb.interop import load_openai, to_openai", "diffusers", False),
    ("import iddpm_nb.running.run, iddpm_nb.cli.sample", "diffusers", False),
    ("import iddpm_nb.forward", "torch", True),      # what is asked for is there
    ("from iddpm_nb.interop import to_diffusers", "diffusers", True)])
def test_what_is_not_asked_for_is_not_imported(line, other, there):
    asked = f"{line}; import sys; print({other!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True,
                          env=clean_env(PYTHONPATH=":".join(sys.path)), check=True)
    assert done.stdout.strip() == str(there)


def test_commands_keep_their_names():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    scripts = dict(entry.split("=") for entry in config["DEFAULT"]["console_scripts"].split())
    assert list(scripts) == COMMANDS
    for name, place in scripts.items():
        module, _, function = place.partition(":")
        command = getattr(importlib.import_module(module), function)
        assert inspect.isfunction(command) and command.__name__ == name


def modules():
    "Every module of the package, by its name within it."
    root = ROOT / "iddpm_nb"
    for path in sorted(root.rglob("*.py")):
        if not path.name.startswith("_"):
            yield path.relative_to(root).with_suffix("").as_posix().replace("/", ".")


def test_public_names_are_few_documented_and_one_thing_each():
    public = {name: importlib.import_module(f"iddpm_nb.{name}") for name in modules()}
    names = [n for module in public.values() for n in module.__all__]
    assert len(names) == len(set(names)) <= 160, len(names)
    for module in public.values():
        for n in module.__all__:
            thing = getattr(module, n)
            if not callable(thing): continue
            assert inspect.getdoc(thing), f"{module.__name__}.{n}"
            if inspect.isfunction(thing) and not n.startswith("iddpm_"):    # these are wrapped
                for p in inspect.signature(thing).parameters.values():
                    more = p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
                    assert more or p.annotation is not p.empty, f"{module.__name__}.{n}({p.name})"
    for place, _ in everything():
        module, _, name = place.partition(":")
        if module in public: assert name.partition(".")[0] in public[module].__all__, place


def test_a_name_means_one_thing_in_the_whole_package():
    homes = {}
    for name in modules():
        module = importlib.import_module(f"iddpm_nb.{name}")
        for n, thing in vars(module).items():
            own = getattr(thing, "__module__", "") == module.__name__
            if own and (inspect.isfunction(thing) or inspect.isclass(thing)):
                homes.setdefault(n, []).append(name)
    assert len(homes) > 400
    assert {n: places for n, places in homes.items() if len(places) > 1} == {}


def test_what_was_not_promised_goes_by_name():
    "Nothing that may move tomorrow is taken by place today."
    by_place = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    others = ("train:train_step", "s x0 net opt t weights eps loss cond"), (
        "train:train", "run s steps loss lr warmup anneal"), (
        "sampling:chain", "net s x how generator cond"), (
        "conditioning.upsampler:cascade", "base upsampler n steps_base steps_up seed y")
    promised = [(place, re.findall(r"(\w+)(?:=[^,]*)?", re.sub(r"\s", "", p)))
                for place, p in everything()]
    for place, names in [*promised, *((place, p.split()) for place, p in others)]:
        has = inspect.signature(found(place)).parameters.values()
        loose = [p.name for p in has if p.kind in by_place and p.name not in names]
        assert not loose, f"{place} takes {', '.join(loose)} by place, which nobody promised"
