"""The playground: the shipped digits model, written as operations, and what runs them in a
browser."""
import base64
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

HERE = Path(__file__).parent / "playground"
RUNTIME = "onnxruntime-web"
VERSION = "1.30.0"
# what npm says of this version: anything else is not taken
SHA512 = ("q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ"
          "==")
NEEDED = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
TITLE = """---
html_theme.sidebar_secondary.remove: true
---

# Playground

The [digits model](09_respaced_sampling.ipynb) that comes with this package runs here, in your
browser; nothing is sent anywhere.

"""
STARTS = """<script>
if (location.protocol === "file:") {
  document.querySelector(".play-state").innerHTML = "A browser does not let a page from the disk "
    + "load a model. Show the site by a local server: <code>python tools/website.py --serve</code>";
} else import(new URL("playground/app.js", location.href));
</script>
"""


def packed(folder):
    "The package as npm packs it, if it can be had: from an earlier build, or from npm."
    file = folder / f"{RUNTIME}-{VERSION}.tgz"
    if file.exists(): return file.read_bytes()
    if not shutil.which("npm"): return "there was no npm when this site was built"
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["npm", "pack", f"{RUNTIME}@{VERSION}", "--ignore-scripts"], cwd=folder,
                          capture_output=True, text=True, timeout=300)
    if not file.exists():
        why = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        return f"npm could not fetch {RUNTIME} when this site was built ({why[0][:120]})"
    return file.read_bytes()


def runtime(folder):
    "The files of the runtime: name -> bytes; or why there are none."
    found = packed(folder)
    if isinstance(found, str): return found
    if base64.b64encode(hashlib.sha512(found).digest()).decode() != SHA512:
        (folder / f"{RUNTIME}-{VERSION}.tgz").unlink()
        return f"what npm sent was not {RUNTIME} {VERSION} as it is known here"
    with tarfile.open(fileobj=io.BytesIO(found)) as archive:
        return {name: archive.extractfile(f"package/dist/{name}").read() for name in NEEDED}


def model():
    "The network as operations, and what else the page has to know: name -> bytes; or why not."
    try:
        from iddpm_nb.data import digits, to_float
        from iddpm_nb.interop.onnx_bridge import onnx_bytes
        from iddpm_nb.running.model import load
        found = load("digits")
        network = onnx_bytes(found)
    except ImportError as e:
        return str(e)
    s, data = found.schedule, digits()
    firsts = [int((data.labels == k).nonzero()[0]) for k in (3, 8, 5, 2, 0, 9, 4, 6, 7, 1)]
    about = {"alpha_bar": s.alpha_bar.tolist(), "t_model": s.t_model.tolist(),
             "examples": to_float(data.images[firsts]).flatten(1).tolist()}
    return {"digits.onnx": network, "digits.json": json.dumps(about).encode()}


def page(extra, kept):
    "The page, as text; the files that it loads go to the folder `extra`."
    shutil.rmtree(extra, ignore_errors=True)
    parts = [runtime(kept), model()]
    missing = [p for p in parts if isinstance(p, str)]
    if missing:
        return (f"{TITLE}:::{{admonition}} Not built\n:class: warning\nThe playground was not "
                f"built: {'; '.join(missing)}.\n:::\n")
    extra.mkdir(parents=True)
    for name, data in (parts[0] | parts[1]).items():
        (extra / name).write_bytes(data)
    for file in HERE.glob("*.js"):
        shutil.copy(file, extra / file.name)
    html = (HERE / "page.html").read_text(encoding="utf-8")
    return f"{TITLE}```{{raw}} html\n{html}{STARTS}```\n"
