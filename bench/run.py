"""Training and sampling of ours beside other libraries: the same network, batch and machine, in one
run, taking turns.

python bench/run.py --size cpu --out results/bench_cpu.json writes that and, beside it, the table as
.md
"""
import argparse
import gc
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from iddpm_nb import _give_way  # noqa: E402

_give_way()      # for all contenders alike: they take turns, and those that wait should sleep
SIZES = ("tiny", "cpu", "cifar10", "imagenet64")


# a worker: one contender in a process of its own, which answers one line for each that it is given

def held(device):
    "Memory now in MB: on a GPU what PyTorch reserved, else the resident set."
    import torch
    if device == "cuda": return torch.cuda.memory_reserved() / 2**20
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory(device):
    "The same at its peak."
    import torch
    if device == "cuda": return torch.cuda.max_memory_reserved() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def worker(a):
    import torch
    import contenders
    torch.set_num_threads(a.threads)
    c = contenders.SIZES[a.size] | ({"batch": a.batch} if a.batch else {})
    wait = torch.cuda.synchronize if a.device == "cuda" else lambda: None
    try:
        if a.worker == "matrix product":
            from iddpm_nb.training.speed import product_rate
            f = lambda: [product_rate(a.device, getattr(torch, d), repeats=3)
                         for d in ("float32", "bfloat16")]
            steps = 1
            about = {}
        else:
            # what has to be imported is held before
            small = contenders.make(a.worker, contenders.SIZES["tiny"], a.device)
            contenders.work(small.net, small.c)
            small.training()
            small.sampling(a.steps)
            del small
            gc.collect()
            base = held(a.device)
            it = contenders.make(a.worker, c, a.device)
            about = {"parameters": sum(p.numel() for p in it.net.parameters()),
                     "gflop": contenders.work(it.net, c), "precision": it.precision,
                     "base_mb": base, "about": type(it).__doc__}
            f, steps = (it.training(),
                        a.train_steps) if a.kind == "train" else (it.sampling(a.steps), 1)
            for _ in range(a.warmup):
                f()
    except (ImportError, NotImplementedError) as e:
        print(json.dumps({"not_run": f"{type(e).__name__}: {e}"}), flush=True)
        return
    wait()
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        if line.strip() == "memory":
            print(json.dumps(memory(a.device)), flush=True)
            continue
        wait()
        start = time.perf_counter()
        for _ in range(steps):
            out = f()
        wait()
        seconds = time.perf_counter() - start
        print(json.dumps(out if a.worker == "matrix product" else steps * c["batch"] / seconds),
              flush=True)


class Process:
    def __init__(self, name, kind, a):
        args = [sys.executable, __file__, "--worker", name, "--kind", kind]
        for k in ("size", "device", "batch", "threads", "train_steps", "steps", "warmup"):
            args += [f"--{k.replace('_', '-')}", str(getattr(a, k))]
        env = (os.environ
               | {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": str(a.threads),
                  "PYTHONPATH": os.pathsep.join([*a.peers, os.environ.get("PYTHONPATH", "")])})
        self.name = name
        self.p = subprocess.Popen(args, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                  env=env)
        self.about = self.answer()

    def answer(self):
        line = self.p.stdout.readline()
        while line and not line.startswith(("{", "[", *"0123456789")):
            line = self.p.stdout.readline()  # what libraries print
        if not line: return {"not_run": f"its process ended with status {self.p.wait()}"}
        return json.loads(line)

    def ask(self, what):
        self.p.stdin.write(what + "\n")
        self.p.stdin.flush()
        return self.answer()
    def end(self):
        self.p.stdin.close()
        self.p.wait()


# ---- the driver ----

def measure(kind, names, a):
    """Rounds in which all contenders take turns, each starting with another -> by name:
    description, rates, peak memory. When the time is over nothing new is started."""
    all_of_them, found = [], {}
    for name in ["matrix product", *names]:
        if all_of_them and time.monotonic() > a.ends[kind]:
            found[name] = {"not_run": "the time was over", "rates": []}
            continue
        print(f"{kind}: starting {name}", flush=True)
        all_of_them.append(Process(name, kind, a))
        found[name] = {**all_of_them[-1].about, "rates": []}
    running = [p for p in all_of_them if "not_run" not in p.about]
    for r in range(a.repeats):
        if r and time.monotonic() > a.ends[kind]: break
        for p in running[r % len(running):] + running[:r % len(running)]:
            found[p.name]["rates"].append(p.ask("go"))
        print(f"{kind}: round {r + 1} of {a.repeats}: " + ", ".join(f"{n} {d['rates'][-1]:.2f}"
                    for n, d in found.items() if d["rates"] and n != "matrix product"), flush=True)
    for p in running:
        if p.name != "matrix product": found[p.name]["peak_mb"] = p.ask("memory")
        p.end()
    return found


def ratio(ours, theirs):
    "Median of the rounds' ratios, and their range."
    r = sorted(a / b for a, b in zip(ours, theirs))
    return {"median": statistics.median(r), "least": r[0], "most": r[-1]}


def machine(a):
    import torch
    cpu = next((line.split(":")[1].strip()
                for line in open("/proc/cpuinfo") if line.startswith("model name")),
               platform.processor()) if Path("/proc/cpuinfo").exists() else platform.processor()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    native = (" with " + " and ".join(f for f in ("amx_bf16", "avx512_bf16") if f in flags)
              if "_bf16" in flags else "")
    gpu = torch.cuda.get_device_name() if a.device == "cuda" else None
    versions = {}
    for name in ("torch", "diffusers", "denoising_diffusion_pytorch", "ema_pytorch"):
        from importlib.metadata import PackageNotFoundError, version
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {"cpu": f"{cpu}{native}, {os.cpu_count()} cores", "threads": a.threads, "gpu": gpu,
            "versions": versions, "python": platform.python_version(),
            "idle_threads": {k: os.environ.get(k) for k in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")},
            "load_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}


def summary(d, names):
    "Medians, shares and ratios from the rounds."
    for kind in ("train", "sample"):
        product = list(zip(*d[kind]["matrix product"]["rates"]))
        d[kind]["matrix_product_gflops"] = dict(zip(("float32", "bfloat16"),
                                                    (statistics.median(r) / 1e9 for r in product)))
        for n in names:
            it = d[kind][n]
            if not it["rates"]: continue
            it["images_per_s"] = statistics.median(it["rates"])
            if it["gflop"]:
                each = (it["gflop"][1] if kind == "train"
                        else it["gflop"][0] * d["settings"]["steps"])
                it["gflops"] = each * it["images_per_s"]
                it["share_of_bfloat16_product"] = (it["gflops"]
                                                   / d[kind]["matrix_product_gflops"]["bfloat16"])
                it["share_of_float32_product"] = (it["gflops"]
                                                  / d[kind]["matrix_product_gflops"]["float32"])
            ours = d[kind]["ours"]["rates"]
            if n != "ours" and ours: it["ours_is_faster_by"] = ratio(ours, it["rates"])
    return d


def table(d):
    "The figures as markdown."
    s, m, names = d["settings"], d["machine"], d["contenders"]
    rows = ["| | parameters | GFLOP a training image | training images/s | ours is faster by | "
            "peak MB | sampling images/s | ours is faster by | peak MB | share of the matrix "
            "product: training, sampling |", "|" + "---|" * 10]
    for n in names:
        cells, share = [], []
        for kind in ("train", "sample"):
            it = d[kind][n]
            if not it["rates"]:
                cells += ["not run"] * 3
                share.append("not run")
                continue
            r = it.get("ours_is_faster_by")
            cells += [f"{it['images_per_s']:.3g}", f"{r['median']:.2f} ({r['least']:.2f} to "
                      f"{r['most']:.2f})" if r else "–", f"{it['peak_mb'] - it['base_mb']:.0f}"]
            share.append(f"{it['share_of_' + it['precision'] + '_product']:.0%}" if "gflops" in it
                         else "–")
        it = d["train"][n]
        size = ([f"{it['parameters'] / 1e6:.2f} M", f"{it['gflop'][1]:.1f}"] if "parameters" in it
                else ["–", "–"])
        rows.append("| " + " | ".join([n, *size, *cells, ", ".join(share)]) + " |")
    product = d["train"]["matrix_product_gflops"]
    where = m["gpu"] or f"{m['cpu']}, {m['threads']} threads"
    waiting = [f"{k}={v}" for k, v in m.get("idle_threads", {}).items() if v]
    load = "" if m.get("load_at_start") is None else f"load {m['load_at_start']:.1f} at the start, "
    head = (f"{s['size']}: C = {s['network']['channels']}, {s['network']['blocks']} blocks, "
            f"{s['network']['size']}x{s['network']['size']}, batch {s['batch']}, sampling with "
            f"{s['steps']} steps, " f"median of {s['repeats']} rounds on {where}; torch "
            f"{m['versions']['torch']}, {load}{''.join(w + ', ' for w in waiting)}"
            f"{m['date']}. Ratios: median of the rounds, least to most. "
            "Peak memory: above what was held before the network was built. Matrix product of "
            f"this machine in the same rounds: float32 {product['float32']:.0f}, "
            f"bfloat16 {product['bfloat16']:.0f} GFLOP/s; "
            "each share is of the product in the precision that the contender ran in.")
    why = [f"- {n}, {kind}: not run ({d[kind][n]['not_run']})" for n in names
           for kind in ("train", "sample") if "not_run" in d[kind][n]]
    return "\n".join([head, "", *rows, *([""] + why if why else [])]) + "\n"


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default=None, help="cpu or cuda; by default a GPU if there is one "
                   "and the size is not 'cpu'")
    p.add_argument("--size", default="cpu", choices=SIZES)
    p.add_argument("--repeats", type=int, default=7, help="rounds")
    p.add_argument("--steps", type=int, default=10, help="sampling steps")
    p.add_argument("--train-steps", type=int, default=2, help="training steps in a round")
    p.add_argument("--warmup", type=int, default=1, help="calls before the first round")
    p.add_argument("--batch", type=int, default=0, help="0: as the size has it")
    p.add_argument("--threads", type=int, default=0, help="0: all cores")
    p.add_argument("--peers", action="append", default=[],
                   help="a folder with further libraries; may be given several times")
    p.add_argument("--only", default="", help="comma-separated: contenders whose names contain one "
                   "of these (ours always runs)")
    p.add_argument("--until", type=float, default=0, help="start nothing new after so many "
                   "seconds, of which training has 60 in 100; 0: no limit")
    p.add_argument("--out", default=None, help="a .json; the table goes beside it as .md")
    p.add_argument("--worker", help=argparse.SUPPRESS)
    p.add_argument("--kind", help=argparse.SUPPRESS)
    a = p.parse_args()
    a.threads = (a.threads or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
                 else a.threads or os.cpu_count())
    if a.worker: return worker(a)
    sys.path[:0] = a.peers
    import torch
    import contenders
    a.device = a.device or ("cuda" if torch.cuda.is_available()
                            and a.size not in ("cpu", "tiny") else "cpu")
    names = [n for n in contenders.CONTENDERS if n == "ours" or not a.only
             or any(part.strip() in n for part in a.only.split(","))]
    if a.device == "cuda" and not torch.cuda.is_available():
        print(f"{a.size} on cuda: not run (no GPU here)")
        return
    c = contenders.SIZES[a.size]
    d = {"settings": {"size": a.size, "network": c, "batch": a.batch or c["batch"],
                      "steps": a.steps, "train_steps": a.train_steps, "repeats": a.repeats,
                      "device": a.device}, "machine": machine(a), "contenders": names}
    share, start = {"train": 0.6, "sample": 1.0}, time.monotonic()
    a.ends = {kind: start + (a.until or math.inf) * part for kind, part in share.items()}
    for kind in share:
        d[kind] = measure(kind, names, a)
    text = table(summary(d, names))
    print("\n" + text)
    if a.out:
        out = Path(a.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(d, indent=1) + "\n")
        out.with_suffix(".md").write_text(text)


if __name__ == "__main__": main()
