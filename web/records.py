"""The gallery and the measured figures: from pictures that chapters keep, and from records."""
import base64
import json
import sys

from web.pages import described
from web.reference import label, title

# heading, what it shows, and cells with pictures: (chapter, id)
GALLERY = [
    ("Samples", "What trained models draw.", [
        ("index", "4079fa80"), ("conditioning/01_labels", "86cd354f"),
        ("conditioning/02_upsampler", "5605626e"), ("09a_judging_samples", "5e8a73b2")]),
    ("From noise to a digit", "The chain on its way: what is decided early, and what late.", [
        ("09_respaced_sampling", "9c4e5a11"), ("03_posterior", "f16e8db3"),
        ("04_learned_variance", "1379c085"), ("00_method", "c75631bd")]),
    ("What each option of the sampler does", "The same noise in every column, one thing changed. "
     "The [playground](playground.md) lets you try them.", [
         ("09_respaced_sampling", "bbfb6a2e"), ("09_respaced_sampling", "9a5ed006"),
         ("09_respaced_sampling", "224ae220"), ("09_respaced_sampling", "0c482c68"),
         ("measuring/04_best_steps", "be570026"), ("reproduction/05a_samples", "5a000009"),
         ("conditioning/01_labels", "aaf8a6e7"), ("interop/02_diffusers_bridge", "5ad6791f")]),
]
MNIST_PICTURE = "mnist32_250.png"


def picture(nb, cell_id):
    "The bytes of a picture that a chapter keeps, and what it shows."
    cells = {c.id: (i, c) for i, c in enumerate(nb.cells)}
    if cell_id not in cells: sys.exit(f"the gallery shows a picture that is gone: cell {cell_id}")
    i, cell = cells[cell_id]
    datas = [o.data for o in cell.outputs if "data" in o]
    found = [(k, v) for d in datas for k, v in d.items() if k.startswith("image/")]
    if not found: sys.exit(f"the gallery shows cell {cell_id}, which has no picture")
    kind, data = found[0]
    said = described(cell, [c for c in nb.cells[:i] if c.cell_type == "markdown"], None)
    return kind.partition("/")[2].replace("jpeg", "jpg"), base64.b64decode(data), said


def shown(name, said, alt=None):
    "A picture as Markdown."
    alt = (alt or said).replace("[", "(").replace("]", ")").replace('"', "'")
    return f"```{{image}} /pictures/{name}\n:alt: {alt}\n```\n"


def origin(place, nb):
    "Where a picture was made."
    if place == "index": return "Made with the ten lines of the [first page](index.md).\n"
    return f"From [{label(place)} {title(nb)}](/{place}.ipynb).\n"


def gallery(books, pictures):
    "The page, and the bytes of its pictures go to `pictures`."
    lines = ["# Gallery\n", "Every picture comes from a chapter, which says how it was made.\n"]
    for heading, text, cells in GALLERY:
        lines += [f"## {heading}\n", f"{text}\n"]
        for place, cell_id in cells:
            kind, data, said = picture(books[place], cell_id)
            pictures[f"{cell_id}.{kind}"] = data
            lines += [shown(f"{cell_id}.{kind}", said), origin(place, books[place])]
    lines += ["## MNIST\n", "A run of an hour on one core of a CPU, with 250 steps of sampling; "
              "its figures stand among the [measured ones](measured.md).\n",
              shown(MNIST_PICTURE, "Samples of a model of MNIST, 32x32, in two rows.")]
    return "\n".join(lines)


def table(rows, heads=("what", "figure")):
    "Rows as Markdown."
    body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *body]) + "\n"


def of_digits(r):
    "The shipped model, as its record says."
    b, h, g = r["bits_per_dim_without_a_network"], r["held_out"], r["samples"]
    return table([
        ("training", f"{r['steps']} steps, {r['seconds_of_training']:.0f} s on {r['machine']}, "
                     "beside other work"),
        (f"held-out bits/dim, estimated from {h['num_t']} of 1,000 terms",
         f"{h['bits_per_dim']:.2f} ± {h['stderr']:.2f}"),
        ("without a network: a uniform level / one histogram / a histogram per pixel",
         f"{b['uniform']:.2f} / {b['histogram']:.2f} / {b['histogram_per_pixel']:.2f}"),
        ("share that a classifier is over 0.9 sure of: samples with 50 steps / held-out digits",
         f"{g['share_a_classifier_is_sure_of']:.0%} / {h['share_a_classifier_is_sure_of']:.0%}"),
        ("median distance to the nearest training image: samples / held-out digits",
         f"{g['distance_to_nearest_training_image']:.3f} / "
         f"{h['distance_to_nearest_training_image']:.3f}")])


def of_mnist(r):
    "The run on MNIST, as its record says."
    h, h0 = r["held_out"], r["bits_per_dim_without_a_network"]
    kinds = "uniform", "histogram", "histogram_per_pixel", "png_of_each", "xz_of_all"
    return table([
        ("training", f"{r['steps']:,} steps of {r['options']['train']['batch']} images, "
         f"{r['seconds_of_training'] / 60:.0f} minutes on one core of {r['machine']}, beside other "
         f"work, {r['precision']}; {r['parameters'] / 1e6:.2f} million parameters"),
        (f"bits/dim of {h['n']:,} test images, {h['num_t']} of "
         f"{r['options']['diffusion']['T']:,} terms each",
         f"{h['bits_per_dim']:.3f} ± {h['stderr']:.3f}"),
        ("the same without a network, for the first of them: a uniform level / one histogram of "
         "the training images / one for each pixel / PNG of each image / xz of all in one file",
         " / ".join(f"{h0[k]:.3f}" for k in kinds)),
        ("median distance to the nearest of 10,000 training images: samples with 50 steps / test "
         "images", f"{r['samples']['distance_to_nearest_training_image']:.3f} / "
         f"{h['distance_to_nearest_training_image']:.3f}")])


DIGITS = """# Measured

Every table on this page is made from a record, a file that the measuring program wrote.

## The shipped model

The digits have 17 grey levels 16 bins apart, so their bits/dim are compared with models of the
digits and with nothing else.

{digits}
After so short a training the bits/dim stand above even a uniform level: the network draws digits
long before it has learned the lattice of grey levels. [Chapter 10](10_likelihood.ipynb) shows how
they fall with training.
"""

ORDERINGS = """## Paper against ours

Seven orderings of the paper that a small run should show, tried by `iddpm_tables mnist16` and
`iddpm_tables cifar16`: MNIST and CIFAR-10 (in colour) at 16x16. A bold ✓ is confirmed in every
part, by intervals over images and seeds. [Chapter
reproduction/00](reproduction/00_results.ipynb) explains the other signs, and has all claims with
their intervals.

{seven}
"""

SPEED = """## Speed, beside other libraries

`python bench/run.py --size cpu` trains and samples the same network with each library in turns, in
one run on one machine; `bench/README.md` says what exactly each contender does. The lead at the
defaults is bfloat16 and compiling: in float32 against float32, not compiled, ours is level with
diffusers. [Chapter training/08](training/08_speed.ipynb) shows where the time goes.

{bench}
"""

MNIST = """## A run on MNIST

MNIST in a black frame, 32x32, trained by `iddpm_train --data mnist --image-size 32` with the
options in `results/mnist32.json`, which is the whole record. Most pixels are black, so the bits/dim
are low for any method: in so short a training the network gets little below one histogram for each
pixel, and a compressor that sees all images at once needs less. Below, samples with 250 steps.

{mnist}
"""


def read(path):
    "A record."
    return json.loads(path.read_text(encoding="utf-8"))


def measured(root):
    "The page of figures."
    from iddpm_nb.reproduction.claims import read_records, seven
    results = root / "results"
    signs = seven(*(read_records(results / "tables" / scale) for scale in ("mnist16", "cifar16")))
    bench = (results / "bench_cpu.md").read_text(encoding="utf-8")
    return "\n".join([
        DIGITS.format(digits=of_digits(read(root / "data" / "shipped" / "digits.json"))),
        ORDERINGS.format(seven=signs), SPEED.format(bench=bench),
        MNIST.format(mnist=of_mnist(read(results / "mnist32.json"))),
        shown(MNIST_PICTURE, "Samples of a model of MNIST, 32x32, in two rows."),
        "The paper's own scales (ImageNet-64, CIFAR-10 at 32x32) and everything on a GPU: not "
        "run.\n"])


def pages(root, books, pictures):
    "place -> text; the bytes of pictures go to `pictures`."
    pictures[MNIST_PICTURE] = (root / "results" / MNIST_PICTURE).read_bytes()
    return {"gallery.md": gallery(books, pictures), "measured.md": measured(root)}
