// The page: what is asked, and what is drawn.
import { Engine } from "./engine.js";
import { between, noised, normals, respaced, spaced } from "./sampler.js";

const STEPS = [5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 60, 80, 100, 125, 150, 200, 250, 300, 400,
               500, 600, 800, 1000];
const MANY = 16, WAYS = 9, ARC = 8, PIXELS = 64;
const root = document.getElementById("play");
const one = name => root.querySelector(name);
const all = name => [...root.querySelectorAll(name)];
const input = name => one(`[data-in=${name}]`);
const canvas = name => one(`[data-canvas=${name}]`);
const number = name => Number(input(name).value);
const say = (name, text) => { one(`[data-out=${name}]`).textContent = text; };

const engine = new Engine();
const state = { tab: "draw", how: "learned", history: [], drawn: new Float32Array(PIXELS).fill(-1),
                about: null, example: 0 };
export const ready = engine.ready;
export { engine, state };

// Grey for images, white to red for v: what a network learns is red.
const grey = x => { const g = 127.5 * (Math.min(Math.max(x, -1), 1) + 1); return [g, g, g]; };
const red = v => { const r = Math.min(Math.max(v, 0), 1);
                   return [255 - 35 * r, 255 - 235 * r, 255 - 195 * r]; };

// Images of 8x8 beside each other, each pixel a square.
function paint(target, data, cols, colour = grey) {
  const rows = data.length / PIXELS / cols, gap = cols > 1 ? 1 : 0;
  const width = cols * 8 + (cols - 1) * gap, height = rows * 8 + (rows - 1) * gap;
  const small = new OffscreenCanvas(width, height), pen = small.getContext("2d");
  const image = pen.createImageData(width, height);
  for (let i = 0; i < data.length; i++) {
    const n = Math.floor(i / PIXELS), p = i % PIXELS;
    const x = (n % cols) * (8 + gap) + p % 8;
    const y = Math.floor(n / cols) * (8 + gap) + Math.floor(p / 8);
    image.data.set([...colour(data[i]), 255], 4 * (y * width + x));
  }
  pen.putImageData(image, 0, 0);
  const to = target.getContext("2d");
  to.imageSmoothingEnabled = false;
  to.clearRect(0, 0, target.width, target.height);
  to.drawImage(small, 0, 0, target.width, target.height);
}

const steps = () => STEPS[number("steps")];
const how = () => state.how === "ddim" ? { method: "ddim", variance: "learned", eta: number("eta") }
                                       : { method: "ddpm", variance: state.how, eta: 0 };
const chainOf = () => respaced(state.about.alpha_bar, state.about.t_model, spaced(1000, steps()));

// The kept step nearest to t.
function nearest(kept, t) {
  return kept.reduce((best, u, k) => Math.abs(u - t) < Math.abs(kept[best] - t) ? k : best, 0);
}

const repeat = (x, n) => Float32Array.from({ length: n * x.length }, (_, i) => x[i % x.length]);

// What a tab asks for: where to begin, and from which of the kept steps.
const asks = {
  draw: () => ({ x: normals(number("seed"))(MANY * PIXELS), seed: number("seed") + 1e6,
                 how: how() }),
  back: () => {
    const s = chainOf(), from = nearest(s.kept, number("t"));
    return { x: repeat(noisy(s, from), WAYS), from, seed: number("seed") + 1e6, how: how() };
  },
  between: () => {
    const [a, b] = ["seedA", "seedB"].map(name => normals(number(name))(PIXELS));
    const parts = Array.from({ length: ARC }, (_, i) => between(a, b, i / (ARC - 1)));
    return { x: Float32Array.from(parts.flatMap(p => [...p])),
             how: { method: "ddim", variance: "learned", eta: 0 } };
  },
};

function noisy(s, k) {
  return noised(s.ab[k], state.drawn, normals(number("seed") + 2e6)(PIXELS));
}

// How a tab shows a moment of its chain.
const shows = {
  draw: m => {
    paint(canvas("x"), m.x, 4);
    paint(canvas("x0"), m.x0, 4);
    paint(canvas("v"), m.v, 4, red);
  },
  back: m => paint(canvas("ways"), m.x, 3),
  between: m => paint(canvas("arc"), Float32Array.from([...m.x, ...m.x0]), ARC),
};

const hints = {
  draw: "Drag the moment to see the chain again. Fewer steps are faster; see which variance still "
        + "draws digits with ten.",
  back: "Little noise leads back to your digit. With much noise the network no longer knows what "
        + "you drew, and finds digits of its own.",
  between: "Without noise each start leads to one digit, and neighbours lead to similar ones.",
};

function show(i) {
  const m = state.history[i];
  if (!m) return;
  shows[state.tab](m);
  say("moment", `t = ${m.t}`);
  input("moment").value = i;
}

// Show x0 and x_t of the second tab before the way back begins.
function showForward() {
  paint(canvas("pad"), state.drawn, 1);
  const s = chainOf(), k = nearest(s.kept, number("t"));
  paint(canvas("noisy"), noisy(s, k), 1);
  say("t", s.kept[k]);
}

async function run() {
  if (!state.about) return;
  if (state.tab === "back") showForward();
  const asked = asks[state.tab](), history = state.history = [];
  const length = (asked.from ?? steps() - 1) + 1;
  Object.assign(input("moment"), { max: length - 1, value: 0, disabled: true });
  one(".play-hint").textContent = hints[state.tab];
  let shown = 0;
  try {
    const end = await engine.run({ steps: steps(), ...asked }, moment => {
      history.push(moment);
      if (performance.now() - shown < 30) return;      // no more pictures than an eye can take
      shown = performance.now();
      show(history.length - 1);
      one(".play-state").textContent = `step ${history.length} of ${length}`;
    });
    if (!end) return;                                  // something else was asked for
    show(history.length - 1);
    input("moment").disabled = false;
    one(".play-state").textContent =
      `${length} steps for ${asked.x.length / PIXELS} images in ${(end.ms / 1000).toFixed(1)} s`;
  } catch (e) {
    one(".play-state").textContent = `The chain stopped: ${e.message}`;
  }
}

let timer = 0;
const soon = () => { clearTimeout(timer); timer = setTimeout(run, 120); };

function choose(tab) {
  state.tab = tab;
  for (const b of all("[data-tab]")) b.setAttribute("aria-selected", b.dataset.tab === tab);
  for (const s of all("[data-stage]")) s.hidden = s.dataset.stage !== tab;
  for (const l of all("[data-tab-only]")) l.hidden = !l.dataset.tabOnly.split(" ").includes(tab);
  one(".play-how").hidden = tab === "between";
  one("[data-only=ddim]").hidden = tab === "between" || state.how !== "ddim";
  run();
}

function chooseHow(name) {
  state.how = name;
  for (const b of all("[data-how]")) b.setAttribute("aria-checked", b.dataset.how === name);
  one("[data-only=ddim]").hidden = name !== "ddim";
  soon();
}

// A soft brush: a pixel is as bright as it is near.
function brush(event) {
  const box = canvas("pad").getBoundingClientRect();
  const x = 8 * (event.clientX - box.left) / box.width;
  const y = 8 * (event.clientY - box.top) / box.height;
  for (let i = 0; i < PIXELS; i++) {
    const far = Math.hypot(i % 8 + 0.5 - x, Math.floor(i / 8) + 0.5 - y);
    state.drawn[i] = Math.max(state.drawn[i], Math.min(1, 2.6 - 2.4 * far));
  }
  showForward();
}

function listen() {
  for (const b of all("[data-tab]")) b.onclick = () => choose(b.dataset.tab);
  for (const b of all("[data-how]")) b.onclick = () => chooseHow(b.dataset.how);
  for (const name of ["steps", "eta", "t"])
    input(name).oninput = () => {
      say("steps", steps());
      say("eta", number("eta"));
      if (state.tab === "back") showForward();
      soon();
    };
  for (const name of ["seed", "seedA", "seedB"]) input(name).oninput = soon;
  input("moment").oninput = () => show(number("moment"));
  one(".play-new").onclick = () => {
    const names = state.tab === "between" ? ["seedA", "seedB"] : ["seed"];
    for (const name of names) input(name).value = Math.floor(Math.random() * 1e5);
    run();
  };
  one("[data-do=clear]").onclick = () => { state.drawn.fill(-1); run(); };
  one("[data-do=example]").onclick = () => {
    const digits = state.about.examples;
    state.drawn = Float32Array.from(digits[state.example++ % digits.length]);
    run();
  };
  const pad = canvas("pad");
  pad.onpointerdown = e => { pad.setPointerCapture(e.pointerId); brush(e); };
  pad.onpointermove = e => { if (e.buttons) brush(e); };
  pad.onpointerup = soon;
}

engine.ready.then(about => {
  state.about = about;
  state.drawn = Float32Array.from(about.examples[state.example++]);
  Object.assign(input("steps"), { max: STEPS.length - 1, value: STEPS.indexOf(50) });
  listen();
  root.classList.add("play-ready");
  run();
}, e => { one(".play-state").textContent = `The model did not load: ${e.message}`; });
