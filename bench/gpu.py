"""Everything that is wanted on a GPU, in three parts that run by themselves.

  --part 1   is it right: tests/test_cuda.py (a step that waits for nothing, bfloat16, TF32,
             compiling, CUDA graphs, a run moved to the CPU and back to the bit, several GPUs,
             memory) and the tests of faults
  --part 2   is it fast: the networks of CIFAR-10 and ImageNet-64 beside diffusers and
             denoising-diffusion-pytorch (bench/run.py), the share of the measured matrix product
             that is reached, and a profile of what bounds a training step
  --part 3   does it learn: CIFAR-10 (an .npz: --data), C = 64, 3 blocks, L_hybrid, cosine,
             T = 4000, trained as long as the limit allows; grids with 25, 50, 100 and 250 steps,
             bits per dimension, and the weights in bfloat16, in parts of less than 16 MB

Each part checks the machine first, keeps to --limit, writes its records to --out, and prints a
short table at the end. --dry runs it at a tiny size on the CPU: its figures mean nothing.

  python bench/gpu.py --part 1 --out gpu
  python bench/gpu.py --part 3 --data cifar10.npz --out gpu --limit 540
  python bench/gpu.py --join gpu/weights --out model.safetensors      # the parts as one model file
"""
import argparse
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]
PART_OF_WEIGHTS = 15_500_000    # bytes, at most


def left(a):
    "Seconds until the limit."
    return a.end - time.monotonic()


def child(a, args, seconds, log):
    """A Python process that ends in time: after `seconds` it is asked to (SIGTERM), a minute later
    it is killed. -> its exit status, or None if it had to be asked."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "TQDM_DISABLE": "1", "MPLBACKEND": "agg"}
    with open(a.out / log, "w") as f:
        p = subprocess.Popen([sys.executable, *map(str, args)], cwd=ROOT, env=env, stdout=f,
                             stderr=subprocess.STDOUT)
        try:
            return p.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            p.send_signal(signal.SIGTERM)
        try:
            p.wait(60)
        except subprocess.TimeoutExpired:
            p.kill()
            p.wait()


# ---- what is checked first ----

def step_once(device):
    "One step of a tiny network -> its loss."
    import contenders
    it = contenders.Ours(contenders.SIZES["tiny"], device, "float32", "off")
    return float(it.training()()["losses"].mean())


def check_data(path):
    "The images of part 3, or a sentence."
    import numpy as np
    if not path or not Path(path).is_file():
        sys.exit("part 3 trains on CIFAR-10: name an .npz with --data (images uint8 (N,32,32,3))")
    with np.load(path) as f:
        shapes = {k: f[k].shape for k in f.files}
    if not any(len(v) == 4 for v in shapes.values()):
        sys.exit(f"{path} holds no images (N,H,W,3) but {shapes}")
    return {k: list(v) for k, v in shapes.items()}


def check(a):
    "The machine, in the first seconds: it is there, it computes, it has what the part needs."
    import torch
    if a.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA device here: --dry runs each part at a tiny size on the CPU")
    about = {"torch": torch.__version__, "cuda": torch.version.cuda, "cores": os.cpu_count(),
             "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "dry": a.dry}
    if a.device == "cuda":
        p = torch.cuda.get_device_properties(0)
        about |= {"device": p.name, "memory_gb": round(p.total_memory / 1e9, 1),
                  "devices": torch.cuda.device_count(),
                  "free_gb": round(torch.cuda.mem_get_info()[0] / 1e9, 1)}
    x = torch.randn(256, 256, device=a.device)
    error = (x @ x - (x.double() @ x.double())).abs().max().item()
    if not error < 0.5: sys.exit(f"this device computes wrongly: a product is off by {error}")
    about |= {"product_off_by": error, "first_loss": step_once(a.device)}
    if not about["first_loss"] < 10: sys.exit(f"the first loss is {about['first_loss']}")
    if a.part == 1:
        import pytest
        about["pytest"] = pytest.__version__
    if a.part == 3: about["data"] = check_data(a.data)
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "machine.json").write_text(json.dumps(about, indent=1))
    print(json.dumps(about), flush=True)
    return about


# ---- part 1 ----

def outcomes(path):
    "Test by test, what pytest wrote."
    found = {}
    for case in ET.parse(path).getroot().iter("testcase"):
        bad = [x for x in case if x.tag in ("failure", "error", "skipped")]
        name = f"{case.get('classname', '').split('.')[-1]}::{case.get('name')}"
        found[name] = {"outcome": bad[0].tag if bad else "passed",
                       "seconds": float(case.get("time")),
                       "why": (bad[0].get("message") or "")[:500] if bad else ""}
    return found


def right(a, about):
    "Part 1."
    xml = a.out / "tests.xml"
    which = (["tests/test_cuda.py", "-k", "to_the_bit and cpu and uniform"] if a.dry
             else ["tests/test_cuda.py", "tests/test_faults.py", "-k", "not gpu_file"])
    child(a, ["-m", "pytest", "-q", "-rfEs", "-p", "no:cacheprovider", f"--junitxml={xml}",
              *which], left(a) - 60, "tests.log")
    found = outcomes(xml) if xml.exists() else {}
    count = {k: sum(t["outcome"] == k for t in found.values())
             for k in ("passed", "failure", "error", "skipped")}
    rows = [(k, n) for k, n in count.items()]
    rows += [(name, t["why"].splitlines()[0][:90] if t["why"] else t["outcome"])
             for name, t in found.items() if t["outcome"] in ("failure", "error")]
    if not found: rows.append(("tests", "no report was written: see tests.log"))
    return rows, {"tests": found, "count": count}


# ---- part 2 ----

KINDS = {  # what a kernel is, by its name; the first that fits
    "optimizer, averages, gradient length": "adam|lerp|foreach|multi_tensor|lpnorm",
    "norms and elementwise, fused by the compiler": "^triton_(?!tem)",
    "attention": "flash|fmha|attention|softmax", "norms": "norm",
    "convolutions and products":
        "conv|gemm|cutlass|xmma|cudnn|cublas|addmm|matmul|::mm|bmm|wgrad|dgrad|triton_tem",
    "copies": "memcpy|memset|copy"}


def kind_of(kernel):
    return next((k for k, v in KINDS.items() if re.search(v, kernel.lower())), "other elementwise")


def profile(size, device, out, steps=5):
    "What a training step of ours spends its time on; runs in a process of its own."
    import torch
    import contenders
    from torch.profiler import ProfilerActivity
    cuda = device == "cuda"
    it = contenders.make("ours", contenders.SIZES[size], device)
    step, wait = it.training(), torch.cuda.synchronize if cuda else lambda: None
    for _ in range(5 if cuda else 1):
        step()
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    plain = (time.perf_counter() - start) / steps
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=kinds) as seen:
        for _ in range(steps):
            step()
        wait()
    events = seen.key_averages()
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    busy, calls = {}, 0
    for e in events:
        spent = getattr(e, key) / 1e6 / steps
        on_device = not cuda or str(e.device_type).endswith("CUDA")
        if not spent or not on_device or e.key.startswith("ProfilerStep"): continue
        busy[kind_of(e.key)] = busy.get(kind_of(e.key), 0) + spent
        calls += e.count / steps
    (out / f"profile_{size}.txt").write_text(events.table(sort_by=key, row_limit=40))
    (out / f"profile_{size}.json").write_text(json.dumps(
        {"seconds_a_step": plain, "kernels_a_step": calls, "busy": busy,
         "device_busy": sum(busy.values()) / plain, "precision": it.precision,
         "batch": it.c["batch"]}, indent=1))


def fitting_batch(size, about):
    "The largest batch, halving the paper's, with which all contenders fit beside each other."
    import torch
    import contenders
    from iddpm_nb.data import Images
    from iddpm_nb.training.config import PRESETS, describe
    from iddpm_nb.training.memory import training_memory
    c, batch = PRESETS[size], contenders.SIZES[size]["batch"]
    one = Images(torch.zeros(1, 3, c.data.image_size or 32, c.data.image_size or 32,
                             dtype=torch.uint8))
    def need(batch):
        each = {p: training_memory(describe(dataclasses.replace(c, train=dataclasses.replace(
            c.train, batch=batch, precision=p)), one), "cuda") for p in ("float32", "bfloat16")}
        return 3 * each["bfloat16"] + 3 * each["float32"]
    while batch > 1 and need(batch) > 0.85e9 * about["free_gb"]:
        batch //= 2
    return batch


def told_profile(size, d):
    rows = [(f"{size}: a step of {d['batch']} images, {d['precision']}",
             f"{1000 * d['seconds_a_step']:.1f} ms, {d['kernels_a_step']:.0f} kernels, "
             f"device busy {d['device_busy']:.0%}")]
    total = sum(d["busy"].values()) or 1
    return rows + [(f"{size}:   {k}", f"{v / total:.0%}")
                   for k, v in sorted(d["busy"].items(), key=lambda kv: -kv[1])]


def told_bench(size, d):
    rows = []
    for kind in ("train", "sample"):
        for name in d["contenders"]:
            it = d[kind][name]
            if not it.get("rates"):
                rows.append((f"{size}: {kind}, {name}", f"not run ({it.get('not_run', '')})"))
                continue
            share = it.get(f"share_of_{it['precision']}_product")
            ratio = it.get("ours_is_faster_by")
            rows.append((f"{size}: {kind}, {name}", f"{it['images_per_s']:.1f} images/s"
                         + (f", {share:.0%} of the matrix product" if share else "")
                         + (f", ours is faster by {ratio['median']:.2f}" if ratio else "")))
    return rows


def fast(a, about):
    "Part 2."
    rows, record = [], {}
    sizes = ["tiny"] if a.dry else a.sizes.split(",")
    for i, size in enumerate(sizes):
        share = max(left(a) / (len(sizes) - i), 30)          # seconds for this network
        end = time.monotonic() + share
        child(a, [__file__, "--profile", size, "--device", a.device, "--out", a.out],
              share / 3, f"profile_{size}.log")
        found = a.out / f"profile_{size}.json"
        record[size] = {"profile": json.loads(found.read_text()) if found.exists() else "not run"}
        if found.exists(): rows += told_profile(size, record[size]["profile"])
        else: rows.append((f"{size}: profile", f"not run: see profile_{size}.log"))
        out = a.out / f"bench_{size}.json"
        args = [HERE / "run.py", "--size", size, "--device", a.device, "--out", out,
                "--only", "nobody else" if a.dry else "diffus", "--until",
                max(end - time.monotonic() - 60, 10), "--repeats", 1 if a.dry else 5,
                "--train-steps", 1 if a.dry else 10, "--steps", 2 if a.dry else 20,
                "--warmup", 1 if a.dry else 5, "--threads", 1 if a.dry else 0]
        args += [x for p in a.peers for x in ("--peers", p)]
        if not a.dry: args += ["--batch", fitting_batch(size, about)]
        child(a, args, end - time.monotonic(), f"bench_{size}.log")
        record[size]["bench"] = json.loads(out.read_text()) if out.exists() else "not run"
        if out.exists(): rows += told_bench(size, record[size]["bench"])
        else: rows.append((f"{size}: beside others", f"not run: see bench_{size}.log"))
    return rows, record


# ---- part 3 ----

REAL = ("--channels 64 --mult 1 2 2 2 --num-res-blocks 3 --attn-resolutions 16 8 --num-heads 4 "
        "--groups 8 --dropout 0.1 --T 4000 --schedule cosine --loss hybrid --batch 128 --lr 3e-4 "
        "--warmup 500 --no-anneal --ema 0.999 --flip --log-every 50 --save-every 2000 --keep 1")
TINY = ("--channels 16 --mult 1 2 --num-res-blocks 1 --attn-resolutions 8 --num-heads 2 --groups 8 "
        "--T 40 --schedule cosine --loss hybrid --batch 8 --lr 1e-3 --warmup 2 --no-anneal "
        "--ema 0.9 --log-every 1 --save-every 1000 --keep 1")
TRAIN = "from iddpm_nb.cli.train import iddpm_train; iddpm_train()"


def tiny_images(path):
    "Some images for the dry run."
    import numpy as np
    x = np.random.default_rng(0).integers(0, 256, (64, 16, 16, 3), dtype=np.uint8)
    np.savez(path, images=x)
    return path


def write_weights(source, folder):
    "A model file in bfloat16, in parts that each hold some of its tensors."
    import safetensors.torch
    import torch
    from iddpm_nb.training.checkpoint import read_model
    tensors, config = read_model(source)
    parts, size = [{}], 0
    for k, v in tensors.items():
        v = v.to(torch.bfloat16).contiguous()
        if size and size + v.nbytes > PART_OF_WEIGHTS:
            parts.append({})
            size = 0
        parts[-1][k] = v
        size += v.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    for i, some in enumerate(parts, 1):
        safetensors.torch.save_file(some, folder / f"{i}-of-{len(parts)}.safetensors",
                                    {"format": "pt", "iddpm_nb": json.dumps(config)})
    return len(parts)


def join(folder, out):
    "The parts as one file, which `load` and the commands read."
    import safetensors
    import safetensors.torch
    files = sorted(Path(folder).glob("*-of-*.safetensors"))
    if not files or len(files) != int(files[0].stem.split("-")[-1]):
        sys.exit(f"{folder} does not hold all parts of a model: there are {len(files)} files")
    tensors = {}
    for f in files:
        tensors |= safetensors.torch.load_file(f)
    with safetensors.safe_open(files[0], "pt") as f:
        safetensors.torch.save_file(tensors, out, f.metadata())
    print(f"{len(files)} parts, {len(tensors)} tensors: {out}")


def drawn(a, model, n):
    "A grid for each number of steps, and what it took."
    import torch
    from PIL import Image
    from iddpm_nb.pictures import image_grid
    found, wait = {}, torch.cuda.synchronize if a.device == "cuda" else lambda: None
    for steps in (5, 10) if a.dry else (25, 50, 100, 250):
        if found and left(a) < 3 * found[max(found)]["seconds"] + 20: break
        start = time.perf_counter()
        x = model.sample(n, steps, seed=0)
        wait()
        found[steps] = {"seconds": time.perf_counter() - start, "n": n}
        grid = image_grid(x.cpu(), 10).permute(1, 2, 0).numpy()
        Image.fromarray(grid).save(a.out / f"samples_{steps}_steps.png")
    return found


def last_of(folder):
    "The last logged lines of a run."
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return ([r for r in rows if "loss" in r][-1], [r for r in rows if "held_out" in r][-1:])


def learns(a, about):
    "Part 3."
    from iddpm_nb.images.folders import open_sets
    from iddpm_nb.running.model import load
    run = (a.run or a.out / "run").resolve()
    after = 3 if a.dry else 120                            # seconds for what follows the training
    if run.exists(): sys.exit(f"{run} is taken: choose another --out, or --run")
    start, what = time.monotonic(), (TINY if a.dry else REAL).split()
    child(a, ["-c", TRAIN, "--data", Path(a.data).resolve(), "--out", run, "--device", a.device,
              "--steps", 20 if a.dry else 10_000_000, *what], left(a) - after, "train.log")
    seconds = time.monotonic() - start
    shutil.copy(run / "metrics.jsonl", a.out / "metrics.jsonl")
    row, held_row = last_of(run)
    record = {"seconds": seconds, "last": row, "held_out": held_row, "options": what}
    model = load(run, device=a.device).quick("auto")
    record["grids"] = drawn(a, model, 4 if a.dry else 100)
    held = open_sets(str(a.data))[1]
    b = model.bits_per_dim(held.images[:4 if a.dry else 1000], num_t=12 if a.dry else 74)
    record["bits_per_dim"], record["stderr"] = b.total.mean().item(), b.stderr
    source = sorted((run / "checkpoints").glob("[0-9]*/ema_*.safetensors"))[-1]
    record["parts"] = write_weights(source, a.out / "weights")
    rows = [("steps", row["step"]), ("seconds, starting and compiling included", f"{seconds:.0f}"),
            ("images/s at the end", f"{row.get('images_per_s', float('nan')):.0f}"),
            ("loss at the end", f"{row['loss']:.4f}"),
            *[(f"{v['n']} samples, {k} steps", f"{v['seconds']:.1f} s")
              for k, v in record["grids"].items()],
            ("held-out bits/dim", f"{record['bits_per_dim']:.3f} +- {b.stderr:.3f}"),
            ("weights, in bfloat16", f"{record['parts']} files in {a.out / 'weights'}")]
    return rows, record


# ---- all parts ----

def options():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--part", type=int, choices=(1, 2, 3), help="which part")
    p.add_argument("--out", type=Path, default=Path("gpu"), help="folder of the records "
                   "(with --join: the model file)")
    p.add_argument("--limit", type=float, default=540, help="seconds for the part, at most")
    p.add_argument("--data", default=None, help="part 3: CIFAR-10 as an .npz")
    p.add_argument("--run", type=Path, default=None, help="part 3: folder of the training, with "
                   "weights and optimizer (hundreds of MB); by default OUT/run")
    p.add_argument("--sizes", default="cifar10,imagenet64",
                   help="part 2: networks, comma-separated")
    p.add_argument("--peers", action="append", default=[], help="part 2: a folder with diffusers "
                   "or denoising-diffusion-pytorch; may be given several times")
    p.add_argument("--dry", action="store_true", help="a tiny size on the CPU")
    p.add_argument("--join", metavar="FOLDER", help="put the weights of part 3 together again")
    p.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    p.add_argument("--profile", help=argparse.SUPPRESS)
    a = p.parse_args()
    if not (a.part or a.join or a.profile): p.error("which --part? 1, 2 or 3")
    return a


def main():
    a = options()
    a.end = time.monotonic() + a.limit
    if a.join: return join(a.join, a.out)
    a.out = a.out.resolve()
    if a.profile: return profile(a.profile, a.device, a.out, 5 if a.device == "cuda" else 1)
    if a.dry:
        a.device = "cpu"
        a.out.mkdir(parents=True, exist_ok=True)
        if a.part == 3: a.data = tiny_images(a.out / "tiny.npz")
    about = check(a)
    rows, record = {1: right, 2: fast, 3: learns}[a.part](a, about)
    (a.out / f"part{a.part}.json").write_text(json.dumps(about | record, indent=1, default=str))
    where = about.get("device", "CPU, a dry run: the figures mean nothing")
    print(f"\npart {a.part} on {where}, {about['date']}, torch {about['torch']}")
    width = max(len(str(k)) for k, _ in rows)
    print("\n".join(f"{k!s:<{width}}  {v}" for k, v in rows))


if __name__ == "__main__": main()
